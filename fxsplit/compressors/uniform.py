"""Uniform quantization: one range for a group of elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.quantization import Quantization
from fxsplit.compressors.ranges import RangeRule


@dataclass(frozen=True)
class Uniform(Quantization):
    """2**bits equally spaced values from the minimum of the tensor, or of each group, to its maximum.

    Args:
        bits: bits an element, 2 to 16.
        group: which elements share a range; see `Quantization`.
        rounding: "nearest" or "stochastic"; see `Quantization`.

    Wire: codes, uint8 `[ceil(n * bits / 8)]`; table `[2, 1]` or `[2, groups, 1]`, minimum and step. The error
    of an element is at most half a step (stochastic: a step).

    Raises:
        CompressorError: an option is not in its range.

    >>> str(Uniform(bits=4, group="channel"))
    'uniform4(group=channel)'
    """

    name: ClassVar[str] = "uniform"

    @property
    def split_bits(self) -> int:
        """No bits choose a bucket: there is one."""
        return 0

    def rule(self, layout: Layout) -> RangeRule:
        """The minimum and the maximum of all values of each group."""
        return RangeRule(1)
