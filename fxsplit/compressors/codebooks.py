"""Codebooks of the least squared error: Lloyd's iterations on sorted samples, of many groups at a time.

All sums are of integers and every other operation is rounded on its own, so that the same sample gives the
same codebook on every device, bit for bit, and no device is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxsplit.compressors.grouping import Layout, sample_stride
from fxsplit.compressors.torch_kernels import sorted_rows

EDGES = 1025
"""At most so many quantiles of a sample tell the density from which the iterations begin."""

SAMPLED_AT_ONCE = 1 << 15
"""Elements of all the samples that a CPU looks at together; an accelerator 128 times as many."""

MIN_SAMPLE = 64
"""So many elements a value are sampled from each group at least."""


class Sample:
    """Sorted numbers of several groups, scaled to magnitudes of at most 1, with exact sums of their ranges.

    Attributes:
        ordered: float64 `[groups, n]`, finite, ascending in a group, as given.
        scaled: the same, divided by `scale`.
        scale: float64 `[groups, 1]`, the largest magnitude of each group; 1 where that is 0.
    """

    def __init__(self, ordered: Tensor) -> None:
        largest = torch.maximum(ordered[:, -1:], -ordered[:, :1])
        self.ordered = ordered
        self.scale = torch.where(largest > 0, largest, 1.0)
        self.scaled = ordered / self.scale
        self._digits = 62 - ordered.shape[1].bit_length()
        self._sums = _sums_up_to((self.scaled * 2.0**self._digits).round_().to(torch.int64))
        coarse = (self.scaled * 2.0 ** (self._digits // 2)).round_().to(torch.int64)
        self._coarse_sums = _sums_up_to(coarse)
        self._squares = _sums_up_to(coarse.square_())

    def cells(self, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cell of each value of a scaled codebook `[groups, k]`: the numbers that it is the nearest value of.

        Returns:
            Where each begins and ends in its row, int64 `[groups, k]`; and the sum of its numbers, float64.
        """
        bounds = codebook[:, :-1] / 2 + codebook[:, 1:] / 2
        inner = torch.searchsorted(self.scaled, bounds.contiguous(), right=True)
        starts = torch.nn.functional.pad(inner, (1, 0))
        ends = torch.nn.functional.pad(inner, (0, 1), value=self.scaled.shape[1])
        sums = (self._sums.gather(1, ends) - self._sums.gather(1, starts)).double() * 2.0**-self._digits
        return starts, ends, sums

    def errors(self, starts: Tensor, ends: Tensor) -> Tensor:
        """The squared error of each cell around its mean, in some unit, float64; 0 if it is empty or small."""
        sums = (self._coarse_sums.gather(1, ends) - self._coarse_sums.gather(1, starts)).double()
        squares = (self._squares.gather(1, ends) - self._squares.gather(1, starts)).double()
        sizes = (ends - starts).clamp(min=1).double()
        return (squares - sums * sums / sizes).clamp_(min=0)

    def cost(self, codebook: Tensor) -> Tensor:
        """The squared error of a scaled codebook less that of zero: float64 `[groups, 1]`."""
        starts, ends, sums = self.cells(codebook)
        parts = codebook * ((ends - starts).double() * codebook - 2 * sums)
        while parts.shape[1] > 1:  # in an order of its own, or devices would add in different ones
            half = parts.shape[1] // 2
            parts = parts[:, :half] + parts[:, half:]
        return parts


def _sums_up_to(numbers: Tensor) -> Tensor:
    """Of each row `[groups, n]`, the sums of its first 0, 1, ... n numbers."""
    sums = numbers.new_zeros(numbers.shape[0], numbers.shape[1] + 1)
    torch.cumsum(numbers, 1, out=sums[:, 1:])
    return sums


