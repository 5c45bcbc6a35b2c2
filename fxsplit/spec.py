"""Tensor specifications: what is known of a tensor before it exists."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor.

    >>> TensorSpec((2, 3), torch.float32).nbytes
    24
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of an existing tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a dense tensor of this spec."""
        return self.numel * self.dtype.itemsize

    @property
    def is_floating_point(self) -> bool:
        """Whether the dtype is a real floating point type."""
        return self.dtype.is_floating_point

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


def total_bytes(specs: tuple[TensorSpec, ...]) -> int:
    """Bytes of several tensors together."""
    return sum(spec.nbytes for spec in specs)
