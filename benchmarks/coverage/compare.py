"""Comparing what a pipeline returns with what the model itself returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CACHES = ("past_key_values", "cache_params", "state", "mems")
"""Output entries that hold a cache of keys and values or of states: off in a pipelined forward."""

GRADIENT_TOLERANCE = 1e-6
DOUBLE_TOLERANCE = 1e-9


class Mismatch(Exception):
    """The pipeline's numbers, keys or structure are not the model's."""


def without_caches(model: nn.Module) -> nn.Module:
    """The same model with `use_cache` off in every configuration in it."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
    return model


def tensors_of(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output with its place, caches left out."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in CACHES:
                yield from tensors_of(item, f"{path}.{key}")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name), f"{path}.{field.name}")


def require_same_outputs(found: Any, expected: Any) -> None:
    """Every tensor equal bit for bit, in the same place.

    Raises:
        Mismatch: otherwise.
    """
    ours, theirs = dict(tensors_of(found)), dict(tensors_of(expected))
    if list(ours) != list(theirs):
        raise Mismatch(f"outputs {', '.join(ours)} instead of {', '.join(theirs)}")
    for place, tensor in theirs.items():
        _require_equal(place, ours[place], tensor)


def require_same_state(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Every entry of a state_dict equal bit for bit, under the same keys in the same order.

    Raises:
        Mismatch: otherwise.
    """
    require_same_keys(found, expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            _require_equal(name, found[name], value)


def require_same_keys(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The same keys in the same order.

    Raises:
        Mismatch: otherwise.
    """
    if list(found) != list(expected):
        missing, extra = [k for k in expected if k not in found], [k for k in found if k not in expected]
        raise Mismatch(f"keys missing: {missing[:3]}, extra: {extra[:3]}, or in another order")


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """How much gradients differ, relative to the largest entry of each, or to 1 if that is less.

    Gradients that are zero but for rounding, such as those of the biases of attention's keys, have no scale of
    their own.

    Raises:
        Mismatch: they are of other parameters.
    """
    if found.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise Mismatch(f"gradients missing: {missing[:3]}, extra: {extra[:3]}")
    largest = 0.0
    for name, gradient in expected.items():
        difference = (found[name] - gradient).abs()
        difference[found[name].isnan() & gradient.isnan()] = 0.0
        relative = (difference.max() / max(gradient.nan_to_num(0.0).abs().max().item(), 1.0)).item()
        if relative != relative:
            raise Mismatch(f"the gradient of {name} is not a number on one side")
        largest = max(largest, relative)
    return largest


def require_same_structure(found: Any, expected: Any, path: str = "output") -> None:
    """The same types and keys all the way down, caches left out.

    Raises:
        Mismatch: otherwise.
    """
    if type(found) is not type(expected):
        raise Mismatch(f"{path} is a {type(found).__name__} instead of a {type(expected).__name__}")
    if isinstance(expected, Mapping):
        ours, theirs = ([key for key in v if key not in CACHES] for v in (found, expected))
        if ours != theirs:
            raise Mismatch(f"{path} has the keys {ours} instead of {theirs}")
        for key in theirs:
            require_same_structure(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, tuple | list):
        if len(found) != len(expected):
            raise Mismatch(f"{path} has {len(found)} items instead of {len(expected)}")
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            require_same_structure(one, other, f"{path}[{index}]")


def loss_of(output: Any) -> Tensor:
    """A scalar in which every entry of every differentiable output has a weight of its own."""
    total = torch.zeros(())
    for _, tensor in tensors_of(output):
        if tensor.is_floating_point() and tensor.requires_grad:
            weights = torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            total = total + (tensor * weights).sum()
    return total


def _require_equal(place: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        ours, theirs = (f"{t.dtype}{list(t.shape)}" for t in (found, expected))
        raise Mismatch(f"{place} is {ours} instead of {theirs}")
    if not torch.allclose(found, expected, rtol=0.0, atol=0.0, equal_nan=True):
        difference = (found.double() - expected.double()).abs().max().item()
        raise Mismatch(f"{place} differs by {difference:.3g}")
