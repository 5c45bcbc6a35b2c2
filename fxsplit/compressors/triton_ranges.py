"""Extremes, samples and ranges of the groups of a tensor, for Triton.

Keys are what orders float32 values as 32-bit integers: their bits, where negative all but the sign inverted.
NaN has the greatest and the least keys. Values of 16 bits are read as float32.

For `cuda_kernels` and its like only: this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

GREATEST = tl.constexpr(2**31 - 1)
"""Stands for no key; that of a NaN."""

INFINITY = tl.constexpr(float("inf"))

LIMIT = tl.constexpr(1.7976931348623157e308)
"""The greatest float64."""


@triton.jit
def float_key(x: tl.tensor) -> tl.tensor:
    """The keys of float32 values."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def kth_key(keys: tl.tensor, k: tl.tensor, slack: tl.constexpr = 0) -> tl.tensor:
    """The key of a rank, from 0, of at most 2**15 keys, or that of one up to `slack` below; GREATEST is no key.

    It is above `low` and up to `high`. Keys are counted up to two places at a time, in the halves of one sum: just
    below and just above where the key would be if values were equally likely. Every fourth time, the places are
    the least key above `low`, which may be there many times, and the middle, so that the end is near at worst.
    """
    is_key = keys != GREATEST
    least = tl.min(keys, 0)
    greatest = tl.max(tl.where(is_key, keys, least), 0)
    number = tl.sum(is_key.to(tl.int32), 0)
    low = tl.maximum(least, -GREATEST) - 1  # that of a NaN may be the least of all integers
    low_count, high, high_count = number * 0, greatest, number
    step = number * 0
    while (low + 1 < high) & (high_count - low_count > 1 + slack):
        middle = ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)
        inside = (high_count - low_count).to(tl.float32)
        wanted, margin = (k - low_count).to(tl.float32), 0.5 * tl.sqrt(inside) + 1
        at = guess(wanted - margin, inside, low, high, middle)
        also_at = guess(wanted + margin, inside, low, high, middle)
        if step % 4 == 3:
            low = tl.min(tl.where(keys > low, keys, GREATEST), 0) - 1
            at, also_at = low + 1, tl.maximum(middle, low + 1)
        counts = tl.sum((keys <= at).to(tl.int32) + ((keys <= also_at).to(tl.int32) << 16), 0)
        count, also_count = counts & 0xFFFF, (counts >> 16) & 0xFFFF
        is_below, is_between = count > k, (count <= k) & (also_count > k)
        high = tl.where(is_below, at, tl.where(is_between, also_at, high))
        high_count = tl.where(is_below, count, tl.where(is_between, also_count, high_count))
        low = tl.where(is_below, low, tl.where(is_between, at, also_at))
        low_count = tl.where(is_below, low_count, tl.where(is_between, count, also_count))
        step += 1
    return tl.min(tl.where(keys > low, keys, GREATEST), 0)


@triton.jit
def guess(wanted: tl.tensor, inside: tl.tensor, low: tl.tensor, high: tl.tensor, middle: tl.tensor) -> tl.tensor:
    """A key above `low` and below `high`: that of a rank among those inside, if these were evenly spaced."""
    first, last = value_of(low), value_of(high)
    share = (tl.minimum(tl.maximum(wanted, 0.0), inside - 1) + 0.5) / inside
    value = first * (1 - share) + last * share
    at = tl.where((value >= first) & (value <= last), float_key(value), middle)  # not if an end is NaN
    return tl.minimum(tl.maximum(at, low + 1), high - 1)


