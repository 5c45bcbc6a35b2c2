"""Activations that work in place and save nothing by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import nn

_COPIED = (nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Threshold)
"""Their backward needs what came in, so that autograd copies it before it is changed."""


@contextmanager
def out_of_place(module: nn.Module) -> Iterator[None]:
    """Within, activations of a module make a tensor of their own where autograd would copy what they change.

    The numbers are the same and the memory, too; a reading and a writing of it are saved. It is done where nobody
    else can see what was changed: right behind a layer of torch's in an `nn.Sequential`.
    """
    found: list[Any] = [
        after
        for sequence in module.modules()
        if isinstance(sequence, nn.Sequential) and type(sequence).forward is nn.Sequential.forward
        for before, after in pairwise(sequence)
        if type(after) in _COPIED and after.inplace and _makes_a_tensor(before)
    ]
    for activation in found:
        activation.inplace = False
    try:
        yield
    finally:
        for activation in found:
            activation.inplace = True


def _makes_a_tensor(layer: nn.Module) -> bool:
    kinds = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.Linear
    return isinstance(layer, kinds) and type(layer).__module__.startswith("torch.nn.")
