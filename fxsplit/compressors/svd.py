"""Truncated singular value decomposition: the best factors of a given rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors.low_rank import LowRank

PARTS, LEAST = 64, 1 << 17
"""So many parts of the batch, of so many elements at least, are multiplied in float64 one after the other."""


@dataclass(frozen=True)
class SVD(LowRank):
    """Low-rank factors with the least error that a rank allows, in the Frobenius and the spectral norm.

    The basis are the first r singular vectors of the shorter side, as eigenvectors of X X^T `[B, S, S]` in
    float64: far cheaper than a decomposition of X, and as exact for what is sent: the squared error exceeds
    the least possible by at most about 1e-15 of the tensor's squared norm, before the factors are rounded.
    The time grows with S**3; where the shorter side is beyond some hundreds, `poweriter` is much faster.

    Results on a CPU and on an accelerator agree up to rounding where the r-th singular value is larger than
    the next.

    Source: "SVD" and "PCA" of "Parallelism Pipeline and Compression Algorithm"; Eckart and Young, "The
    approximation of one matrix by another of lower rank", 1936.

    Args:
        rank: the rank, or None.
        ratio: the share of the bytes that may be sent, or None; see `LowRank`.

    Raises:
        CompressorError: not exactly one of them is given, or it is out of range.

    >>> str(SVD(rank=14))
    'svd(rank=14)'
    """

    name: ClassVar[str] = "svd"

    def basis(self, matrices: Tensor, rank: int, unit: float, start: Tensor | None) -> Tensor:
        """Eigenvectors of the largest eigenvalues, largest first."""
        batch, side, length = matrices.shape
        products = matrices.new_empty((batch, side, side), dtype=torch.float64)
        at_once = max(1, batch // PARTS, LEAST // max(side * length, 1))
        for first in range(0, batch, at_once):
            wide = matrices[first : first + at_once].to(torch.float64, copy=True).mul_(unit)
            torch.bmm(wide, wide.mT, out=products[first : first + at_once])
        vectors: Tensor = torch.linalg.eigh(products).eigenvectors  # [B, S, S], ascending
        return vectors[..., -rank:].flip(-1).to(matrices.dtype)