def sampled_of_group(sample: int, layout: Layout, bits: int) -> int:
    """How many elements of each group make the sample of a tensor: `MIN_SAMPLE` a value at least; 0 means all."""
    return sample and max(sample // layout.groups, MIN_SAMPLE << bits)


def sorted_samples(
    values: Tensor, layout: Layout, extremes: Tensor, wanted: int, groups: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sorted samples of some groups at a time, so that there are never many of them in memory.

    Args:
        values: flat, not empty.
        layout: their groups.
        extremes: float64 `[2, groups]`; each sample has those of its group, too.
        wanted: about how many elements of each group; 0 means all.
        groups: int64, the groups to sample; None: all.

    Yields:
        Groups, int64 `[n]`, and samples, float64 `[n, elements]`, ascending.
    """
    device, stride = values.device, sample_stride(layout.group_size, wanted)
    chosen = torch.arange(layout.groups, device=device) if groups is None else groups
    most = SAMPLED_AT_ONCE if device.type == "cpu" else 128 * SAMPLED_AT_ONCE
    for some in chosen.split(max(1, most * stride // layout.group_size)):
        sample = layout.sample(values, stride, some).double()
        yield some, sorted_rows(torch.cat((sample, extremes[:, some].t()), dim=1)) + 0.0


def codebooks(sample: Sample, count: int, iterations: int, start: Tensor | None = None) -> Tensor:
    """The values that fit each group best, as far as so many of Lloyd's iterations find them.

    They begin at a density of values that is the cube root of that of the numbers, the optimum for many values
    (Panter and Dite, 1951), or at `start`, where that fits better. Values whose cell is empty move to the
    cells with the largest squared error.

    Source: Lloyd, "Least squares quantization in PCM", 1957.

    Args:
        sample: of the groups.
        count: how many values, a power of two.
        iterations: at most; fewer where nothing changes any more.
        start: float64 `[groups, count]`, ascending.

    Returns:
        float64 `[groups, count]`, ascending, on the device of the sample. Numbers that are alone in their
        cells, or have it with their equals, are values themselves.
    """
    codebook = _dense_values(sample.scaled, count)
    if start is not None:
        last = (start / sample.scale).clamp(sample.scaled[:, :1], sample.scaled[:, -1:])
        codebook = torch.where(sample.cost(last) < sample.cost(codebook), last, codebook)
    for _ in range(iterations):
        moved = _moved(sample, codebook)
        if moved.device.type == "cpu" and torch.equal(moved, codebook):
            break
        codebook = moved
    starts, ends, _ = sample.cells(codebook)
    low, high = _at(sample.ordered, starts), _at(sample.ordered, ends - 1)
    unscaled = codebook * sample.scale
    return torch.where(ends > starts, torch.minimum(torch.maximum(unscaled, low), high), unscaled)


def _at(rows: Tensor, places: Tensor) -> Tensor:
    """The numbers at some places of their rows; a place outside stands for the nearest inside."""
    return rows.gather(1, places.clamp(0, rows.shape[1] - 1))


def _dense_values(scaled: Tensor, count: int) -> Tensor:
    """`count` values of each row, ascending, whose density is about the cube root of that of the numbers."""
    last = scaled.shape[1] - 1
    quantiles = min(EDGES, last + 1)
    places = torch.arange(quantiles, device=scaled.device) * last // max(quantiles - 1, 1)
    edges = scaled[:, places]
    widths = edges.diff(dim=1)
    weights = (_cube_root(widths * widths) * 2.0**40).round().to(torch.int64)
    reached = torch.nn.functional.pad(weights.cumsum(1), (1, 0))  # [groups, quantiles], at most 1025 * 2**41
    wanted = (2 * torch.arange(count, device=scaled.device) + 1) * reached[:, -1:] // (2 * count)
    if quantiles == 1:
        return edges.expand(-1, count).contiguous()
    before = torch.searchsorted(reached, wanted, right=True).sub_(1).clamp_(0, quantiles - 2)
    base, span = reached.gather(1, before), weights.gather(1, before)
    share = torch.where(span > 0, (wanted - base).double() / span.clamp(min=1).double(), 0.0)
    return edges.gather(1, before) + widths.gather(1, before) * share


def _cube_root(numbers: Tensor) -> Tensor:
    """Of numbers from 0 to 4, by Newton's iteration: `pow` differs from device to device. 0 below 1e-36."""
    positive = torch.where(numbers > 1e-36, numbers, 1.0)
    root = positive.sqrt().sqrt()
    root = root * root.sqrt().sqrt()  # to the power of 5 / 16
    for _ in range(6):
        root = root - (root - positive / (root * root)) / 3
    return torch.where(numbers > 1e-36, root, 0.0)


def _moved(sample: Sample, codebook: Tensor) -> Tensor:
    """One iteration: the means of the cells; empty ones go half way to the farther end of the worst cells."""
    starts, ends, sums = sample.cells(codebook)
    sizes = ends - starts
    low, high = _at(sample.scaled, starts), _at(sample.scaled, ends - 1)
    means = torch.minimum(torch.maximum(sums / sizes.clamp(min=1).double(), low), high)
    farther = torch.where(means - low > high - means, low, high)
    worst_errors, worst = torch.where(high > low, sample.errors(starts, ends), 0.0).sort(
        dim=1, descending=True, stable=True
    )
    empty = sizes == 0
    order = (empty.to(torch.int64).cumsum(1) - 1).clamp_(min=0)  # of the empty cells among themselves
    chosen = worst.gather(1, order)
    split = (means.gather(1, chosen) + farther.gather(1, chosen)) / 2
    filled = torch.where(worst_errors.gather(1, order) > 0, split, codebook)
    return torch.where(empty, filled, means).sort(dim=1).values
