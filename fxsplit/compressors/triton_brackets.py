"""Gathering what lies close to wanted ranks, for Triton: the first half of a selection.

Up to three boundaries are found at once; a boundary is one wanted rank, or two neighbouring ones. A kernel
takes a small sample of every group and finds the two values between which a boundary's ranks surely lie, its
bracket. Another takes a large sample and counts, by bins, what of it is inside the brackets, so that a third
can say between which two values, the window, the ranks surely lie among all elements. The last goes over all
elements, the only one that does so: it counts those up to the low end of each window and copies those inside
one, a few in a thousand, to a place of their own. What equals an end of a window is not copied; where the small
sample shows that there are several of them, they are counted, so that many equal values do no harm.

All is computed in float32, which holds values of 16 bits exactly. Brackets and windows ascend; an element
belongs to the last one whose low end it is above, or to none.

For `cuda_selection` only: this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxsplit.compressors.triton_ranges import (
    GREATEST,
    INFINITY,
    float_key,
    greatest_of,
    kth_key,
    least_of,
    place,
    sampled_keys,
    store_part,
    value_of,
)

UP_TO_LOW, BELOW_LOW, UP_TO_HIGH = tl.constexpr(0), tl.constexpr(3), tl.constexpr(6)
"""Where the memory of a group, 32-bit words, has for each window the number of elements up to its low end,
below its low end, and up to its high end; the last two where ends repeat."""

COPIED, SAMPLED = tl.constexpr(9), tl.constexpr(12)
"""The elements copied for each boundary; and those of the sample up to the low end of each bracket."""

BRACKETS, WINDOWS = tl.constexpr(16), tl.constexpr(64)
"""Low and high end of each, float32; then for each end whether it repeats. An end of a bracket is an element,
one of a window need not be: there 2 says that it repeats, 1 that it is an element at least."""

SLACK = tl.constexpr(512)
"""An end of a bracket is found but for one in so many of the small sample: it need not be the very rank."""

PLACES = tl.constexpr(32)
"""For each of six ranks: its bin, or -1; its rank inside it; how many are in it; and the value, float32, that a
rank in no bin has, or NaN."""

GATHERED, MAX_SEGMENTS, APART = tl.constexpr(96), tl.constexpr(256), tl.constexpr(8)
"""What is gathered goes to several segments, as adding to one number would take long; how many there are in
each, so many words apart."""

KEPT = tl.constexpr(96 + 256 * 8)
"""ROOM keys of each boundary. Behind: BINS numbers of each bracket and of each window, the parts of the extremes
[2, programs], and at the end what was gathered."""


@triton.jit
def floats(at: tl.tensor) -> tl.tensor:
    """A place in memory, as one of float32."""
    return at.to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def bracket_kernel(
    values_at: tl.tensor,
    ranks_at: tl.tensor,
    work_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    words: tl.tensor,
    BOUNDARIES: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Fills in the brackets, and makes numbers and room ready; grid (groups, 6).

    Ranks are [boundaries, 2], the memory is [groups, words].
    """
    group, end = tl.program_id(0), tl.program_id(1)
    side = end % 2
    work = work_at + group.to(tl.int64) * words
    tl.store(work + KEPT + 3 * ROOM + end * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
    tl.store(work + KEPT + (end // 2 + 1) * ROOM - 2 + side, -GREATEST - 1)
    if end == 0:
        tl.store(work + tl.arange(0, 16), tl.zeros((16,), tl.int32))
        tl.store(work + GATHERED + APART * tl.arange(0, MAX_SEGMENTS), tl.zeros((MAX_SEGMENTS,), tl.int32))
    if end >= 2 * BOUNDARIES:  # a bracket that nothing is above
        tl.store(floats(work + BRACKETS) + end, INFINITY)
        tl.store(work + BRACKETS + 6 + end, 0)
        tl.store(floats(work + WINDOWS) + end, INFINITY)
        tl.store(work + WINDOWS + 6 + end, 0)
    else:
        keys = sampled_keys(values_at, group, size, groups, inner, stride, INDEX, ONE_RUN, BLOCK)
        rank, samples = tl.load(ranks_at + end), tl.cdiv(size, stride)
        share = rank.to(tl.float32) / size.to(tl.float32)
        spread = 4 * tl.sqrt(tl.maximum(samples.to(tl.float32) * share * (1 - share), 0.0)) + 2
        margin = spread.to(tl.int32)
        nth = tl.where(side == 0, rank // stride - margin, tl.cdiv(rank, stride) + margin + BLOCK // SLACK)
        value = value_of(kth_key(keys, tl.minimum(tl.maximum(nth, 0), samples - 1), BLOCK // SLACK))
        equal = (keys != GREATEST) & (value_of(keys) == value)  # zeros of both signs
        repeats = (tl.sum(equal.to(tl.int32), 0) > 1) & (nth >= 0) & (nth < samples)
        value = tl.where(nth < 0, -INFINITY, tl.where(nth >= samples, INFINITY, value))
        tl.store(floats(work + BRACKETS) + end, value)
        tl.store(work + BRACKETS + 6 + end, repeats.to(tl.int32))


@triton.jit
def bin_scale(low: tl.tensor, high: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    """Bins a unit; 0 where the width is not a normal number."""
    width = high - low
    return tl.where((width > 1e-30) & (width < 1e37), tl.div_rn(width * 0.0 + BINS, width), 0.0)


@triton.jit
def bin_of(x: tl.tensor, ends: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    """The number of an element's bin, ascending over all brackets or windows, 0 to 3 * BINS - 1; -1 if in none.

    A monotone function of the element, rounding included. It goes half by the value and half by the bits of the
    float, so that values crowded around zero are told apart, too.
    """
    low0, high0, low1, high1 = tl.load(ends), tl.load(ends + 1), tl.load(ends + 2), tl.load(ends + 3)
    low2, high2 = tl.load(ends + 4), tl.load(ends + 5)
    is_last, is_first = x > low2, (x > low1) == 0
    low = tl.where(is_last, low2, tl.where(is_first, low0, low1))
    high = tl.where(is_last, high2, tl.where(is_first, high0, high1))
    inside = (x > low) & (x < high)
    # By the value, with a factor that makes the ends neither tiny nor huge.
    places = tl.arange(0, 8)
    every = tl.abs(tl.load(ends + places, mask=places < 6, other=0.0))
    greatest = tl.max(tl.where(every < INFINITY, every, 0.0), 0)
    factor = tl.where(greatest > 1e30, 2.0**-20, tl.where(greatest < 1e-20, 2.0**80, 1.0))
    scale0, scale1 = bin_scale(low0 * factor, high0 * factor, BINS), bin_scale(low1 * factor, high1 * factor, BINS)
    scale2 = bin_scale(low2 * factor, high2 * factor, BINS)
    scale = tl.where(is_last, scale2, tl.where(is_first, scale0, scale1))
    by_value = tl.where(inside & (scale > 0), (x * factor - low * factor) * scale, 0.0)
    # By the bits.
    low_key = float_key(low).to(tl.float32)
    width = float_key(high).to(tl.float32) - low_key
    by_bits = tl.where(width > 0, (float_key(x).to(tl.float32) - low_key) / tl.where(width > 0, width, 1.0), 0.0)
    by_bits = tl.where(inside, by_bits * BINS, 0.0)
    offset = tl.minimum((tl.minimum(by_value, BINS) * 0.5 + by_bits * 0.5).to(tl.int32), BINS - 1)
    return tl.where(inside, tl.where(is_last, 2 * BINS, tl.where(is_first, 0, BINS)) + offset, -1)


@triton.jit
def sample_kernel(
    values_at: tl.tensor,
    work_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    words: tl.tensor,
    samples: tl.tensor,
    spacing: tl.tensor,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Counts, of every `spacing`-th 8 elements, by brackets and their bins; grid (groups, programs)."""
    group = tl.program_id(0).to(INDEX)
    work = work_at + group.to(tl.int64) * words
    ends = floats(work + BRACKETS)
    low0, low1, low2 = tl.load(ends), tl.load(ends + 2), tl.load(ends + 4)
    up_to0 = tl.zeros((BLOCK,), tl.int32)
    up_to1, up_to2 = up_to0, up_to0
    for tile in range(tl.program_id(1), tl.cdiv(samples, BLOCK), tl.num_programs(1)):
        number = tile * BLOCK + tl.arange(0, BLOCK)
        j = (number // 8).to(INDEX) * 8 * spacing + number % 8
        at = values_at + place(j, group, size, groups, inner, ONE_RUN)
        x = tl.load(at, mask=number < samples, other=INFINITY).to(tl.float32)
        up_to0 += (x <= low0).to(tl.int32)
        up_to1 += (x <= low1).to(tl.int32)
        up_to2 += (x <= low2).to(tl.int32)
        bin = bin_of(x, ends, BINS)
        tl.atomic_add(work + KEPT + 3 * ROOM + bin, 1, mask=bin >= 0, sem="relaxed")
    tl.atomic_add(work + SAMPLED, tl.sum(up_to0, 0), sem="relaxed")
    tl.atomic_add(work + SAMPLED + 1, tl.sum(up_to1, 0), sem="relaxed")
    tl.atomic_add(work + SAMPLED + 2, tl.sum(up_to2, 0), sem="relaxed")


@triton.jit
def window_kernel(
    ranks_at: tl.tensor,
    work_at: tl.tensor,
    size: tl.tensor,
    words: tl.tensor,
    samples: tl.tensor,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    PROBES: tl.constexpr,
) -> None:
    """Fills in the windows; grid (groups, 2 * boundaries).

    The margin is half again that of the brackets, since neighbouring elements are alike. An end that the sample
    does not tell is that of the bracket.
    """
    end = tl.program_id(1)
    side, boundary = end % 2, end // 2
    work = work_at + tl.program_id(0).to(tl.int64) * words
    ends = floats(work + BRACKETS)
    share = tl.load(ranks_at + end).to(tl.float64) / size
    spread = 6 * tl.sqrt(tl.maximum(samples * share * (1 - share), 0.0)) + 8
    wanted = (share * samples + tl.where(side == 0, -spread, spread)).to(tl.int32)
    wanted = tl.where(samples == size, tl.load(ranks_at + end), wanted) - tl.load(work + SAMPLED + boundary)
    here = tl.load(work + KEPT + 3 * ROOM + boundary * BINS + tl.arange(0, BINS))
    found = boundary * BINS + tl.sum((tl.cumsum(here, 0) <= wanted).to(tl.int32), 0)
    is_inside = (wanted >= 0) & (wanted < tl.sum(here, 0))
    # The greatest value before the bin, or the least behind it: the bins are asked in 8 bits of the key at a time.
    low, high = tl.load(ends + 2 * boundary), tl.load(ends + 2 * boundary + 1)
    first, last = float_key(low).to(tl.int64), float_key(high).to(tl.int64)
    for _ in range(4):
        step = (last - first + PROBES - 1) // PROBES
        keys = tl.minimum(first + (tl.arange(0, PROBES) + 1) * step, last)
        bins = bin_of(value_of(keys.to(tl.int32)), ends, BINS)
        is_before = tl.where(keys >= last, 0, tl.where(side == 0, bins < found, bins <= found).to(tl.int32))
        first += tl.sum(is_before, 0) * step
        last = tl.minimum(first + step, last)
    value = value_of(tl.where(side == 0, first, last).to(tl.int32))
    old = tl.load(ends + end)
    value = tl.where(is_inside, value, old)
    tl.store(floats(work + WINDOWS) + end, value)
    tl.store(work + WINDOWS + 6 + end, tl.where(value == old, 1 + tl.load(work + BRACKETS + 6 + end), 0))


@triton.jit
def add_counts(at: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor) -> None:
    """Adds how often each of three is true to three numbers in memory."""
    tl.atomic_add(at, tl.sum(first.to(tl.int32), 0), sem="relaxed")
    tl.atomic_add(at + 1, tl.sum(second.to(tl.int32), 0), sem="relaxed")
    tl.atomic_add(at + 2, tl.sum(third.to(tl.int32), 0), sem="relaxed")


@triton.jit
def gather_kernel(
    values_at: tl.tensor,
    work_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    words: tl.tensor,
    room: tl.tensor,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Counts by windows, gathers what is in them, and finds the extremes of parts; grid (groups, programs).

    There is room for `room` gathered elements in each segment; more are counted only. A program goes over at
    most 1023 blocks.
    """
    group = tl.program_id(0).to(INDEX)
    # Not more than one element after the other for each thread: atomic operations want them so, and what was
    # read otherwise would have to be exchanged between threads.
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), 1).to(INDEX)
    work = work_at + group.to(tl.int64) * words
    segment = tl.program_id(1) % SEGMENTS
    number_at, gathered = work + GATHERED + APART * segment, floats(work + words - room * (SEGMENTS - segment))
    ends = floats(work + WINDOWS)
    low0, high0 = tl.load(ends), tl.load(ends + 1)
    low1, high1 = tl.load(ends + 2), tl.load(ends + 3)
    low2, high2 = tl.load(ends + 4), tl.load(ends + 5)
    repeats = tl.load(work + WINDOWS + 6 + tl.arange(0, 8), mask=tl.arange(0, 8) < 6, other=0)
    repeated = tl.max(repeats, 0) > 1
    first = tl.load(values_at + place(group * 0, group, size, groups, inner, ONE_RUN)).to(tl.float32)
    up_to = tl.zeros((BLOCK,), tl.int32)
    high_part = tl.zeros((BLOCK,), tl.float32) + first
    low_part = high_part
    for tile in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
        j = tl.cast(tile, INDEX) * BLOCK + lanes
        if ONE_RUN:
            at = (values_at + group * size + tl.cast(tile, INDEX) * BLOCK) + lanes  # less work than by j
        else:
            at = values_at + place(j, group, size, groups, inner, ONE_RUN)
        if (tl.cast(tile, INDEX) + 1) * BLOCK <= size:
            x = tl.load(at).to(tl.float32)
            high_part = greatest_of(high_part, x)
            low_part = least_of(low_part, x)
        else:
            # Infinity is in no window, and up to the low end of none that there is.
            x = tl.load(at, mask=j < size, other=INFINITY).to(tl.float32)
            high_part = greatest_of(high_part, tl.where(j < size, x, first))
            low_part = least_of(low_part, tl.where(j < size, x, first))
        # Three counts, in 10 bits each; and the high end of the last window that the element is above.
        is_first, is_second, is_third = x <= low0, x <= low1, x <= low2
        up_to += tl.where(is_first, 0x100401, tl.where(is_second, 0x100400, tl.where(is_third, 0x100000, 0)))
        high = tl.where(is_third, high1, high2)
        high = tl.where(is_first, -INFINITY, tl.where(is_second, high0, high))
        to = tl.atomic_add(number_at + tl.zeros((BLOCK,), tl.int32), 1, mask=x < high, sem="relaxed")
        tl.store(gathered + to, x, mask=(x < high) & (to < room))
        if repeated:
            add_counts(work + BELOW_LOW, x < low0, x < low1, x < low2)
            add_counts(work + UP_TO_HIGH, x <= high0, x <= high1, x <= high2)
    for window in tl.static_range(3):
        tl.atomic_add(work + UP_TO_LOW + window, tl.sum(up_to >> 10 * window & 1023, 0), sem="relaxed")
    parts = floats(work + KEPT + 3 * ROOM + 6 * BINS)
    store_part(parts, tl.program_id(1), tl.num_programs(1), low_part, high_part)
