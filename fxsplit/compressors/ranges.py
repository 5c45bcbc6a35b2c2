"""Which ranges a quantizer wants of each group, said before there is data, and what finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.scheme import make_table

Extremes = Callable[[Tensor, Layout], Tensor]
"""The least and the greatest value of each group of flat values: float64 `[2, groups]`."""

OrderStatistics = Callable[[Tensor, Layout, Sequence[int]], Tensor]
"""The values of the given ranks, ascending, in each group of flat values: float64 `[groups, ranks]`."""


@dataclass(frozen=True)
class RangeRule:
    """How the ranges of a group follow from its values.

    The sorted values, or every `stride`-th of them in logical order, sorted, are divided into chunks as
    `torch.chunk` does: ceil(n / buckets) values each and the last fewer, so there can be fewer chunks than
    buckets; the ranges of the buckets left over are the greatest value alone.

    Attributes:
        buckets: ranges of a group.
        stride: distance of the values that are looked at.
        touching: whether a range reaches to the first value of the next chunk, and the first and the last range
            to the extremes of all values; else each range is that of its chunk, and `stride` is 1.

    With one bucket that is the least and the greatest value, either way.
    """

    buckets: int
    stride: int = 1
    touching: bool = True

    def ranks(self, count: int) -> list[int]:
        """The ranks in a group's `count` sorted values: the first and the last of each chunk."""
        last, size = count - 1, -(-count // self.buckets)
        starts = range(0, size * self.buckets, size)
        return [rank for start in starts for rank in (min(start, last), min(start + size - 1, last))]

    def ranges(
        self, values: Tensor, layout: Layout, extremes: Extremes, order_statistics: OrderStatistics
    ) -> tuple[Tensor, Tensor]:
        """Minima and maxima of the ranges: float64 `[groups, buckets]` each, ascending in a group.

        The first minimum is the group's least value and its greatest lies in the last range, NaN and infinity
        included.

        Args:
            values: flat, not empty.
            layout: their groups.
            extremes: what finds these on the device of the values.
            order_statistics: the same.
        """
        if self.touching:
            low, high = extremes(values, layout)[..., None]
            if self.buckets == 1:
                return low, high
        if self.stride > 1:
            values = layout.sample(values, self.stride)
            layout, values = Layout(1, *values.shape), values.reshape(-1)
        ranks = self.ranks(layout.group_size)
        found = order_statistics(values, layout, ranks).view(layout.groups, self.buckets, 2)
        if not self.touching:
            return found[..., 0], found[..., 1]
        minima = torch.cat((low, found[:, 1:, 0]), dim=1)
        return minima, torch.cat((minima[:, 1:], high), dim=1)


@dataclass(frozen=True)
class Ranges:
    """The ranges of a tensor as sender and receiver use them; see `scheme.make_table`.

    Attributes:
        table: `[2, groups, buckets]`, minima and steps, in the dtype that is sent.
        minima: float64 `[groups, buckets]`.
        inverse: the same.
        are_finite: whether all of the table is finite, to be asked once; it may wait for the device, but for the
            table alone.
    """

    table: Tensor
    minima: Tensor
    inverse: Tensor
    are_finite: Callable[[], bool]


def found_ranges(
    values: Tensor,
    layout: Layout,
    rule: RangeRule,
    levels: int,
    dtype: torch.dtype,
    extremes: Extremes,
    order_statistics: OrderStatistics,
) -> Ranges:
    """The ranges that a rule asks for, by plain torch and what finds values on the device.

    Args:
        values: flat, not empty.
        layout: their groups.
        rule: which ranges.
        levels: steps from a minimum to its maximum.
        dtype: of the table.
        extremes: see `RangeRule.ranges`.
        order_statistics: the same.
    """
    minima, maxima = rule.ranges(values, layout, extremes, order_statistics)
    table, minima, inverse = make_table(minima, maxima, levels, dtype)
    return Ranges(table, minima, inverse, lambda: bool(table.isfinite().all()))
