"""Memory that two tensors share: what one of them changes in place, the other must not be sending."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_OWN = 2  # the tensor itself, and the storage object through which it is asked


def memory_of(values: Iterable[Any]) -> set[int]:
    """Where the memory of tensors begins; what is no tensor, or has no memory, has none."""
    found = {_address(value) for value in values if isinstance(value, Tensor)}
    return found - {0}


def lies_in(value: Any, memory: set[int] | frozenset[int]) -> bool:
    """Whether a value is a tensor with such memory."""
    return bool(memory) and isinstance(value, Tensor) and _address(value) in memory


def is_shared(value: Any) -> bool:
    """Whether another tensor that is alive has the same memory."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return torch._C._storage_Use_Count(value.untyped_storage()._cdata) > _OWN


def own_copy(value: Any) -> Any:
    """A tensor with the same numbers and memory of its own, without a graph; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
