"""Order statistics of the groups of a tensor, for Triton: the wanted values are bracketed by those of a sample.

Up to three boundaries are found at once; a boundary is one wanted rank, or two neighbouring ones. A kernel
takes a sample of every group and finds the two keys between which a boundary's ranks surely lie, its bracket;
another goes over all elements, counts those above the low end of each bracket, and copies out the few in a
bracket; the same two again narrow down what was copied, and so on, until a last one finds the wanted values
among the rest. What equals an end of a bracket is not copied; where the sample shows that there are several
of them, they are counted, so that many equal values do no harm. Where a rank lies outside its bracket after
all, or more is copied than there is room for, the answer is NaN, and who asked has to sort.

Keys are what orders floats as integers, see `triton_kernels.float_key`; here they are of 32 bits. Brackets
ascend. An element belongs to the last bracket whose low end it is above, or to none.

For `cuda_selection` only: this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxsplit.compressors.triton_kernels import float_key, greatest_part, key_value, place

GREATEST = tl.constexpr(2**31 - 1)

ABOVE, INSIDE, BELOW, UP_TO, COPIED = (
    tl.constexpr(0),
    tl.constexpr(3),
    tl.constexpr(6),
    tl.constexpr(9),
    tl.constexpr(12),
)
"""Places in 16 counts: for each bracket, elements above its low end, inside it, below its low end, and up to its
high end (the last two where ends repeat); then the elements copied."""

ENDS = tl.constexpr(12)
"""Numbers of a level's brackets: low and high end of each, and for each end whether it repeats in the sample."""


