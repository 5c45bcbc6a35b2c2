"""Order statistics of the groups of a tensor, for Triton: the second half of a selection.

What was counted, see `triton_brackets`, tells the bin of each wanted rank. A kernel goes over all elements
again and copies what is in these few bins, from which the last takes the wanted values. Where a rank lies
outside its bracket after all, or a bin holds more than there is room for and these are not all equal, the
answer is NaN, and who asked has to sort.

For `cuda_selection` only: this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxsplit.compressors.triton_brackets import (
    BELOW_LOW,
    COPIED,
    ENDS,
    UP_TO_HIGH,
    UP_TO_LOW,
    bin_of,
    load_brackets,
)
from fxsplit.compressors.triton_ranges import (
    GREATEST,
    INFINITY,
    extreme_of,
    float_key,
    kth_key,
    place,
    store_range,
    value_of,
)


@triton.jit
def locate(rank: tl.tensor, counts: tl.tensor, ends: tl.tensor, bins: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    """Where a rank is found.

    Returns:
        The number of its bin, -1 if it is in none; its rank among the elements of that bin; how many these
        are; the value, if it is in no bin: that of an end of a bracket, or NaN.
    """
    lanes = tl.arange(0, BINS)
    start0, start1 = tl.load(counts + UP_TO_LOW), tl.load(counts + UP_TO_LOW + 1)
    start2 = tl.load(counts + UP_TO_LOW + 2)
    at = tl.where(rank >= start2, 2, tl.where(rank >= start1, 1, 0))
    offset = rank - tl.where(at == 2, start2, tl.where(at == 1, start1, start0))
    here = tl.load(bins + at * BINS + lanes)
    sums = tl.cumsum(here, 0)
    inside = tl.sum(here, 0)
    found = tl.sum((sums <= offset).to(tl.int32), 0)
    before = tl.sum(tl.where(lanes < found, here, 0), 0)
    number = tl.sum(tl.where(lanes == found, here, 0), 0)
    # In no bin: the low end, the high end, or the low end of the next bracket. An end is an element itself.
    low, high = tl.load(ends + 2 * at), tl.load(ends + 2 * at + 1)
    after = tl.minimum(at + 1, 2)
    is_low = (offset == -1) | ((tl.load(ends + 6) > 0) & (rank >= tl.load(counts + BELOW_LOW)))
    repeats_high = (tl.load(ends + 7 + 2 * at) > 0) & (rank < tl.load(counts + UP_TO_HIGH + at))
    is_high = (offset == inside) | repeats_high
    is_next = (at < 2) & (tl.load(ends + 6 + 2 * after) > 0) & (rank >= tl.load(counts + BELOW_LOW + after))
    nothing = float("nan")
    beyond = tl.where(is_next, tl.load(ends + 2 * after), tl.where(is_high, high, nothing))
    value = tl.where(offset < 0, tl.where(is_low, low, nothing), beyond)
    return tl.where((offset >= 0) & (offset < inside), at * BINS + found, -1), offset - before, number, value


@triton.jit
def locate_kernel(
    ranks_at: tl.tensor,
    ends_at: tl.tensor,
    counts_at: tl.tensor,
    bins_at: tl.tensor,
    places_at: tl.tensor,
    windows_at: tl.tensor,
    BINS: tl.constexpr,
) -> None:
    """Where the ranks are found; grid (groups, 2 * boundaries).

    Places are [groups, 6, 4]: the bin, or -1; the rank inside it; how many are in it. Windows are float32
    [groups, 6, 4]: two scaled values between which the bin's elements are, and hardly any others; the value
    that a rank in no bin has, or NaN.
    """
    group, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ends, counts = ends_at + group * ENDS, counts_at + group * 16
    _, low0, high0, scale0, low1, high1, scale1, low2, high2, scale2 = load_brackets(ends, BINS)
    bin, rank, size, value = locate(tl.load(ranks_at + number), counts, ends, bins_at + group * (3 * BINS), BINS)
    at = bin // BINS
    low = tl.where(at == 2, low2, tl.where(at == 1, low1, low0))
    high = tl.where(at == 2, high2, tl.where(at == 1, high1, high0))
    scale = tl.where(at == 2, scale2, tl.where(at == 1, scale1, scale0))
    offset = (bin - at * BINS).to(tl.float32)
    # The number of a bin is rounded by less than 1 / 1000, an end of the window by its last bit.
    first = low + (offset - 0.01) / tl.where(scale > 0, scale, 1.0)
    last = low + (offset + 1.01) / tl.where(scale > 0, scale, 1.0)
    first = tl.where(scale > 0, first - tl.abs(first) * 1e-6, low)
    last = tl.where(scale > 0, last + tl.abs(last) * 1e-6, high)
    places, windows = places_at + (group * 6 + number) * 4, windows_at + (group * 6 + number) * 4
    tl.store(places, bin)
    tl.store(places + 1, rank)
    tl.store(places + 2, size)
    tl.store(windows, tl.where(bin < 0, INFINITY, first))
    tl.store(windows + 1, tl.where(bin < 0, -INFINITY, last))
    tl.store(windows + 2, value)


@triton.jit
def boundary_window(places: tl.tensor, windows: tl.tensor) -> tl.tensor:
    """The bins of a boundary's two ranks, and the window of both."""
    first = tl.minimum(tl.load(windows), tl.load(windows + 4))
    last = tl.maximum(tl.load(windows + 1), tl.load(windows + 5))
    return tl.load(places), tl.load(places + 4), first, last


