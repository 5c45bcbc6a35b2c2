"""Top-k: the elements of largest magnitude and where they are; the others are taken for zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fxsplit.compressors import cpu_kernels, cpu_sparse, sparse
from fxsplit.compressors.base import Compressor
from fxsplit.compressors.floating import check_floating, check_ratio, not_finite, plain
from fxsplit.compressors.kernels import COMPILED_FROM
from fxsplit.compressors.positions import positions_bytes
from fxsplit.spec import TensorSpec


@dataclass(frozen=True)
class TopK(Compressor):
    """The k elements of largest magnitude, bit for bit, and zeros for the others.

    Of elements of equal magnitude those at lower positions are taken first, so that the choice is the same
    on every device. No element is off by more than the least magnitude that was kept.

    Source: Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", 2017, arXiv:1704.05021.

    Args:
        ratio: the share of the elements that is kept, in (0, 1]: k = round(ratio * n), at least 1.

    Wire: the k elements `[k]`, in the order of their positions, in the tensor's dtype; and their positions,
    uint8 `[positions_bytes(k, n)]`: n bits or fewer, 0.525 n bits for a tenth. With `topk+fp16` or
    `topk+uniform8` the elements become smaller still.

    Raises:
        CompressorError: `ratio` is out of range.

    >>> codec = TopK(ratio=0.01)
    >>> [str(spec) for spec in codec.wire(TensorSpec((1000, 1000), torch.float32))]
    ['float32[10000]', 'uint8[10703]']
    """

    name: ClassVar[str] = "topk"

    ratio: float = 0.1

    def __post_init__(self) -> None:
        """Checks the ratio."""
        check_ratio(self, self.ratio)

    def count(self, total: int) -> int:
        """k: how many of `total` elements are kept."""
        return min(total, max(1, round(self.ratio * total)))

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The specs of elements and positions.

        Raises:
            CompressorError: the dtype of `spec` is not a floating point type of 16, 32 or 64 bits.
        """
        check_floating(self, spec)
        count = self.count(spec.numel)
        positions = TensorSpec((positions_bytes(count, spec.numel),), torch.uint8)
        return TensorSpec((count,), spec.dtype), positions

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Elements and positions of `x`, of any shape and strides.

        On an accelerator this waits for the device a few times.

        Raises:
            CompressorError: `x` is not floating point, or holds NaN or infinity.
        """
        check_floating(self, TensorSpec.of(x))
        values = plain(x).view(-1)
        kept, positions = _kernels(x.device, x.numel()).gather_largest(values, self.count(values.numel()))
        # NaN and infinity have the largest magnitudes of all, so that they would be among these.
        if kept.numel() and not bool(torch.stack(torch.aminmax(kept)).isfinite().all()):
            raise not_finite(self, values)
        return kept, positions

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """Zeros with the elements at their positions, a new contiguous tensor of `spec`.

        Raises:
            CompressorError: the payload is not what `wire(spec)` announces.
        """
        self.check_payload(payload, spec)
        kept, packed = payload
        return _kernels(kept.device, spec.numel).scatter(kept, packed, spec.numel).view(spec.shape)


class _Kernels(Protocol):
    """What `sparse` offers."""

    def gather_largest(self, values: Tensor, count: int) -> tuple[Tensor, Tensor]: ...

    def scatter(self, kept: Tensor, packed: Tensor, total: int) -> Tensor: ...


def _kernels(device: torch.device, count: int) -> _Kernels:
    """The fastest that work on a device, for a tensor of so many elements."""
    compiled = device.type == "cpu" and count >= COMPILED_FROM and cpu_kernels.available()
    return cpu_sparse if compiled else sparse
