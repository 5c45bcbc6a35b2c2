"""K-means quantization: the 2**bits values that fit the tensor best, and the nearest of them an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors.base import Compressor, Memory
from fxsplit.compressors.codebooks import codebooks
from fxsplit.compressors.floating import check_floating, not_finite, plain, wide_dtype
from fxsplit.compressors.grouping import Layout, check_group, check_rounding, sample_stride
from fxsplit.compressors.kernels import kernels_for
from fxsplit.compressors.packing import pack, packed_bytes, unpack
from fxsplit.compressors.scheme import seeds
from fxsplit.compressors.torch_kernels import (
    BucketSearch,
    block_size,
    blocks,
    dither_of,
    element_groups,
    sorted_rows,
)
from fxsplit.spec import TensorSpec

MIN_SAMPLE = 64
"""So many elements a value are sampled from each group at least."""


@dataclass(frozen=True)
class KMeans(Compressor):
    """Each element as the nearest value of a codebook that Lloyd's iterations find; see `codebooks`.

    The codebook is found from a sorted sample of the elements, in which each cell is a range: an iteration is
    a binary search for the bounds between the values and a sum over each range, and never compares elements
    with values. `encode_next` begins with the codebook of the last tensor where that fits better.

    The same tensor gives the same codebook and codes wherever it lies.

    Source: Lloyd, "Least squares quantization in PCM", 1957; "k-means" of "Parallelism Pipeline and
    Compression Algorithm".

    Args:
        bits: bits an element, 1 to 8.
        iterations: of Lloyd's, at most; fewer where nothing changes any more.
        sample: about how many elements the codebooks are found from, besides the least and the greatest; of
            each group at least 64 * 2**bits, if it has so many; 0 means all.
        group: which elements share a codebook; see `Quantization`.
        rounding: "nearest" value; or "stochastic", one of the two around the element at random, so that the
            mean of what is received is the element. The least and the greatest value are then those of the
            group. See `Quantization`.

    Wire: codes, uint8 `[ceil(n * bits / 8)]`; codebook `[2**bits]` for group "tensor" and `[groups, 2**bits]`
    for others, ascending, float64 for a float64 tensor and float32 for all others. An element is off by its
    distance to the nearest value; stochastic, to one of the nearest two.

    Raises:
        CompressorError: an argument is not in its range.

    >>> str(KMeans(iterations=5))
    'kmeans4(iterations=5)'
    """

    name: ClassVar[str] = "kmeans"

    bits: int = 4
    iterations: int = 10
    sample: int = 65536
    group: str | int = field(default="tensor", kw_only=True)
    rounding: str = field(default="nearest", kw_only=True)

    def __post_init__(self) -> None:
        """Checks the options."""
        self.check_integer("bits", 1, 8)
        self.check_integer("iterations", 0)
        self.check_integer("sample", 0)
        check_group(self.group, f"{self.name}: group")
        check_rounding(self.rounding, f"{self.name}: rounding")

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The specs of codes and codebook.

        Raises:
            CompressorError: the dtype of `spec` is not a floating point type of 16, 32 or 64 bits, or the tensor
                cannot be divided into blocks of `group` elements.
        """
        check_floating(self, spec)
        groups = () if self.group == "tensor" else (Layout.of(spec, self.group).groups,)
        codes = TensorSpec((packed_bytes(spec.numel, self.bits),), torch.uint8)
        return codes, TensorSpec((*groups, 1 << self.bits), wide_dtype(spec.dtype))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes and codebook of `x`, of any shape and strides, found from nothing but `x`.

        On an accelerator this waits for the device once, to know that the values are finite.

        Raises:
            CompressorError: `x` is not floating point, holds NaN or infinity, or cannot be divided into blocks
                of `group` elements.
        """
        return self._encode(x, None)

    def encode_next(self, x: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        """Codes and codebook of `x`, begun with the memory's codebook if that fits; it is then this one."""
        payload = self._encode(x, memory.get("codebook"))
        if x.numel():
            memory["codebook"] = payload[1]
        return payload

    def memory_bytes(self, spec: TensorSpec) -> tuple[int, int]:
        """The sender keeps the codebook, the receiver nothing."""
        return self.wire(spec)[1].nbytes, 0

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """The values that the codes stand for, a new contiguous tensor of `spec`.

        Raises:
            CompressorError: the payload is not what `wire(spec)` announces.
        """
        self.check_payload(payload, spec)
        packed, codebook = payload
        limits, layout = torch.finfo(spec.dtype), Layout.of(spec, self.group)
        values = codebook.clamp(limits.min, limits.max).to(spec.dtype)
        index = unpack(packed, self.bits, spec.numel).to(torch.int32)
        if layout.groups > 1:
            first = torch.arange(0, values.numel(), values.shape[-1], dtype=torch.int32, device=index.device)
            index.view(layout.outer, layout.groups, layout.inner).add_(first.view(1, -1, 1))
        return torch.index_select(values.view(-1), 0, index).view(spec.shape)

    def _encode(self, x: Tensor, start: Tensor | None) -> tuple[Tensor, ...]:
        codes_spec, table_spec = self.wire(TensorSpec.of(x))
        values = plain(x).view(-1)
        if values.numel() == 0:
            return tuple(torch.zeros(s.shape, dtype=s.dtype, device=x.device) for s in (codes_spec, table_spec))
        layout = Layout.of(TensorSpec.of(x), self.group)
        extremes = kernels_for(values.device, values.numel()).extremes(values, layout)
        if not bool(extremes.isfinite().all()):
            raise not_finite(self, values)
        wanted = self.sample and max(self.sample // layout.groups, MIN_SAMPLE << self.bits)
        sample = layout.sample(values, sample_stride(layout.group_size, wanted)).double()
        ordered = sorted_rows(torch.cat((sample, extremes.t()), dim=1)) + 0.0
        fits = start is not None and start.shape == table_spec.shape
        start = start.to(x.device).double().view(layout.groups, -1) if start is not None and fits else None
        book = codebooks(ordered, 1 << self.bits, self.iterations, start)
        if self.rounding == "stochastic":
            book[:, 0], book[:, -1] = extremes + 0.0
        book = book.to(table_spec.dtype)
        return self._codes(values, book, layout), book.view(table_spec.shape)

    def _codes(self, values: Tensor, codebook: Tensor, layout: Layout) -> Tensor:
        """The packed codes of flat values, by codebooks [groups, 2**bits]."""
        count, device = values.numel(), values.device
        packed = values.new_empty(packed_bytes(count, self.bits), dtype=torch.uint8)
        size = min(block_size(device), count)
        wide, stochastic = codebook.double(), self.rounding == "stochastic"
        # Of an element, the last value up to it; or the last value whose cell begins up to it.
        bounds = wide if stochastic else torch.cat((wide[:, :1], wide[:, :-1] / 2 + wide[:, 1:] / 2), dim=1)
        search = BucketSearch(bounds, codebook.dtype, size)
        seed = seeds(codebook.view(layout.groups, 2, -1).transpose(0, 1)) if stochastic else None
        for start, length in blocks(count, size):
            block = values[start : start + length]
            group = element_groups(start, length, layout, device)
            codes = search(block, group)
            if seed is not None:
                rows = wide if group is None else wide[group]
                codes = _rounded(block.double(), codes, rows, dither_of(start, length, seed, group))
            first = start * self.bits // 8
            packed[first : first + packed_bytes(length, self.bits)] = pack(codes, self.bits)
        return packed


def _rounded(values: Tensor, lower: Tensor, codebook: Tensor, dither: Tensor) -> Tensor:
    """The codes `lower` int32 [n] or the next ones, with the chance that keeps the mean."""
    last = codebook.shape[1] - 1
    index = torch.stack((lower, (lower + 1).clamp_(max=last))).long()
    if len(codebook) == 1:
        below, above = codebook[0][index]
    else:
        below, above = codebook.gather(1, index.t()).t()
    span = above - below
    share = torch.where(span > 0, (values - below) / torch.where(span > 0, span, 1.0), 0.0)
    return lower + share.add_(dither).floor_().to(torch.int32)
