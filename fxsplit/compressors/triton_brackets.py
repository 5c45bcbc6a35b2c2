"""Counting between values of a sample, for Triton: the first half of a selection.

Up to three boundaries are found at once; a boundary is one wanted rank, or two neighbouring ones. A kernel
takes a sample of every group and finds the two values between which a boundary's ranks surely lie, its
bracket. Another goes over all elements, counts those up to the low end of each bracket, and counts those
inside it by bins of equal width. What equals an end of a bracket is in no bin; where the sample shows that
there are several of them, they are counted, so that many equal values do no harm.

All is computed in float32, which holds values of 16 bits exactly. Brackets ascend; an element belongs to the
last bracket whose low end it is above, or to none. Its bin is a monotone function of its value, rounding
included, and bins of all brackets together are numbered in ascending order.

For `cuda_selection` only: this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxsplit.compressors.triton_ranges import (
    GREATEST,
    INFINITY,
    greatest_of,
    kth_key,
    least_of,
    place,
    sampled_keys,
    store_part,
    value_of,
)

UP_TO_LOW, BELOW_LOW, UP_TO_HIGH, COPIED = (tl.constexpr(0), tl.constexpr(3), tl.constexpr(6), tl.constexpr(9))
"""Places in 16 counts: for each bracket, elements up to its low end, below its low end, and up to its high end
(the last two where ends repeat); then, for each boundary, the elements copied."""

ENDS = tl.constexpr(12)
"""Numbers of a group's brackets, float32: low and high end of each, and for each end whether it repeats."""


