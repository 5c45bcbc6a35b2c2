"""Power iteration: low-rank factors from a few products with the matrices and a QR decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors.base import Memory
from fxsplit.compressors.floating import wide_dtype
from fxsplit.compressors.low_rank import LowRank
from fxsplit.spec import TensorSpec

JITTER = 1e-13
"""What is added to the diagonal before Cholesky's decomposition, in shares of the trace."""

SHAKE = 0.01
"""How much of the random numbers is added to the last basis: what is orthogonal to it would never be found."""


@dataclass(frozen=True)
class PowerIteration(LowRank):
    """Low-rank factors by power iteration, begun where the last tensor's ended.

    One iteration multiplies the basis P `[B, S, r]` by the matrices X `[B, S, L]` and their transposes and
    makes it orthonormal again, P = QR(X (X^T P)); each brings P nearer to the span of the r largest singular
    vectors. With `encode_next` the memory keeps P; with `encode`, and for the first tensor, P begins at
    fixed random numbers, equal on every device.

    What is kept is the basis of the shorter side, the channels of an image or the tokens of a text: it is
    alike from one sample to the next. (PowerSGD keeps the longer side's factor, which fits parameters: there
    the next matrix is nearly the same. From one batch of images to the next it is worth nothing.)

    Results on a CPU and on an accelerator agree up to rounding where the r-th singular value is larger than
    the next; the columns of a basis may differ more than its span.

    Source: "Power iteration 3d" of "Parallelism Pipeline and Compression Algorithm"; Vogels et al.,
    "PowerSGD", 2019, arXiv:1905.13727.

    Args:
        rank: the rank, or None.
        ratio: the share of the bytes that may be sent, or None; see `LowRank`.
        iterations: with a basis from the last tensor.
        cold_iterations: without one.

    Raises:
        CompressorError: not exactly one of `rank` and `ratio` is given, or an argument is out of range.

    >>> codec = PowerIteration(rank=3)
    >>> [str(spec) for spec in codec.wire(TensorSpec((64, 32, 112, 112), torch.float32))]
    ['float32[64, 32, 3]', 'float32[64, 3, 12544]']
    """

    name: ClassVar[str] = "poweriter"

    iterations: int = 1
    cold_iterations: int = 2

    def __post_init__(self) -> None:
        """Checks rank, ratio and the numbers of iterations."""
        super().__post_init__()
        self.check_integer("iterations", 1)
        self.check_integer("cold_iterations", 1)

    def encode_next(self, x: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        """The factors of `x`, begun with the memory's basis, which is then that of `x`.

        A batch of another size takes the basis of each sample in turn; another side or rank begins anew. The
        memory of an empty tensor stays as it was.
        """
        payload, basis = self.factorize(x, memory.get("basis"))
        if basis.numel():
            memory["basis"] = basis.contiguous()
        return payload

    def memory_bytes(self, spec: TensorSpec) -> tuple[int, int]:
        """The sender keeps a basis `[B, S, r]` in float32 (float64 for float64 tensors); the receiver nothing."""
        batch, rows, width, rank = self.matrices_of(spec)
        return batch * min(rows, width) * rank * wide_dtype(spec.dtype).itemsize, 0

    def basis(self, matrices: Tensor, rank: int, unit: float, start: Tensor | None) -> Tensor:
        """Power iteration from `start`, or from random numbers if it does not fit."""
        batch, side, _ = matrices.shape
        numbers = torch.randn(side, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        basis: Tensor = (numbers / side**0.5).to(matrices).expand(batch, -1, -1)  # columns of length about 1
        count = self.cold_iterations
        if start is not None and start.shape[1:] == (side, rank):
            last = start.to(matrices)
            if len(last) != batch:
                last = last[torch.arange(batch, device=last.device) % len(last)]
            basis, count = last + SHAKE * basis, self.iterations
        for _ in range(count):
            # Of size one before each product: very small values would vanish in it and very large overflow.
            across = torch.bmm(matrices.mT, basis * unit).mul_(unit)  # [B, L, r]
            basis = orthonormal(torch.bmm(matrices, across))
        return basis


def orthonormal(columns: Tensor) -> Tensor:
    """The factor Q of a QR decomposition of `columns` [B, S, r], by Cholesky's of their products, twice.

    It is made of batched products of small matrices, which on an accelerator take a fifth of the time of a
    batched Householder decomposition. Where columns depend on each other a little is added to the diagonal:
    a column may then come out shorter than 1, and columns of zeros stay zeros. In every case Q Q^T is
    between 0 and 1, so that a projection with it makes nothing larger and never divides by zero.
    """
    wide = columns.double()
    for _ in range(2):  # the first leaves an error that grows with the square of the condition
        gram = torch.bmm(wide.mT, wide)  # [B, r, r]
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += JITTER * diagonal.sum(-1, keepdim=True) + torch.finfo(torch.float64).tiny
        lower = torch.linalg.cholesky_ex(gram).L
        wide = torch.linalg.solve_triangular(lower.mT, wide, upper=True, left=False)
    return wide.to(columns.dtype)
