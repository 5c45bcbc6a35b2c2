"""What the quantizers have in common as options: which elements of a tensor share ranges, and the rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

GROUPS = ("tensor", "sample", "channel")
"""The groups that have a name; an integer stands for blocks of so many consecutive elements."""

MIN_BLOCK = 8
"""The shortest block."""

ROUNDINGS = ("nearest", "stochastic")
"""The ways to round."""


@dataclass(frozen=True)
class Layout:
    """Where the elements of each group are: element i, in logical order, is in group (i // inner) % groups.

    >>> import torch
    >>> Layout.of(TensorSpec((2, 3, 5, 7), torch.float32), "channel")
    Layout(outer=2, groups=3, inner=35)
    """

    outer: int
    groups: int
    inner: int

    @classmethod
    def of(cls, spec: TensorSpec, group: str | int) -> Layout:
        """The layout of a tensor under the option `group`.

        Raises:
            CompressorError: the tensor cannot be divided into blocks of that length.
        """
        shape, count = spec.shape, spec.numel
        if isinstance(group, int):
            if count % group:
                raise CompressorError(
                    f"{spec} cannot be divided into blocks of {group} elements",
                    found=f"{count} elements",
                    allowed=f"a multiple of {group}",
                    hint="choose a block that divides the size of every tensor that is sent, or group=channel",
                )
            return cls(1, count // group, group)
        if group == "sample" and shape:
            return cls(1, shape[0], math.prod(shape[1:]))
        if group == "channel" and len(shape) >= 2:
            dimension = 2 if len(shape) == 3 else 1
            return cls(math.prod(shape[:dimension]), shape[dimension], math.prod(shape[dimension + 1 :]))
        return cls(1, 1, count)

    @property
    def group_size(self) -> int:
        """Elements of one group."""
        return self.outer * self.inner

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.outer * self.groups * self.inner

    def rows(self, values: Tensor) -> Tensor:
        """A view of flat values as `[groups, outer, inner]`: one group after the other."""
        return values.view(self.outer, self.groups, self.inner).transpose(0, 1)

    def sample(self, values: Tensor, stride: int) -> Tensor:
        """Every `stride`-th element of each group of flat values: `[groups, ceil(group_size / stride)]`."""
        if self.groups == 1:
            return values[::stride].view(1, -1)
        chosen = torch.arange(0, self.group_size, stride, device=values.device)
        outer, inner = chosen // self.inner, chosen % self.inner
        groups = torch.arange(self.groups, device=values.device)[:, None]
        return values[(outer * self.groups + groups) * self.inner + inner]


def sample_stride(count: int, sample: int) -> int:
    """Distance of about `sample` elements out of `count`; 0 means all of them.

    It is prime to `count`, or the sample would see a few columns only: activations have sizes rich in small
    factors, and 16384 of 16 x 32 x 112 x 112 elements are 392 apart, which would take columns 0 and 56 of
    every image and no other.

    >>> sample_stride(1000, 100)
    11
    """
    stride = -(-count // sample) if sample else 1
    while stride > 1 and math.gcd(stride, count) != 1:
        stride += 1
    return stride


def check_group(group: str | int, where: str) -> None:
    """Refuses what is neither a name in `GROUPS` nor an integer of at least `MIN_BLOCK`.

    Raises:
        CompressorError: it is something else.
    """
    if (type(group) is int and group >= MIN_BLOCK) or (isinstance(group, str) and group in GROUPS):
        return
    raise CompressorError(
        "wrong argument",
        where=where,
        found=repr(group),
        allowed=f"{', '.join(GROUPS)}, or an integer of at least {MIN_BLOCK}",
    )


def check_rounding(rounding: str, where: str) -> None:
    """Refuses what is not in `ROUNDINGS`.

    Raises:
        CompressorError: it is something else.
    """
    if rounding not in ROUNDINGS:
        raise CompressorError("wrong argument", where=where, found=repr(rounding), allowed=", ".join(ROUNDINGS))