@triton.jit
def value_of(key: tl.tensor) -> tl.tensor:
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place(
    j: tl.tensor, group: tl.tensor, size: tl.tensor, groups: tl.tensor, inner: tl.tensor, ONE_RUN: tl.constexpr
) -> tl.tensor:
    """Where the j-th element of a group is in the tensor, if a group has `size` elements in runs of `inner`."""
    if ONE_RUN:
        return group * size + j
    else:
        return (j // inner * groups + group) * inner + j % inner


@triton.jit
def sampled_keys(
    values_at: tl.tensor,
    group: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Keys of every `stride`-th element of a group, at most BLOCK; GREATEST behind the last."""
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.cdiv(size, stride)
    at = values_at + place(lanes.to(INDEX) * stride, group.to(INDEX), size, groups, inner, ONE_RUN)
    keys = float_key(tl.load(at, mask=inside, other=0.0).to(tl.float32))
    return tl.where(inside, keys, GREATEST)


@triton.jit
def least_of(low: tl.tensor, x: tl.tensor) -> tl.tensor:
    """The lesser of two blocks; NaN where either is."""
    return tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greatest_of(high: tl.tensor, x: tl.tensor) -> tl.tensor:
    """The greater of two blocks; NaN where either is."""
    return tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_part(parts_at: tl.tensor, part: tl.tensor, programs: tl.tensor, low: tl.tensor, high: tl.tensor) -> None:
    """Stores a part of a group's [2, programs], float32, infinite for NaN."""
    tl.store(parts_at + part, tl.min(tl.where(low == low, low, -INFINITY), 0))
    tl.store(parts_at + programs + part, tl.max(tl.where(high == high, high, INFINITY), 0))


@triton.jit
def extremes_of_part(
    values_at: tl.tensor,
    group: tl.tensor,
    part: tl.tensor,
    programs: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The least and the greatest of every BLOCK-th element of a part, [BLOCK] each; NaN where one is."""
    group = group.to(INDEX)
    lanes = tl.arange(0, BLOCK).to(INDEX)
    first = tl.load(values_at + place(group * 0, group, size, groups, inner, ONE_RUN)).to(tl.float32)
    high = tl.zeros((BLOCK,), tl.float32) + first
    low = high
    for tile in range(part, tl.cdiv(size, BLOCK), programs):
        j = tl.cast(tile, INDEX) * BLOCK + lanes
        x = tl.load(values_at + place(j, group, size, groups, inner, ONE_RUN), mask=j < size, other=0.0)
        x = tl.where(j < size, x.to(tl.float32), first)
        high = greatest_of(high, x)
        low = least_of(low, x)
    return low, high


@triton.jit
def extremes_kernel(
    values_at: tl.tensor,
    parts_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The extremes of parts of each group, float32 [groups, 2, programs]; grid (groups, programs)."""
    group, part, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    low, high = extremes_of_part(values_at, group, part, programs, size, groups, inner, INDEX, ONE_RUN, BLOCK)
    store_part(parts_at + group.to(tl.int64) * 2 * programs, part, programs, low, high)


@triton.jit
def extreme_of(parts: tl.tensor, side: tl.tensor, programs: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    """The least (side 0) or the greatest value of a group from its parts [2, programs], float32."""
    lanes = tl.arange(0, PARTS)
    sign = tl.where(side == 0, -1.0, 1.0)
    at = parts + side * programs + lanes
    values = tl.load(at, mask=lanes < programs, other=0.0, cache_modifier=".cg") * sign
    return sign * tl.max(tl.where(lanes < programs, values, -INFINITY), 0)


@triton.jit
def extreme_values_kernel(
    parts_at: tl.tensor, found_at: tl.tensor, programs: tl.tensor, PARTS: tl.constexpr
) -> None:
    """From parts [groups, 2, programs] to float64 [2, groups]; grid (groups, 2)."""
    group, side = tl.program_id(0), tl.program_id(1)
    value = extreme_of(parts_at + group * 2 * programs, side, programs, PARTS)
    tl.store(found_at + side * tl.num_programs(0) + group, value.to(tl.float64))


@triton.jit
def sorted_kernel(
    values_at: tl.tensor,
    ranks_at: tl.tensor,
    found_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The values of ranks, float64 [groups, ranks], of groups of at most BLOCK elements; grid (groups, ranks)."""
    keys = sampled_keys(values_at, tl.program_id(0), size, groups, inner, 1, INDEX, ONE_RUN, BLOCK)
    key = kth_key(keys, tl.load(ranks_at + tl.program_id(1)))
    at = found_at + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(at, value_of(key).to(tl.float64))


@triton.jit
def store_range(
    low: tl.tensor,
    high: tl.tensor,
    at: tl.tensor,
    half: tl.tensor,
    inside: tl.tensor,
    table_at: tl.tensor,
    low_at: tl.tensor,
    inverse_at: tl.tensor,
    finite_at: tl.tensor,
    LEVELS: tl.constexpr,
) -> None:
    """`scheme.make_table` of ranges, float32; and 0 to `finite` if one is not finite.

    The table is float32 [2, half], low and inverse are float64 [half], and `at` are places in these.
    """
    low = tl.where(low == 0.0, 0.0, low).to(tl.float64)
    span = tl.where(high == 0.0, 0.0, high).to(tl.float64) - low
    levels = span * 0.0 + LEVELS
    inverse = levels / tl.where(span > 0.0, span, 1.0)
    inverse = tl.where(span > 0.0, tl.where(inverse < LIMIT, inverse, LIMIT), 0.0)
    step = (span / levels).to(tl.float32)
    tl.store(table_at + at, low.to(tl.float32), mask=inside)
    tl.store(table_at + half + at, step, mask=inside)
    tl.store(low_at + at, low, mask=inside)
    tl.store(inverse_at + at, inverse, mask=inside)
    is_finite = (tl.abs(low) < INFINITY) & (tl.abs(step) < INFINITY)
    tl.store(finite_at + at * 0, 0, mask=inside & (is_finite == 0))


@triton.jit
def is_last(tickets_at: tl.tensor, programs: tl.tensor) -> tl.tensor:
    """Whether the other programs that take a ticket here have done so, and so have stored all they had to.

    What they stored is to be loaded with `cache_modifier=".cg"`. The tickets are 0 again afterwards.
    """
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets_at, 1, sem="acq_rel")
    if ticket == programs - 1:
        tl.store(tickets_at, 0)
    return ticket == programs - 1


@triton.jit
def sampled_ranges_kernel(
    values_at: tl.tensor,
    table_at: tl.tensor,
    low_at: tl.tensor,
    inverse_at: tl.tensor,
    finite_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    BUCKETS: tl.constexpr,
    LEVELS: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The ranges of a `ranges.RangeRule` that do not touch, of at most BLOCK elements; grid (groups, BUCKETS)."""
    group, bucket = tl.program_id(0), tl.program_id(1)
    chunk = tl.cdiv(size, BUCKETS)
    first = tl.minimum(bucket * chunk, size - 1)
    keys = sampled_keys(values_at, group, size, groups, inner, 1, INDEX, ONE_RUN, BLOCK)
    low, high = kth_key(keys, first), kth_key(keys, tl.minimum(first + chunk - 1, size - 1))
    at, half = group.to(tl.int64) * BUCKETS + bucket, tl.num_programs(0).to(tl.int64) * BUCKETS
    store_range(value_of(low), value_of(high), at, half, at >= 0, table_at, low_at, inverse_at, finite_at, LEVELS)


@triton.jit
def touching_ranges_kernel(
    values_at: tl.tensor,
    work_at: tl.tensor,
    tickets_at: tl.tensor,
    table_at: tl.tensor,
    low_at: tl.tensor,
    inverse_at: tl.tensor,
    finite_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    BUCKETS: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr,
) -> None:
    """The ranges of a `ranges.RangeRule` that touch, of at most SAMPLES sampled elements.

    Grid (groups, BUCKETS - 1 + programs): the first of a group look for the bounds between its ranges, the
    others for extremes of parts, at the same time, and who comes last makes the table. `work` is float32
    [groups, 2 * programs + BUCKETS - 1], tickets are int32 [groups], zeros.
    """
    group, number = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(1) - (BUCKETS - 1)
    work = work_at + group.to(tl.int64) * (2 * programs + BUCKETS - 1)
    bounds = work + 2 * programs
    if number < BUCKETS - 1:
        samples = tl.cdiv(size, stride)
        rank = tl.minimum((number + 1) * tl.cdiv(samples, BUCKETS), samples - 1)
        keys = sampled_keys(values_at, group, size, groups, inner, stride, INDEX, ONE_RUN, SAMPLES)
        tl.store(bounds + number, value_of(kth_key(keys, rank)))
    else:
        part = number - (BUCKETS - 1)
        low, high = extremes_of_part(values_at, group, part, programs, size, groups, inner, INDEX, ONE_RUN, BLOCK)
        store_part(work, part, programs, low, high)
    if is_last(tickets_at + group, tl.num_programs(1)):
        lanes = tl.arange(0, BUCKETS)
        between = tl.load(bounds + lanes, mask=lanes < BUCKETS - 1, other=0.0, cache_modifier=".cg")
        before = tl.load(bounds + lanes - 1, mask=lanes > 0, other=0.0, cache_modifier=".cg")
        low = tl.where(lanes == 0, extreme_of(work, 0, programs, PARTS), before)
        high = tl.where(lanes == BUCKETS - 1, extreme_of(work, 1, programs, PARTS), between)
        at, half = group.to(tl.int64) * BUCKETS + lanes, tl.num_programs(0).to(tl.int64) * BUCKETS
        store_range(low, high, at, half, lanes >= 0, table_at, low_at, inverse_at, finite_at, LEVELS)


@triton.jit
def column_ranges_kernel(
    values_at: tl.tensor,
    work_at: tl.tensor,
    tickets_at: tl.tensor,
    table_at: tl.tensor,
    low_at: tl.tensor,
    inverse_at: tl.tensor,
    finite_at: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    LEVELS: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The range of each column, in two dimensions; grid (cdiv(columns, COLUMNS), programs).

    `work` is float32 [programs, 2, columns], tickets are int32, zeros, one for each block of columns.
    """
    programs = tl.num_programs(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < columns
    lanes = tl.arange(0, ROWS)[:, None]
    first = tl.load(values_at + column, mask=is_column, other=0.0).to(tl.float32)
    low = tl.zeros((ROWS, COLUMNS), tl.float32) + first[None, :]
    high = low
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), programs):
        row = tl.cast(tile, INDEX) * ROWS + lanes
        inside = (row < rows) & is_column[None, :]
        x = tl.load(values_at + row * columns + column[None, :], mask=inside, other=0.0)
        x = tl.where(inside, x.to(tl.float32), first[None, :])
        high = greatest_of(high, x)
        low = least_of(low, x)
    least = tl.min(tl.where(low == low, low, -INFINITY), 0)
    greatest = tl.max(tl.where(high == high, high, INFINITY), 0)
    part = work_at + tl.program_id(1).to(tl.int64) * 2 * columns + column
    tl.store(part, least, mask=is_column)
    tl.store(part + columns, greatest, mask=is_column)
    if is_last(tickets_at + tl.program_id(0), programs):
        lows = tl.zeros((ROWS, COLUMNS), tl.float32) + INFINITY
        highs = -lows
        for start in range(0, programs, ROWS):
            among = (start + lanes < programs) & is_column[None, :]
            at = work_at + (start + lanes).to(tl.int64) * 2 * columns + column[None, :]
            lows = tl.minimum(lows, tl.load(at, mask=among, other=INFINITY, cache_modifier=".cg"))
            highs = tl.maximum(highs, tl.load(at + columns, mask=among, other=-INFINITY, cache_modifier=".cg"))
        below, above = tl.min(lows, 0), tl.max(highs, 0)
        store_range(below, above, column, columns, is_column, table_at, low_at, inverse_at, finite_at, LEVELS)
