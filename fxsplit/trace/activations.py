"""Which values of a graph are activations: what a lossy compressor may be put on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.fx import Node

from fxsplit.spec import TensorSpec


def is_activation(node: Node) -> bool:
    """Whether the node's value depends on a parameter in a differentiable way.

    Masks, positions and rotary tables do not: an error in them is no small error of an activation, and
    quantizing a mask of minus infinities has no meaning. It is found out by autograd itself while the model is
    recorded.
    """
    return bool(node.meta.get("is_activation", False))


def is_compressible(node: Node) -> bool:
    """Whether a lossy compressor may be put on the node's value: a real floating point activation."""
    spec: TensorSpec | None = node.meta.get("spec")
    return is_activation(node) and spec is not None and spec.is_floating_point


@contextmanager
def all_parameters_differentiable(model: nn.Module) -> Iterator[None]:
    """While active, frozen parameters count too: what depends on them is an activation all the same."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dtype.is_floating_point]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
