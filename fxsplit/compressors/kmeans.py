"""K-means quantization: the 2**bits values that fit the tensor best, and the nearest of them an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors import codebook_codes
from fxsplit.compressors.base import Compressor, Memory
from fxsplit.compressors.codebooks import Sample, codebooks, sampled_of_group, sorted_samples
from fxsplit.compressors.floating import check_floating, plain, wide_dtype
from fxsplit.compressors.grouping import AUTO, Layout, check_group, check_rounding, group_of
from fxsplit.compressors.kernels import finite_extremes, kernels_for
from fxsplit.compressors.packing import packed_bytes
from fxsplit.compressors.uniform import milder
from fxsplit.spec import TensorSpec


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
        group: which elements share a codebook; "auto" by default, what trained best. See `Quantization`.
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
    group: str | int = field(default=AUTO, kw_only=True)
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
        group = self.group_for(spec)
        groups = () if group == "tensor" else (Layout.of(spec, group).groups,)
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
        layout = Layout.of(spec, self.group_for(spec))
        book = codebook.view(layout.groups, 1 << self.bits)
        return codebook_codes.decode(packed, book, layout, spec, kernels_for(packed.device, spec.numel))

    def for_gradients(self) -> Compressor:
        """Itself with 8 bits, else uniform quantization to 8 bits: gradients have heavier tails."""
        return milder(self, self.bits)

    def group_for(self, spec: TensorSpec) -> str | int:
        """The groups of a tensor of this spec: `group`, with "auto" decided."""
        return group_of(self.group, spec, self.bits, wide_dtype(spec.dtype).itemsize << self.bits)

    def _encode(self, x: Tensor, start: Tensor | None) -> tuple[Tensor, ...]:
        codes_spec, table_spec = self.wire(TensorSpec.of(x))
        values = plain(x).view(-1)
        if values.numel() == 0:
            return tuple(torch.zeros(s.shape, dtype=s.dtype, device=x.device) for s in (codes_spec, table_spec))
        layout = Layout.of(TensorSpec.of(x), self.group_for(TensorSpec.of(x)))
        kernels, stochastic = kernels_for(values.device, values.numel()), self.rounding == "stochastic"
        extremes = finite_extremes(self, values, layout)
        book = torch.empty(layout.groups, 1 << self.bits, dtype=table_spec.dtype, device=x.device)
        fits = start is not None and start.shape == table_spec.shape
        start = start.to(x.device).double().view(book.shape) if start is not None and fits else None
        wanted = sampled_of_group(self.sample, layout, self.bits)
        for groups, ordered in sorted_samples(values, layout, extremes, wanted):
            begun = start if start is None else start[groups]
            book[groups] = codebooks(Sample(ordered), 1 << self.bits, self.iterations, begun).to(book.dtype)
        if stochastic:
            book[:, 0], book[:, -1] = extremes + 0.0
            codes = codebook_codes.encode_at_random(values, book, layout)
        else:
            codes = codebook_codes.encode(values, book, layout, kernels)
        return codes, book.view(table_spec.shape)
