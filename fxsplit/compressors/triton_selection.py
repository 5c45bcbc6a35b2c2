"""Order statistics of the groups of a tensor, for Triton: the second half of a selection.

What was gathered around each boundary, see `triton_brackets`, is counted by bins; the counts tell the bin of
each wanted rank; the few elements of these bins are copied, and the wanted values taken from them.

Where a rank lies outside its window after all, or more was gathered than there is room for, or a bin holds
more than there is room for and these are not all equal, the answer is NaN, and who asked has to sort.

For `cuda_selection` only: this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxsplit.compressors.triton_brackets import (
    APART,
    BELOW_LOW,
    COPIED,
    GATHERED,
    KEPT,
    PLACES,
    UP_TO_HIGH,
    UP_TO_LOW,
    WINDOWS,
    bin_of,
    floats,
)
from fxsplit.compressors.triton_ranges import (
    GREATEST,
    INFINITY,
    extreme_of,
    float_key,
    kth_key,
    store_range,
    value_of,
)


@triton.jit
def segment_of(work: tl.tensor, words: tl.tensor, room: tl.tensor, SEGMENTS: tl.constexpr) -> tl.tensor:
    """The segment of what was gathered that a program goes over: where it is, and how many elements it has."""
    segment = tl.program_id(1) % SEGMENTS
    number = tl.minimum(tl.load(work + GATHERED + APART * segment), room)
    return floats(work + words - room * (SEGMENTS - segment)), number


@triton.jit
def bin_kernel(
    work_at: tl.tensor,
    words: tl.tensor,
    room: tl.tensor,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Counts what was gathered by bins; grid (groups, SEGMENTS * programs)."""
    work = work_at + tl.program_id(0).to(tl.int64) * words
    bins = work + KEPT + 3 * ROOM + 3 * BINS
    gathered, number = segment_of(work, words, room, SEGMENTS)
    programs = tl.num_programs(1) // SEGMENTS
    for tile in range(tl.program_id(1) // SEGMENTS, tl.cdiv(number, BLOCK), programs):
        j = tile * BLOCK + tl.arange(0, BLOCK)
        bin = bin_of(tl.load(gathered + j, mask=j < number, other=INFINITY), floats(work + WINDOWS), BINS)
        tl.atomic_add(bins + bin, 1, mask=bin >= 0, sem="relaxed")


@triton.jit
def locate_kernel(
    ranks_at: tl.tensor,
    work_at: tl.tensor,
    words: tl.tensor,
    room: tl.tensor,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    SEGMENTS: tl.constexpr,
) -> None:
    """Fills in the places of the ranks; grid (groups, 2 * boundaries)."""
    number = tl.program_id(1)
    work = work_at + tl.program_id(0).to(tl.int64) * words
    ends, kinds, bins = floats(work + WINDOWS), work + WINDOWS + 6, work + KEPT + 3 * ROOM + 3 * BINS
    rank, lanes = tl.load(ranks_at + number), tl.arange(0, BINS)
    start0, start1 = tl.load(work + UP_TO_LOW), tl.load(work + UP_TO_LOW + 1)
    start2 = tl.load(work + UP_TO_LOW + 2)
    at = tl.where(rank >= start2, 2, tl.where(rank >= start1, 1, 0))
    offset = rank - tl.where(at == 2, start2, tl.where(at == 1, start1, start0))
    here = tl.load(bins + at * BINS + lanes)
    sums, inside = tl.cumsum(here, 0), tl.sum(here, 0)
    found = tl.sum((sums <= offset).to(tl.int32), 0)
    before = tl.sum(tl.where(lanes < found, here, 0), 0)
    size = tl.sum(tl.where(lanes == found, here, 0), 0)
    # In no bin: the low end, the high end, or the low end of the next window, if these are elements.
    low, high = tl.load(ends + 2 * at), tl.load(ends + 2 * at + 1)
    after, of_low, of_high = tl.minimum(at + 1, 2), tl.load(kinds + 2 * at), tl.load(kinds + 2 * at + 1)
    is_low = ((offset == -1) & (of_low > 0)) | ((of_low > 1) & (rank >= tl.load(work + BELOW_LOW + at)))
    is_high = ((offset == inside) & (of_high > 0)) | ((of_high > 1) & (rank < tl.load(work + UP_TO_HIGH + at)))
    is_next = (tl.load(kinds + 2 * after) > 1) & (rank >= tl.load(work + BELOW_LOW + after)) & (at < 2)
    nothing = float("nan")
    beyond = tl.where(is_next, tl.load(ends + 2 * after), tl.where(is_high, high, nothing))
    value = tl.where(offset < 0, tl.where(is_low, low, nothing), beyond)
    lacking = tl.max(tl.load(work + GATHERED + APART * tl.arange(0, SEGMENTS)), 0) > room
    is_inside = (offset >= 0) & (offset < inside) & (lacking == 0)
    places = work + PLACES + 4 * number
    tl.store(places, tl.where(is_inside, at * BINS + found, -1))
    tl.store(places + 1, offset - before)
    tl.store(places + 2, size)
    tl.store(floats(places + 3), tl.where(lacking, nothing, value))


@triton.jit
def collect_kernel(
    work_at: tl.tensor,
    words: tl.tensor,
    room: tl.tensor,
    BOUNDARIES: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copies the keys in the bins of each boundary's two ranks; grid (groups, SEGMENTS * programs).

    Of keys for which there is no room, the last two are the greatest inverted and the greatest plain key.
    """
    work = work_at + tl.program_id(0).to(tl.int64) * words
    gathered, number = segment_of(work, words, room, SEGMENTS)
    programs = tl.num_programs(1) // SEGMENTS
    for tile in range(tl.program_id(1) // SEGMENTS, tl.cdiv(number, BLOCK), programs):
        j = tile * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(gathered + j, mask=j < number, other=INFINITY)
        bin, key = bin_of(x, floats(work + WINDOWS), BINS), float_key(x)
        for boundary in tl.static_range(BOUNDARIES):
            lower, upper = tl.load(work + PLACES + 8 * boundary), tl.load(work + PLACES + 8 * boundary + 4)
            wanted = (bin >= 0) & ((bin == lower) | (bin == upper))
            kept = work + KEPT + boundary * ROOM
            to = tl.atomic_add(work + COPIED + boundary + key * 0, 1, mask=wanted, sem="relaxed")
            tl.store(kept + to, key, mask=wanted & (to < ROOM - 2))
            late = wanted & (to >= ROOM - 2)
            tl.atomic_max(kept + ROOM - 2 + key * 0, ~key, mask=late, sem="relaxed")
            tl.atomic_max(kept + ROOM - 1 + key * 0, key, mask=late, sem="relaxed")


@triton.jit
def boundary_value(number: tl.tensor, work: tl.tensor, ROOM: tl.constexpr) -> tl.tensor:
    """The value of a rank, float32; NaN if it is not known. Its number is twice the boundary, and its side."""
    boundary = number // 2
    places = work + PLACES + 8 * boundary
    lower, bin = tl.load(places), tl.load(places + 4 * (number % 2))
    rank = tl.load(places + 4 * (number % 2) + 1)
    rank += tl.where((lower >= 0) & (bin > lower), tl.load(places + 2), 0)
    value = tl.load(floats(places + 4 * (number % 2) + 3))
    kept = work + KEPT + boundary * ROOM
    copied = tl.load(work + COPIED + boundary)
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
    work_at: tl.tensor,
    found_at: tl.tensor,
    words: tl.tensor,
    programs: tl.tensor,
    columns: tl.tensor,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Fills a part of found [groups, columns], float64; grid (groups, wanted).

    Wanted are [column, number]: twice the boundary and its side, or -1 for the least element and -2 for the
    greatest.
    """
    group = tl.program_id(0).to(tl.int64)
    work = work_at + group * words
    column, number = tl.load(wanted_at + 2 * tl.program_id(1)), tl.load(wanted_at + 2 * tl.program_id(1) + 1)
    if number < 0:
        value = extreme_of(floats(work + KEPT + 3 * ROOM + 6 * BINS), -1 - number, programs, PARTS)
    else:
        value = boundary_value(number, work, ROOM)
    tl.store(found_at + group * columns + column, value.to(tl.float64))


@triton.jit
def selected_ranges_kernel(
    work_at: tl.tensor,
    table_at: tl.tensor,
    low_at: tl.tensor,
    inverse_at: tl.tensor,
    finite_at: tl.tensor,
    words: tl.tensor,
    programs: tl.tensor,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """The ranges between boundaries, [groups, buckets]; see `store_range`; grid (groups, buckets)."""
    group, bucket, buckets = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    work = work_at + group * words
    parts = floats(work + KEPT + 3 * ROOM + 6 * BINS)
    if bucket == 0:  # noqa: SIM108  (Triton would compile both sides of an expression for every program)
        low = extreme_of(parts, 0, programs, PARTS)
    else:
        low = boundary_value(2 * bucket - 1, work, ROOM)
    if bucket == buckets - 1:
        high = extreme_of(parts, 1, programs, PARTS)
    else:
        high = boundary_value(2 * bucket, work, ROOM)
    at, half = group * buckets + bucket, tl.num_programs(0).to(tl.int64) * buckets
    store_range(low, high, at, half, at >= 0, table_at, low_at, inverse_at, finite_at, LEVELS)
