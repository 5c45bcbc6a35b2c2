"""Made tensors of several kinds."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("gaussian", "relu", "heavy")


def made(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A float32 tensor on the CPU, the same for a seed everywhere.

    Args:
        kind: "gaussian", standard normal; "relu", what of it is positive, so that half are zeros; "heavy",
            Student's t with 2.5 degrees of freedom.
        shape: its shape.
        seed: of the generator.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of data: {kind!r}; allowed: {', '.join(KINDS)}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "relu":
        return x.relu_()
    if kind == "heavy":  # normal over the root of a chi-square over its degrees of freedom
        freedom = 2.5
        squares = torch._standard_gamma(torch.full(shape, freedom / 2), generator=generator)
        return x.div_(squares.mul_(2 / freedom).sqrt_())
    return x
