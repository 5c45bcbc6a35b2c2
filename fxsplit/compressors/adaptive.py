"""Adaptive bits: every channel gets as many bits as it needs, within a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors import codebook_codes
from fxsplit.compressors.base import Compressor
from fxsplit.compressors.codebooks import Sample, codebooks, sampled_of_group, sorted_samples
from fxsplit.compressors.floating import check_floating, plain, wide_dtype, widen
from fxsplit.compressors.grouping import AUTO, Layout, check_group, check_rounding, group_of
from fxsplit.compressors.kernels import finite_extremes, kernels_for
from fxsplit.compressors.packing import packed_bytes
from fxsplit.compressors.uniform import milder
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

MOST_BITS = 8

MOST_MORE = 3
"""So many bits more than the average a group may have: beyond, its codebook would cost more than it saves."""

MEASURED_MORE = 1
"""So many bits more than the average are measured; with each bit beyond, the error falls to a quarter."""

TRIED_ITERATIONS, ITERATIONS = 3, 10
"""Of Lloyd's, at most, for the codebooks that are measured and for those that are sent."""

AT_ONCE = 1 << 17
"""Elements that are encoded or decoded together on a CPU; an accelerator does 32 times as many."""


@dataclass(frozen=True)
class Adaptive(Compressor):
    """K-means quantization of each group, with bits given where they lower the squared error most.

    Errors are measured: on a sample of each group a codebook is made for every number of bits, and then bytes are
    given, one bit an element at a time, to the group whose squared error falls most for each of them, its larger
    codebook included, until no more fit. Where errors fall by four with every bit, that is reverse water-filling
    (Cover and Thomas, Elements of Information Theory, 10.3.3) with whole bits. A group without bits is its mean.

    Of equal groups each gets `bits`, and what is sent is that of `kmeans` with the same options. Where groups
    differ, those with little in them give their bits to the others.

    Wire, for `groups` of n / groups elements: the bits of each, uint8 `[groups]`; and a buffer, uint8
    `[groups * (ceil(n / groups * bits / 8) + e * 2**bits)]`, e = 4 (8 for a float64 tensor). In it are the
    codebooks, from those with the fewest values on, and then the codes in the same order, those of a group
    beginning with a byte; then zeros.

    Args:
        bits: bits an element, on average, 1 to 8.
        group: which elements have their bits and their codebook in common; see `Quantization`.
        sample: about how many elements errors are measured on and codebooks are found from; see `KMeans`.
        rounding: "nearest" value; or "stochastic", one of the two around the element at random, so that the mean
            of what is received is the element; every group has a bit at least then. See `KMeans`.

    Raises:
        CompressorError: an option is not in its range.

    >>> str(Adaptive(bits=3))
    'adaptive3'
    """

    name: ClassVar[str] = "adaptive"

    bits: int = 4
    sample: int = 65536
    group: str | int = field(default=AUTO, kw_only=True)
    rounding: str = field(default="nearest", kw_only=True)

    def __post_init__(self) -> None:
        """Checks the options."""
        self.check_integer("bits", 1, MOST_BITS)
        self.check_integer("sample", 0)
        check_group(self.group, f"{self.name}: group")
        check_rounding(self.rounding, f"{self.name}: rounding")

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The specs of bits and buffer.

        Raises:
            CompressorError: the dtype of `spec` is not a floating point type of 16, 32 or 64 bits, or the tensor
                cannot be divided into blocks of `group` elements.
        """
        check_floating(self, spec)
        layout = self._layout(spec)
        most = layout.groups * _group_bytes(layout.group_size, self.bits, spec) if spec.numel else 0
        return TensorSpec((layout.groups,), torch.uint8), TensorSpec((most,), torch.uint8)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Bits and buffer of `x`, of any shape and strides.

        On an accelerator this waits for the device several times.

        Raises:
            CompressorError: `x` is not floating point, holds NaN or infinity, or cannot be divided into blocks
                of `group` elements.
        """
        spec = TensorSpec.of(x)
        given, buffer = (torch.zeros(s.shape, dtype=s.dtype, device=x.device) for s in self.wire(spec))
        if x.numel() == 0:
            return given, buffer
        values, layout = plain(x).view(-1), self._layout(spec)
        kernels = kernels_for(values.device, values.numel())
        extremes = finite_extremes(self, values, layout)
        given = self._given(values, layout, extremes, spec)
        books = self._books(values, layout, extremes, given)
        at = 0
        for book in books.values():
            at = _write(book.view(torch.uint8).view(-1), buffer, at)
        blocks = values.view(layout.outer, layout.groups, layout.inner)
        for run in self._runs(given, layout, x.device):
            if run.bits == 0:
                continue
            rows = blocks[run.where].transpose(0, 1)  # [groups, outer, inner]
            flat, book = rows.reshape(-1).contiguous(), books[run.bits][run.rows]
            inside = Layout(1, len(rows), rows[0].numel())
            if self.rounding == "stochastic":
                codes = codebook_codes.encode_at_random(flat, book, inside, run.first)
            else:
                codes = codebook_codes.encode(flat, book, inside, kernels)
            at = _write(codes, buffer, at)
        return given.to(device=x.device, dtype=torch.uint8), buffer

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """The values that the codes stand for, a new contiguous tensor of `spec`.

        Raises:
            CompressorError: the payload is not what `wire(spec)` announces.
        """
        self.check_payload(payload, spec)
        given, buffer, layout = payload[0].cpu().long(), payload[1], self._layout(spec)
        decoded = torch.empty(spec.shape, dtype=spec.dtype, device=buffer.device)
        if spec.numel == 0:
            return decoded
        if int(given.max()) > MOST_BITS or int(_costs(layout, spec)[given].sum()) > buffer.numel():
            raise CompressorError(
                f"not a payload of {self}", found=f"{int(given.sum())} bits, {len(given)} groups"
            )
        books, at, kernels = {}, 0, kernels_for(buffer.device, spec.numel)
        for bits, groups in _by_bits(given):
            size = len(groups) * _group_bytes(0, bits, spec)
            octets = buffer[at : at + size].clone()  # a number begins at a multiple of its size
            books[bits] = octets.view(wide_dtype(spec.dtype)).view(len(groups), 1 << bits)
            at += size
        blocks = decoded.view(layout.outer, layout.groups, layout.inner)
        for run in self._runs(given, layout, buffer.device):
            book = books[run.bits][run.rows]
            if run.bits == 0:
                blocks[run.where] = widen(book, spec.dtype)[None]
                continue
            inside = Layout(1, run.groups, run.outer * layout.inner)
            rows = TensorSpec((run.groups, run.outer, layout.inner), spec.dtype)
            size = packed_bytes(rows.numel, run.bits)
            found = codebook_codes.decode(buffer[at : at + size], book, inside, rows, kernels)
            blocks[run.where] = found.transpose(0, 1)
            at += size
        return decoded

    def for_gradients(self) -> Compressor:
        """Itself with 8 bits, else uniform quantization to 8 bits: gradients have heavier tails."""
        return milder(self, self.bits)

    def _layout(self, spec: TensorSpec) -> Layout:
        book_bytes = wide_dtype(spec.dtype).itemsize << self.bits
        return Layout.of(spec, group_of(self.group, spec, self.bits, book_bytes))

    def _given(self, values: Tensor, layout: Layout, extremes: Tensor, spec: TensorSpec) -> Tensor:
        """The bits of each group: int64 `[groups]` on the CPU; of equals, the first groups come first."""
        least, most = int(self.rounding == "stochastic"), min(MOST_BITS, self.bits + MOST_MORE)
        measured = range(least, min(self.bits + MEASURED_MORE, most) + 1)
        errors = torch.empty(layout.groups, len(measured), dtype=torch.float64, device=values.device)
        for some, ordered in sorted_samples(values, layout, extremes, self._sampled(layout)):
            errors[some] = torch.cat(
                [_error(sample, bits) for sample in [Sample(ordered)] for bits in measured], 1
            )
        gains = [-errors.cpu().diff(dim=1)]
        gains += [gains[0][:, -1:] / 4**more for more in range(1, most - measured[-1] + 1)]
        costs = _costs(layout, spec)
        prices = costs[least : most + 1].diff().double()
        gain = torch.cat(gains, dim=1)
        # As if each bit were worth no more than the one before: so no group gets its second bit first.
        first = (gain / prices).cummin(dim=1).values.t().reshape(-1).argsort(descending=True, stable=True)
        budget = layout.groups * int(costs[self.bits] - costs[least])
        bought = first[prices.repeat_interleave(layout.groups)[first].cumsum(0) <= budget]
        given = least + torch.bincount(bought % layout.groups, minlength=layout.groups)
        gained = float(gain.t().reshape(-1)[bought].sum())
        equal = torch.full_like(given, self.bits)
        return given if gained > float(gain[:, : self.bits - least].sum()) else equal

    def _books(self, values: Tensor, layout: Layout, extremes: Tensor, given: Tensor) -> dict[int, Tensor]:
        """The codebooks of the groups that have so many bits, `[groups, 2**bits]`."""
        books = {}
        for bits, groups in _by_bits(given):
            chosen, found = groups.to(values.device), []
            for some, ordered in sorted_samples(values, layout, extremes, self._sampled(layout), chosen):
                book = codebooks(Sample(ordered), 1 << bits, ITERATIONS)
                if self.rounding == "stochastic":
                    book[:, 0], book[:, -1] = extremes[:, some] + 0.0
                found.append(book.to(wide_dtype(values.dtype)))
            books[bits] = torch.cat(found)
        return books

    def _sampled(self, layout: Layout) -> int:
        return sampled_of_group(self.sample, layout, self.bits)

    def _runs(self, given: Tensor, layout: Layout, device: torch.device) -> Iterator[_Run]:
        """What is encoded at once, in the order of the buffer. The codes do not depend on how much that is."""
        size = AT_ONCE if device.type == "cpu" else 32 * AT_ONCE
        groups_at_once, step = max(1, size // layout.group_size), layout.outer
        if layout.group_size > size:
            step = max(8, size // layout.inner // 8 * 8)  # each run of codes begins with a byte
        if layout.group_size % 8 or self.rounding == "stochastic":
            groups_at_once = 1
        for bits, groups in _by_bits(given):
            for row in range(0, len(groups), groups_at_once):
                some = groups[row : row + groups_at_once]
                where = slice(int(some[0]), int(some[0]) + 1) if len(some) == 1 else some.to(device)
                for start in range(0, layout.outer, step):
                    stop = min(start + step, layout.outer)
                    rows = slice(row, row + len(some))
                    yield _Run(
                        bits, len(some), rows, (slice(start, stop), where), stop - start, start * layout.inner
                    )


@dataclass(frozen=True)
class _Run:
    """Some groups, or a part of one.

    Attributes:
        bits: of these groups.
        groups: their number.
        rows: which they are of those that have so many bits.
        where: the index of the elements in `[outer, groups, inner]`.
        outer: how many of the first dimension they are.
        first: the place of the first element in its group.
    """

    bits: int
    groups: int
    rows: slice
    where: tuple[slice, slice | Tensor]
    outer: int
    first: int


def _error(sample: Sample, bits: int) -> Tensor:
    """About the least squared error of each group with so many bits, less that of zeros: float64 `[groups, 1]`."""
    book = codebooks(sample, 1 << bits, TRIED_ITERATIONS) / sample.scale
    return sample.cost(book) * sample.scale * sample.scale


def _group_bytes(size: int, bits: int, spec: TensorSpec) -> int:
    """Of a group's codes and codebook."""
    return packed_bytes(size, bits) + (wide_dtype(spec.dtype).itemsize << bits)


def _costs(layout: Layout, spec: TensorSpec) -> Tensor:
    """Bytes of a group of each number of bits: int64 `[MOST_BITS + 1]`."""
    return torch.tensor([_group_bytes(layout.group_size, bits, spec) for bits in range(MOST_BITS + 1)])


def _by_bits(given: Tensor) -> list[tuple[int, Tensor]]:
    """The groups of each number of bits that there is, from few bits to many."""
    return [(bits, (given == bits).nonzero().view(-1)) for bits in given.unique().tolist()]


def _write(octets: Tensor, buffer: Tensor, start: int) -> int:
    """Writes bytes and tells where they end."""
    stop = start + octets.numel()
    buffer[start:stop] = octets
    return stop