@triton.jit
def collect_kernel(
    values_at: tl.tensor,
    ends_at: tl.tensor,
    counts_at: tl.tensor,
    places_at: tl.tensor,
    windows_at: tl.tensor,
    kept_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    BOUNDARIES: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copies the keys in the bins of a boundary's two ranks to kept [groups, 3, ROOM]; grid (groups, programs).

    Of keys for which there is no room, the last two are the greatest inverted and the greatest plain key.
    """
    group = tl.program_id(0).to(INDEX)
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), 1).to(INDEX)  # as in `count_kernel`
    ends, counts, kept = ends_at + group * ENDS, counts_at + group * 16, kept_at + group * (3 * ROOM)
    places, windows = places_at + group * 24, windows_at + group * 24
    factor, low0, high0, scale0, low1, high1, scale1, low2, high2, scale2 = load_brackets(ends, BINS)
    lower0, upper0, first0, last0 = boundary_window(places, windows)
    lower1, upper1, first1, last1 = lower0, upper0, first0, last0
    lower2, upper2, first2, last2 = lower0, upper0, first0, last0
    if BOUNDARIES > 1:
        lower1, upper1, first1, last1 = boundary_window(places + 8, windows + 8)
    if BOUNDARIES > 2:
        lower2, upper2, first2, last2 = boundary_window(places + 16, windows + 16)
    for tile in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
        j = tl.cast(tile, INDEX) * BLOCK + lanes
        at = values_at + place(j, group, size, groups, inner, ONE_RUN)
        if (tl.cast(tile, INDEX) + 1) * BLOCK <= size:
            unscaled = tl.load(at).to(tl.float32)
        else:
            unscaled = tl.load(at, mask=j < size, other=INFINITY).to(tl.float32)
        x = unscaled * factor
        near = ((x >= first0) & (x <= last0)) | ((x >= first1) & (x <= last1)) | ((x >= first2) & (x <= last2))
        if tl.max(near.to(tl.int32), 0) > 0:
            bin = bin_of(x, low0, high0, scale0, low1, high1, scale1, low2, high2, scale2, BINS)
            bin = tl.where(j < size, bin, -1)
            key = float_key(unscaled)
            copy_keys(key, (bin >= 0) & ((bin == lower0) | (bin == upper0)), counts, kept, 0, ROOM)
            if BOUNDARIES > 1:
                copy_keys(key, (bin >= 0) & ((bin == lower1) | (bin == upper1)), counts, kept, 1, ROOM)
            if BOUNDARIES > 2:
                copy_keys(key, (bin >= 0) & ((bin == lower2) | (bin == upper2)), counts, kept, 2, ROOM)


@triton.jit
def copy_keys(
    key: tl.tensor,
    wanted: tl.tensor,
    counts: tl.tensor,
    kept: tl.tensor,
    BOUNDARY: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """Copies the wanted keys behind those that were copied for a boundary before."""
    to = tl.atomic_add(counts + COPIED + BOUNDARY + key * 0, 1, mask=wanted, sem="relaxed")
    kept += BOUNDARY * ROOM
    tl.store(kept + to, key, mask=wanted & (to < ROOM - 2))
    late = wanted & (to >= ROOM - 2)
    tl.atomic_max(kept + ROOM - 2 + key * 0, ~key, mask=late, sem="relaxed")
    tl.atomic_max(kept + ROOM - 1 + key * 0, key, mask=late, sem="relaxed")


@triton.jit
def boundary_value(
    number: tl.tensor,
    group: tl.tensor,
    counts_at: tl.tensor,
    places_at: tl.tensor,
    windows_at: tl.tensor,
    kept_at: tl.tensor,
    ROOM: tl.constexpr,
) -> tl.tensor:
    """The value of a rank, float32; NaN if it is not known. Its number is twice the boundary, and its side."""
    boundary = number // 2
    places = places_at + (group * 6 + 2 * boundary) * 4
    lower, bin = tl.load(places), tl.load(places + 4 * (number % 2))
    rank = tl.load(places + 4 * (number % 2) + 1)
    rank += tl.where((lower >= 0) & (bin > lower), tl.load(places + 2), 0)
    value = tl.load(windows_at + (group * 6 + number) * 4 + 2)
    kept = kept_at + (group * 3 + boundary) * ROOM
    copied = tl.load(counts_at + group * 16 + COPIED + boundary)
    lanes = tl.arange(0, ROOM)
    if bin >= 0:
        inside = lanes < tl.minimum(copied, ROOM - 2)
        keys = tl.where(inside, tl.load(kept + lanes, mask=inside, other=0), GREATEST)
        least = tl.min(keys, 0)
        if copied <= ROOM - 2:
            value = value_of(kth_key(keys, rank))
        else:
            most = tl.maximum(tl.max(tl.where(inside, keys, least), 0), tl.load(kept + ROOM - 1))
            least = tl.minimum(least, ~tl.load(kept + ROOM - 2))
            value = tl.where(value_of(least) == value_of(most), value_of(least), float("nan"))
    return value


@triton.jit
def find_kernel(
    wanted_at: tl.tensor,
    counts_at: tl.tensor,
    places_at: tl.tensor,
    windows_at: tl.tensor,
    kept_at: tl.tensor,
    parts_at: tl.tensor,
    found_at: tl.tensor,
    programs: tl.tensor,
    columns: tl.tensor,
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Fills a part of found [groups, columns], float64; grid (groups, wanted).

    Wanted are [column, number]: twice the boundary and its side, or -1 for the least element and -2 for the
    greatest.
    """
    group = tl.program_id(0).to(tl.int64)
    column, number = tl.load(wanted_at + 2 * tl.program_id(1)), tl.load(wanted_at + 2 * tl.program_id(1) + 1)
    if number < 0:
        value = extreme_of(parts_at + group * 2 * programs, -1 - number, programs, PARTS)
    else:
        value = boundary_value(number, group, counts_at, places_at, windows_at, kept_at, ROOM)
    tl.store(found_at + group * columns + column, value.to(tl.float64))


@triton.jit
def selected_ranges_kernel(
    counts_at: tl.tensor,
    places_at: tl.tensor,
    windows_at: tl.tensor,
    kept_at: tl.tensor,
    parts_at: tl.tensor,
    table_at: tl.tensor,
    low_at: tl.tensor,
    inverse_at: tl.tensor,
    finite_at: tl.tensor,
    programs: tl.tensor,
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """The ranges between boundaries, [groups, buckets]; see `store_range`; grid (groups, buckets)."""
    group, bucket, buckets = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    parts = parts_at + group * 2 * programs
    if bucket == 0:
        low = extreme_of(parts, 0, programs, PARTS)
    else:
        low = boundary_value(2 * bucket - 1, group, counts_at, places_at, windows_at, kept_at, ROOM)
    if bucket == buckets - 1:
        high = extreme_of(parts, 1, programs, PARTS)
    else:
        high = boundary_value(2 * bucket, group, counts_at, places_at, windows_at, kept_at, ROOM)
    store_range(low, high, group * buckets + bucket, table_at, low_at, inverse_at, finite_at, LEVELS)
