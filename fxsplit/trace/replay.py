"""Functions that traced graphs call. They live at module level so that a shipped stage finds them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def call_without_grad(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function under `torch.no_grad`: the model did so itself where this was recorded."""
    with torch.no_grad():
        return function(*args, **kwargs)


def apply_autograd_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Calls a user's own autograd function."""
    return function.apply(*args)


def call_method(name: str, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a method by name, for methods recorded inside another call."""
    return getattr(tensor, name)(*args, **kwargs)


def make_mapping(kind: type[dict[str, Any]], keys: tuple[str, ...], *values: Any) -> Any:
    """Rebuilds an ordered dictionary or a `ModelOutput` that the model passes as an argument."""
    return kind(**dict(zip(keys, values, strict=True)))