@triton.jit
def kth_key(keys: tl.tensor, k: tl.tensor) -> tl.tensor:
    """The key of rank k, from 0: the least number that more than k are up to; GREATEST stands for no key."""
    low = tl.min(keys, 0).to(tl.int64)
    high = tl.max(tl.where(keys == GREATEST, tl.min(keys, 0), keys), 0).to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        up_to = tl.sum((keys <= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(up_to > k, low, middle + 1)
        high = tl.where(up_to > k, middle, high)
    return low.to(tl.int32)


@triton.jit
def sorted_kernel(
    bits_at: tl.tensor,
    wanted_at: tl.tensor,
    found_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    FLIP: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """float64 [groups, ranks], for groups of at most BLOCK elements; grid (groups, ranks).

    Ranks are the second column of `wanted`.
    """
    group = tl.program_id(0).to(INDEX)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < size
    at = bits_at + place(lanes.to(INDEX), group, size, groups, inner, ONE_RUN)
    keys = tl.where(inside, float_key(tl.load(at, mask=inside, other=0).to(tl.int32), FLIP), GREATEST)
    key = kth_key(keys, tl.load(wanted_at + 2 * tl.program_id(1) + 1))
    at = found_at + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(at, key_value(key, FLIP, BITS, FLOAT))


@triton.jit
def descend(rank: tl.tensor, size: tl.tensor, counts: tl.tensor, ends: tl.tensor, room: tl.tensor) -> tl.tensor:
    """What becomes of a rank in `size` elements that were divided.

    Returns:
        Its rank among the elements that were copied; whether it is one of them; the key that it has if not,
        and whether that is certain.
    """
    first = size - tl.load(counts + ABOVE)
    inside = tl.load(counts + INSIDE)
    above = rank >= first
    offset, before, at = rank - first, inside * 0, inside * 0
    for bracket in tl.static_range(1, 3):
        start = size - tl.load(counts + ABOVE + bracket)
        later = rank >= start
        before += tl.where(later, inside, 0)
        inside = tl.where(later, tl.load(counts + INSIDE + bracket), inside)
        offset = tl.where(later, rank - start, offset)
        at = tl.where(later, bracket, at)
    copied = above & (offset < inside)
    low_known = (rank >= tl.load(counts + BELOW)) & (tl.load(ends + 6) > 0)
    high_known = (rank < tl.load(counts + UP_TO + at)) & (tl.load(ends + 2 * at + 7) > 0)
    # Above a bracket, but up to the low end of the next one.
    after = tl.minimum(at + 1, 2)
    after_known = (at < 2) & (rank >= tl.load(counts + BELOW + after)) & (tl.load(ends + 2 * after + 6) > 0)
    known = tl.where(above, (offset >= inside) & (high_known | after_known), low_known)
    end = tl.where(above, tl.where(high_known, 2 * at + 1, 2 * after), 0)
    inner_rank = before + tl.where(above, tl.minimum(offset, inside), 0)
    return inner_rank, copied & (tl.load(counts + COPIED) <= room), tl.load(ends + end), known


@triton.jit
def bracket_kernel(
    source_at: tl.tensor,
    ranks_at: tl.tensor,
    counts_at: tl.tensor,
    ends_at: tl.tensor,
    rooms_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    source_room: tl.tensor,
    LEVEL: tl.constexpr,
    BOUNDARIES: tl.constexpr,
    FLIP: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Fills ends [levels, groups, ENDS] for a level; grid (groups, 6).

    The sample is every `stride`-th element of a group, at most BLOCK; from LEVEL 1 on, of the keys [groups,
    source_room] that were copied before, as counts [levels, groups, 16] say. Ranks are [boundaries, 2], rooms
    [levels].
    """
    group = tl.program_id(0)
    boundary, side = tl.program_id(1) // 2, tl.program_id(1) % 2
    ends = ends_at + (LEVEL * groups + group) * ENDS + tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    if boundary >= BOUNDARIES:  # a bracket that nothing is above
        tl.store(ends, GREATEST)
        tl.store(ends + 6, 0)
    else:
        rank = tl.load(ranks_at + tl.program_id(1))
        if LEVEL > 0:
            for level in tl.static_range(LEVEL):
                row = level * groups + group
                room = tl.load(rooms_at + level)
                rank, _, _, _ = descend(rank, size, counts_at + row * 16, ends_at + row * ENDS, room)
                size = tl.minimum(tl.load(counts_at + row * 16 + COPIED), room)
            # Odd: `divide_kernel` copies runs of powers of two, of which an even stride would see a part only.
            stride = tl.maximum(tl.cdiv(size, BLOCK), 1) | 1
            inside = lanes < tl.cdiv(size, stride)
            keys = tl.load(source_at + group.to(INDEX) * source_room + lanes * stride, mask=inside, other=0)
        else:
            inside = lanes < tl.cdiv(size, stride)
            at = place(lanes.to(INDEX) * stride, group.to(INDEX), size, groups, inner, ONE_RUN)
            keys = float_key(tl.load(source_at + at, mask=inside, other=0).to(tl.int32), FLIP)
        keys = tl.where(inside, keys, GREATEST)
        samples = tl.cdiv(size, stride)
        share = rank.to(tl.float32) / tl.maximum(size, 1).to(tl.float32)
        spread = 4 * tl.sqrt(tl.maximum(samples.to(tl.float32) * share * (1 - share), 0.0)) + 2
        margin = tl.where(stride == 1, 0, spread.to(tl.int32))
        nth = tl.where(side == 0, rank // stride - margin, tl.cdiv(rank, stride) + margin)
        key = kth_key(keys, tl.minimum(tl.maximum(nth, 0), BLOCK - 1))
        repeats = tl.sum((inside & (keys == key)).to(tl.int32), 0) > 1
        exact = stride == 1  # the sample is all there is, and ends are the wanted values
        outside = (nth < 0) | (nth >= samples)
        tl.store(ends, tl.where(nth < 0, -FLIP - 1, tl.where(nth >= samples, GREATEST, key)))
        tl.store(ends + 6, ((repeats | exact) & ~outside).to(tl.int32))


@triton.jit
def divide_kernel(
    source_at: tl.tensor,
    counts_at: tl.tensor,
    ends_at: tl.tensor,
    kept_at: tl.tensor,
    parts_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    source_room: tl.tensor,
    room: tl.tensor,
    LEVEL: tl.constexpr,
    FLIP: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Counts by the brackets of a level, and copies keys inside them to kept [groups, room].

    The grid is (groups, programs). LEVEL 0 also fills `parts` as `extremes_kernel` does. A program does ROWS *
    COLUMNS elements at a time, at most 1023 // ROWS times.
    """
    group = tl.program_id(0).to(INDEX)
    lanes = tl.arange(0, COLUMNS)
    row = LEVEL * groups + tl.program_id(0)
    if LEVEL > 0:
        size = tl.minimum(tl.load(counts_at + (row - groups) * 16 + COPIED), source_room)
    counts, ends = counts_at + row * 16, ends_at + row * ENDS
    low0, high0 = tl.load(ends), tl.load(ends + 1)
    low1, high1 = tl.load(ends + 2), tl.load(ends + 3)
    low2, high2 = tl.load(ends + 4), tl.load(ends + 5)
    repeated = tl.max(tl.load(ends + 6 + tl.arange(0, 8), mask=tl.arange(0, 8) < 6, other=0), 0) > 0
    # Of each column, in 10 bits for each bracket.
    above = tl.zeros((COLUMNS,), tl.int32)
    inside = tl.zeros((COLUMNS,), tl.int32)
    below = tl.zeros((COLUMNS,), tl.int32)
    up_to = tl.zeros((COLUMNS,), tl.int32)
    high_part = tl.full((COLUMNS,), -FLIP - 1, tl.int32)
    low_part = tl.full((COLUMNS,), -FLIP - 1, tl.int32)
    for tile in range(tl.program_id(1), tl.cdiv(size, ROWS * COLUMNS), tl.num_programs(1)):
        first = tl.cast(tile, INDEX) * (ROWS * COLUMNS) + lanes
        marks = tl.zeros((COLUMNS,), tl.int32)
        before = inside
        for k in tl.static_range(ROWS):
            j = first + k * COLUMNS
            valid = j < size
            key = load_key(source_at, j, valid, group, size, groups, inner, source_room, LEVEL, FLIP, ONE_RUN)
            if LEVEL == 0:
                high_part = tl.maximum(high_part, key)
                low_part = tl.maximum(low_part, tl.where(valid, ~key, -FLIP - 1))
            above1, above2 = key > low1, key > low2
            above += (key > low0).to(tl.int32) + tl.where(above1, 1 << 10, 0) + tl.where(above2, 1 << 20, 0)
            high = tl.where(above2, high2, tl.where(above1, high1, high0))
            copied = (key > low0) & (key < high)
            inside += tl.where(copied, tl.where(above2, 1 << 20, tl.where(above1, 1 << 10, 1)), 0)
            marks |= copied.to(tl.int32) << k
        if repeated:
            for k in tl.static_range(ROWS):
                j = first + k * COLUMNS
                valid = j < size
                key = load_key(source_at, j, valid, group, size, groups, inner, source_room, LEVEL, FLIP, ONE_RUN)
                less = (
                    (key < low0).to(tl.int32) + tl.where(key < low1, 1 << 10, 0) + tl.where(key < low2, 1 << 20, 0)
                )
                most = (key <= high0).to(tl.int32) + tl.where(key <= high1, 1 << 10, 0)
                below += tl.where(valid, less, 0)
                up_to += tl.where(valid, most + tl.where(key <= high2, 1 << 20, 0), 0)
        added = inside - before
        number = (added & 1023) + (added >> 10 & 1023) + (added >> 20)
        places = tl.cumsum(number, 0)
        all_of_them = tl.max(places, 0)
        start = tl.atomic_add(counts + COPIED, all_of_them, sem="relaxed")
        marks = tl.where(start + all_of_them <= room, marks, 0)
        to = kept_at + group * room + (start + places - number)
        for k in tl.static_range(ROWS):
            j = first + k * COLUMNS
            copied = (marks >> k & 1) > 0
            key = load_key(source_at, j, copied, group, size, groups, inner, source_room, LEVEL, FLIP, ONE_RUN)
            tl.store(to, key, mask=copied)
            to += copied.to(tl.int32)
    for bracket in tl.static_range(3):
        tl.atomic_add(counts + ABOVE + bracket, tl.sum(above >> (10 * bracket) & 1023, 0), sem="relaxed")
        tl.atomic_add(counts + INSIDE + bracket, tl.sum(inside >> (10 * bracket) & 1023, 0), sem="relaxed")
        if repeated:
            tl.atomic_add(counts + BELOW + bracket, tl.sum(below >> (10 * bracket) & 1023, 0), sem="relaxed")
            tl.atomic_add(counts + UP_TO + bracket, tl.sum(up_to >> (10 * bracket) & 1023, 0), sem="relaxed")
    if LEVEL == 0:
        part = parts_at + tl.program_id(0) * 2 * tl.num_programs(1) + tl.program_id(1)
        tl.store(part, tl.max(low_part, 0))
        tl.store(part + tl.num_programs(1), tl.max(high_part, 0))


@triton.jit
def load_key(
    source_at: tl.tensor,
    j: tl.tensor,
    wanted: tl.tensor,
    group: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    source_room: tl.tensor,
    LEVEL: tl.constexpr,
    FLIP: tl.constexpr,
    ONE_RUN: tl.constexpr,
) -> tl.tensor:
    """Keys of a group's elements, or keys that were copied; the least key, which is a NaN's, if not wanted."""
    if LEVEL > 0:
        return tl.load(source_at + group * source_room + j, mask=wanted, other=-FLIP - 1)
    else:
        at = source_at + place(j, group, size, groups, inner, ONE_RUN)
        return float_key(tl.load(at, mask=wanted, other=-1).to(tl.int32), FLIP)


@triton.jit
def find_kernel(
    plan_at: tl.tensor,
    counts_at: tl.tensor,
    ends_at: tl.tensor,
    rooms_at: tl.tensor,
    kept_at: tl.tensor,
    parts_at: tl.tensor,
    found_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    room: tl.tensor,
    parts: tl.tensor,
    ranks: tl.tensor,
    LEVELS: tl.constexpr,
    FLIP: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    INDEX: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Fills a part of found [groups, ranks], float64; grid (groups, wanted).

    The plan is, of each wanted rank, its column in `found`, and itself, or -1 for the least and -2 for the
    greatest element. `kept` [groups, room] are the keys that are left after all levels; BLOCK is at least
    `room`.
    """
    group = tl.program_id(0)
    column, rank = tl.load(plan_at + 2 * tl.program_id(1)), tl.load(plan_at + 2 * tl.program_id(1) + 1)
    found = found_at + group * ranks + column
    if rank < 0:
        side = -1 - rank
        key = greatest_part(parts_at + (group * 2 + side) * parts, parts, tl.int32, PARTS_BLOCK)
        tl.store(found, key_value(tl.where(side == 0, ~key, key), FLIP, BITS, FLOAT))
    else:
        going, certain, key = rank >= 0, rank < 0, rank * 0
        for level in tl.static_range(LEVELS):
            row = group + level * groups
            level_room = tl.load(rooms_at + level)
            next_rank, copied, end, known = descend(
                rank, size, counts_at + row * 16, ends_at + row * ENDS, level_room
            )
            key = tl.where(going & ~copied, end, key)
            certain = certain | (going & ~copied & known)
            going = going & copied
            rank, size = next_rank, tl.minimum(tl.load(counts_at + row * 16 + COPIED), level_room)
        if going:
            lanes = tl.arange(0, BLOCK)
            at = kept_at + group.to(INDEX) * room + lanes
            keys = tl.where(lanes < size, tl.load(at, mask=lanes < size, other=0), GREATEST)
            key = kth_key(keys, rank)
        value = key_value(key, FLIP, BITS, FLOAT)
        tl.store(found, tl.where(going | certain, value, float("nan")))