@triton.jit
def bracket_kernel(
    values_at: tl.tensor,
    ranks_at: tl.tensor,
    ends_at: tl.tensor,
    counts_at: tl.tensor,
    bins_at: tl.tensor,
    kept_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    BOUNDARIES: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Fills ends [groups, ENDS], and makes counts [groups, 16], bins and kept ready; grid (groups, 6).

    Ranks are [boundaries, 2].
    """
    group = tl.program_id(0)
    side, end = tl.program_id(1) % 2, tl.program_id(1)
    half = tl.arange(0, BINS // 2)
    tl.store(bins_at + (group.to(tl.int64) * 6 + end) * (BINS // 2) + half, half * 0)
    tl.store(kept_at + (group.to(tl.int64) * 3 + end // 2 + 1) * ROOM - 2 + side, -GREATEST - 1)
    if end == 0:
        tl.store(counts_at + group * 16 + tl.arange(0, 16), tl.zeros((16,), tl.int32))
    if end >= 2 * BOUNDARIES:  # a bracket that nothing is above
        tl.store(ends_at + group * ENDS + end, INFINITY)
        tl.store(ends_at + group * ENDS + 6 + end, 0.0)
    else:
        keys = sampled_keys(values_at, group, size, groups, inner, stride, INDEX, ONE_RUN, BLOCK)
        rank, samples = tl.load(ranks_at + end), tl.cdiv(size, stride)
        share = rank.to(tl.float32) / size.to(tl.float32)
        spread = 4 * tl.sqrt(tl.maximum(samples.to(tl.float32) * share * (1 - share), 0.0)) + 2
        margin = spread.to(tl.int32)
        nth = tl.where(side == 0, rank // stride - margin, tl.cdiv(rank, stride) + margin)
        value = value_of(kth_key(keys, tl.minimum(tl.maximum(nth, 0), samples - 1)))
        equal = (keys != GREATEST) & (value_of(keys) == value)  # zeros of both signs
        repeats = (tl.sum(equal.to(tl.int32), 0) > 1) & (nth >= 0) & (nth < samples)
        value = tl.where(nth < 0, -INFINITY, tl.where(nth >= samples, INFINITY, value))
        tl.store(ends_at + group * ENDS + end, value)
        tl.store(ends_at + group * ENDS + 6 + end, repeats.to(tl.float32))


@triton.jit
def load_brackets(ends: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    """A factor that makes the ends neither tiny nor huge; low end, high end and bins a unit of each, scaled."""
    places = tl.arange(0, 8)
    every = tl.abs(tl.load(ends + places, mask=places < 6, other=0.0))
    greatest = tl.max(tl.where(every < INFINITY, every, 0.0), 0)
    factor = tl.where(greatest > 1e30, 2.0**-20, tl.where(greatest < 1e-20, 2.0**80, 1.0))
    low0, high0 = tl.load(ends) * factor, tl.load(ends + 1) * factor
    low1, high1 = tl.load(ends + 2) * factor, tl.load(ends + 3) * factor
    low2, high2 = tl.load(ends + 4) * factor, tl.load(ends + 5) * factor
    scale0, scale1 = bin_scale(low0, high0, BINS), bin_scale(low1, high1, BINS)
    return factor, low0, high0, scale0, low1, high1, scale1, low2, high2, bin_scale(low2, high2, BINS)


@triton.jit
def bin_scale(low: tl.tensor, high: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    """Bins a unit; 0, which makes it one bin, where the width is not a normal number."""
    width = high - low
    return tl.where((width > 1e-30) & (width < 1e37), tl.div_rn(width * 0.0 + BINS, width), 0.0)


@triton.jit
def bin_of(
    x: tl.tensor,
    low0: tl.tensor,
    high0: tl.tensor,
    scale0: tl.tensor,
    low1: tl.tensor,
    high1: tl.tensor,
    scale1: tl.tensor,
    low2: tl.tensor,
    high2: tl.tensor,
    scale2: tl.tensor,
    BINS: tl.constexpr,
) -> tl.tensor:
    """The number of a scaled element's bin, 0 to 3 * BINS - 1; -1 if it is in none."""
    above1, above2 = x > low1, x > low2
    low = tl.where(above2, low2, tl.where(above1, low1, low0))
    high = tl.where(above2, high2, tl.where(above1, high1, high0))
    scale = tl.where(above2, scale2, tl.where(above1, scale1, scale0))
    first = tl.where(above2, 2 * BINS, tl.where(above1, BINS, 0))
    inside = (x > low) & (x < high)
    offset = tl.minimum(tl.where(inside, (x - low) * scale, 0.0).to(tl.int32), BINS - 1)
    return tl.where(inside, first + offset, -1)


@triton.jit
def packed_counts(first: tl.tensor, second: tl.tensor, third: tl.tensor) -> tl.tensor:
    """Three truths, in 10 bits each."""
    return first.to(tl.int32) + tl.where(second, 1 << 10, 0) + tl.where(third, 1 << 20, 0)


@triton.jit
def count_kernel(
    values_at: tl.tensor,
    ends_at: tl.tensor,
    counts_at: tl.tensor,
    bins_at: tl.tensor,
    parts_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    BINS: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Counts by brackets and bins, and the extremes of parts, see `store_part`; grid (groups, programs).

    A program goes over at most 1023 blocks.
    """
    group = tl.program_id(0).to(INDEX)
    # Not more than one element after the other for each thread: atomic operations want them so, and what was
    # read otherwise would have to be exchanged between threads.
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), 1).to(INDEX)
    ends, counts = ends_at + group * ENDS, counts_at + group * 16
    bins = bins_at + group * (3 * BINS)
    factor, low0, high0, scale0, low1, high1, scale1, low2, high2, scale2 = load_brackets(ends, BINS)
    repeated = tl.max(tl.load(ends + 6 + tl.arange(0, 8), mask=tl.arange(0, 8) < 6, other=0.0), 0) > 0
    first = tl.load(values_at + place(group * 0, group, size, groups, inner, ONE_RUN)).to(tl.float32)
    up_to = tl.zeros((BLOCK,), tl.int32)
    below = tl.zeros((BLOCK,), tl.int32)
    up_to_high = tl.zeros((BLOCK,), tl.int32)
    high_part = tl.zeros((BLOCK,), tl.float32) + first
    low_part = high_part
    for tile in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
        j = tl.cast(tile, INDEX) * BLOCK + lanes
        at = values_at + place(j, group, size, groups, inner, ONE_RUN)
        if (tl.cast(tile, INDEX) + 1) * BLOCK <= size:
            x = tl.load(at).to(tl.float32)
            high_part = greatest_of(high_part, x)
            low_part = least_of(low_part, x)
        else:
            x = tl.load(at, mask=j < size, other=INFINITY).to(tl.float32)
            high_part = greatest_of(high_part, tl.where(j < size, x, first))
            low_part = least_of(low_part, tl.where(j < size, x, first))
        # Infinity, behind the end, is in no bin, and up to the end of no bracket that there is.
        x *= factor
        up_to += packed_counts(x <= low0, x <= low1, x <= low2)
        bin = bin_of(x, low0, high0, scale0, low1, high1, scale1, low2, high2, scale2, BINS)
        tl.atomic_add(bins + bin, 1, mask=bin >= 0, sem="relaxed")
        if repeated:
            below += packed_counts(x < low0, x < low1, x < low2)
            up_to_high += packed_counts(x <= high0, x <= high1, x <= high2)
    for bracket in tl.static_range(3):
        tl.atomic_add(counts + UP_TO_LOW + bracket, tl.sum(up_to >> 10 * bracket & 1023, 0), sem="relaxed")
        if repeated:
            lower, upper = below >> 10 * bracket & 1023, up_to_high >> 10 * bracket & 1023
            tl.atomic_add(counts + BELOW_LOW + bracket, tl.sum(lower, 0), sem="relaxed")
            tl.atomic_add(counts + UP_TO_HIGH + bracket, tl.sum(upper, 0), sem="relaxed")
    store_part(parts_at, low_part, high_part)
