"""Uniform quantization: one range for a group of elements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fxsplit.compressors.base import Compressor
from fxsplit.compressors.grouping import AUTO, Layout
from fxsplit.compressors.quantization import Quantization
from fxsplit.compressors.ranges import RangeRule


@dataclass(frozen=True)
class Uniform(Quantization):
    """2**bits equally spaced values from the minimum of the tensor, or of each group, to its maximum.

    Args:
        bits: bits an element, 2 to 16.
        group: which elements share a range; "auto" by default, what trained best. See `Quantization`.
        rounding: "nearest" or "stochastic"; see `Quantization`.

    Wire: codes, uint8 `[ceil(n * bits / 8)]`; table `[2, 1]` or `[2, groups, 1]`, minimum and step. The error
    of an element is at most half a step (stochastic: a step).

    Raises:
        CompressorError: an option is not in its range.

    >>> str(Uniform(bits=4, group="channel"))
    'uniform4(group=channel)'
    """

    name: ClassVar[str] = "uniform"

    group: str | int = field(default=AUTO, kw_only=True)

    @property
    def split_bits(self) -> int:
        """No bits choose a bucket: there is one."""
        return 0

    def rule(self, layout: Layout) -> RangeRule:
        """The minimum and the maximum of all values of each group."""
        return RangeRule(1)

    def for_gradients(self) -> Compressor:
        """Itself from 8 bits on, else with 8 bits."""
        return milder(self, self.bits)


def milder(codec: Compressor, bits: int) -> Compressor:
    """What gradients go through where activations go through a quantizer: that from 8 bits on, else `uniform8`."""
    return codec if bits >= 8 else Uniform(8)
