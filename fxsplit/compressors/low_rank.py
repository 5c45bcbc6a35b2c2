"""What the low-rank compressors share: matrices, ranks, the two factors and their refusals."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsplit.compressors.base import Compressor
from fxsplit.compressors.floating import (
    check_floating,
    check_ratio,
    largest_magnitude,
    plain,
    wide_dtype,
    widen,
)
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

MATRIX_DIMENSIONS = (2, 3, 4)


@dataclass(frozen=True)
class LowRank(Compressor):
    """Base of the low-rank compressors. A subclass says which basis the matrices are projected on.

    A tensor is a batch of matrices `[B, M, N]`: `[B, C, H, W]` as `[B, C, H * W]`, `[B, T, D]` as it is,
    `[B, D]` as `[1, B, D]`. Each is replaced by its projection on r orthonormal columns, which lie on its
    shorter side, where finding them is cheap; the projection never makes a value larger in norm.

    Wire: the factors `[B, M, r]` and `[B, r, N]` in the tensor's dtype, B * r * (M + N) elements. The product
    is computed in float32 (float64 for float64 tensors). A tensor of zeros decodes to zeros, and matrices of
    rank r or less to themselves but for rounding. An empty tensor is sent with r = 0.

    Exactly one of `rank` and `ratio` is given.

    Args:
        rank: r, at most min(M, N).
        ratio: bytes sent over bytes of the tensor, in (0, 1]: r is the largest rank, from 1 to min(M, N),
            that does not exceed it (rank 1 may).
    """

    rank: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        """Checks rank and ratio."""
        if (self.rank is None) == (self.ratio is None):
            raise CompressorError(
                f"{self.name} needs a rank or a ratio, and not both",
                found=f"rank={self.rank!r}, ratio={self.ratio!r}",
                allowed=f"{self.name}(rank=8) or {self.name}(ratio=0.1)",
            )
        if self.rank is not None:
            self.check_integer("rank", 1)
        if self.ratio is not None:
            check_ratio(self, self.ratio)

    @abstractmethod
    def basis(self, matrices: Tensor, rank: int, unit: float, start: Tensor | None) -> Tensor:
        """The columns to project on.

        Args:
            matrices: `[B, S, L]`, S <= L, float32 or float64, not empty.
            rank: r, 1 to S.
            unit: a power of two; the elements of `matrices * unit` are about 1 and less.
            start: columns `[B, S, r]` that were found for other matrices like these, if there are any.

        Returns:
            `[B, S, r]`, orthonormal columns.
        """

    def takes(self, spec: TensorSpec) -> bool:
        """Whether it is floating point and a matrix or a batch of them."""
        return spec.is_floating_point and len(spec.shape) in MATRIX_DIMENSIONS

    def matrices_of(self, spec: TensorSpec) -> tuple[int, int, int, int]:
        """B, M, N and the rank r for a tensor of this spec.

        Raises:
            CompressorError: it is not floating point, has not 2, 3 or 4 dimensions, or too small ones for the
                rank.
        """
        check_floating(self, spec)
        if not self.takes(spec):
            raise CompressorError(
                f"{self} takes tensors that are matrices or batches of them",
                found=spec,
                allowed="[B, D], [B, T, D] or [B, C, H, W]",
                hint="send this edge with another compressor, or 'none'",
            )
        batch, rows, *columns = spec.shape if len(spec.shape) > 2 else (1, *spec.shape)
        width = math.prod(columns)
        return batch, rows, width, self._rank(rows, width, spec)

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The specs of the two factors.

        Raises:
            CompressorError: this compressor does not take such a tensor; see `matrices_of`.
        """
        batch, rows, width, rank = self.matrices_of(spec)
        return TensorSpec((batch, rows, rank), spec.dtype), TensorSpec((batch, rank, width), spec.dtype)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The factors of `x`, found from nothing but `x`.

        On an accelerator this waits for the device once, to know the largest value.

        Raises:
            CompressorError: `x` is not of a spec that this compressor takes, holds NaN or infinity, or values
                so large that their products would not be finite.
        """
        return self.factorize(x)[0]

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """The product of the factors, a new contiguous tensor of `spec`.

        Raises:
            CompressorError: the payload is not what `wire(spec)` announces.
        """
        self.check_payload(payload, spec)
        left, right = (factor.to(wide_dtype(spec.dtype)) for factor in payload)
        product = torch.bmm(left, right)
        return (product if product.dtype == spec.dtype else widen(product, spec.dtype)).view(spec.shape)

    def factorize(self, x: Tensor, start: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """The factors of `x` and the basis `[B, S, r]` that they were found with, begun with `start`."""
        batch, rows, width, rank = self.matrices_of(TensorSpec.of(x))
        values = plain(x)
        unit = self._unit(values, min(rows, width))
        matrices = values.to(wide_dtype(x.dtype)).view(batch, rows, width)
        tall = rows > width
        matrices = matrices.mT if tall else matrices  # [B, S, L]
        if values.numel():
            basis = self.basis(matrices, rank, unit, start)
        else:
            basis = matrices.new_zeros(batch, min(rows, width), rank)
        # A column of S values has at most sqrt(S) times their magnitude: `lift` keeps the coordinates within
        # the range of a 16-bit dtype, and the basis away from that dtype's lower end.
        lift = 2.0 ** math.ceil(math.log2(max(min(rows, width), 1)) / 2)
        along = basis * lift
        across = torch.bmm(basis.mT, matrices).div_(lift)  # [B, r, L]
        left, right = (across.mT, along.mT) if tall else (along, across)
        return (left.to(x.dtype).contiguous(), right.to(x.dtype).contiguous()), basis

    def _rank(self, rows: int, width: int, spec: TensorSpec) -> int:
        most = min(rows, width)
        if most == 0:
            return 0
        if self.ratio is not None:
            return max(1, min(most, int(self.ratio * rows * width / (rows + width) + 1e-9)))
        assert self.rank is not None
        if self.rank > most:
            raise CompressorError(
                f"the matrices of this edge have no rank {self.rank}",
                where=f"{self} for {spec}, matrices of {rows} x {width}",
                found=f"rank {self.rank}",
                allowed=f"1 to {most}",
                hint=f"a rank below {rows * width / (rows + width):.3g} makes the tensor smaller",
            )
        return self.rank

    def _unit(self, values: Tensor, side: int) -> float:
        """The power of two that brings the values to about 1, as far as it is a normal number."""
        largest, limits = largest_magnitude(self, values), torch.finfo(wide_dtype(values.dtype))
        if largest * side > limits.max:
            raise CompressorError(
                f"the values are too large for the products of {self}",
                found=f"magnitudes up to {largest:g}",
                allowed=f"up to {limits.max / side:g} in matrices whose shorter side is {side}",
                hint="find what made them, or send this edge with the compressor 'none'",
            )
        highest = math.frexp(limits.max)[1] - 2
        return math.ldexp(1.0, max(-highest, min(-math.frexp(largest)[1], highest)))
