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
def kth_keys(keys: tl.tensor, k: tl.tensor, also_k: tl.tensor) -> tl.tensor:
    """The keys of two ranks, from 0, of at most 2**15 keys; GREATEST stands for no key.

    Of each, the key is above `low` and up to `high`. Both searches ask at one place at a time, mostly where the
    key would be if values were equally likely, and count in the halves of one sum.
    """
    is_key = keys != GREATEST
    least = tl.min(keys, 0)
    greatest = tl.max(tl.where(is_key, keys, least), 0)
    number = tl.sum(is_key.to(tl.int32), 0)
    low = tl.maximum(least, -GREATEST) - 1  # that of a NaN may be the least of all integers
    low_count, high, high_count = number * 0, greatest, number
    also_low, also_low_count, also_high, also_high_count = low, low_count, high, high_count
    step = number * 0
    going = (low + 1 < high) & (number > 1)
    while going:
        at = between(k, low, low_count, high, high_count, step)
        also_at = between(also_k, also_low, also_low_count, also_high, also_high_count, step)
        counts = tl.sum((keys <= at).to(tl.int32) + ((keys <= also_at).to(tl.int32) << 16), 0)
        count, also_count = counts & 0xFFFF, (counts >> 16) & 0xFFFF
        low, low_count = tl.where(count > k, low, at), tl.where(count > k, low_count, count)
        high, high_count = tl.where(count > k, at, high), tl.where(count > k, count, high_count)
        also_more = also_count > also_k
        also_low_count = tl.where(also_more, also_low_count, also_count)
        also_low = tl.where(also_more, also_low, also_at)
        also_high_count = tl.where(also_more, also_count, also_high_count)
        also_high = tl.where(also_more, also_at, also_high)
        step += 1
        going = (low + 1 < high) & (high_count - low_count > 1)
        going = going | ((also_low + 1 < also_high) & (also_high_count - also_low_count > 1))
    key = tl.min(tl.where(keys > low, keys, GREATEST), 0)
    return key, tl.min(tl.where(keys > also_low, keys, GREATEST), 0)


@triton.jit
def between(
    k: tl.tensor,
    low: tl.tensor,
    low_count: tl.tensor,
    high: tl.tensor,
    high_count: tl.tensor,
    step: tl.tensor,
) -> tl.tensor:
    """A key from `low` to `high` - 1 to ask at; every third in the middle, so that the end is near at worst."""
    middle = ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)
    first, last = value_of(low), value_of(high)
    share = (k - low_count + 0.5) / tl.maximum(high_count - low_count, 1).to(tl.float32)
    guess = first * (1 - share) + last * share
    is_usual = (guess >= first) & (guess < last) & (step % 3 < 2)  # not if an end is NaN
    at = tl.where(is_usual, float_key(guess), middle)
    at = tl.minimum(tl.maximum(at, low), high - 1)
    return tl.where(at == low, tl.minimum(low + 1, high - 1), at)


@triton.jit
def kth_key(keys: tl.tensor, k: tl.tensor) -> tl.tensor:
    """The key of a rank; see `kth_keys`."""
    key, _ = kth_keys(keys, k, k)
    return key


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
def store_part(parts_at: tl.tensor, low: tl.tensor, high: tl.tensor) -> None:
    """Stores a program's part of [groups, 2, programs], float32, infinite for NaN; grid (groups, programs)."""
    part = parts_at + tl.program_id(0).to(tl.int64) * 2 * tl.num_programs(1) + tl.program_id(1)
    tl.store(part, tl.min(tl.where(low == low, low, -INFINITY), 0))
    tl.store(part + tl.num_programs(1), tl.max(tl.where(high == high, high, INFINITY), 0))


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
    """The least and the greatest value of parts of each group; see `store_part`."""
    group = tl.program_id(0).to(INDEX)
    lanes = tl.arange(0, BLOCK).to(INDEX)
    first = tl.load(values_at + place(group * 0, group, size, groups, inner, ONE_RUN)).to(tl.float32)
    high = tl.zeros((BLOCK,), tl.float32) + first
    low = high
    for tile in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
        j = tl.cast(tile, INDEX) * BLOCK + lanes
        x = tl.load(values_at + place(j, group, size, groups, inner, ONE_RUN), mask=j < size, other=0.0)
        x = tl.where(j < size, x.to(tl.float32), first)
        high = greatest_of(high, x)
        low = least_of(low, x)
    store_part(parts_at, low, high)


@triton.jit
def extreme_of(parts: tl.tensor, side: tl.tensor, programs: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    """The least (side 0) or the greatest value of a group from its parts [2, programs], float32."""
    lanes = tl.arange(0, PARTS)
    sign = tl.where(side == 0, -1.0, 1.0)
    values = tl.load(parts + side * programs + lanes, mask=lanes < programs, other=0.0) * sign
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
    table_at: tl.tensor,
    low_at: tl.tensor,
    inverse_at: tl.tensor,
    finite_at: tl.tensor,
    LEVELS: tl.constexpr,
) -> None:
    """`scheme.make_table` of one range, float32; and 0 to `finite` if that is not finite.

    The table is float32 [2, groups, buckets], low and inverse are float64 [groups, buckets].
    """
    low = tl.where(low == 0.0, 0.0, low).to(tl.float64)
    span = tl.where(high == 0.0, 0.0, high).to(tl.float64) - low
    levels = span * 0.0 + LEVELS
    inverse = levels / tl.where(span > 0.0, span, 1.0)
    inverse = tl.where(span > 0.0, tl.where(inverse < LIMIT, inverse, LIMIT), 0.0)
    step = (span / levels).to(tl.float32)
    tl.store(table_at + at, low.to(tl.float32))
    tl.store(table_at + tl.num_programs(0) * tl.num_programs(1) + at, step)
    tl.store(low_at + at, low)
    tl.store(inverse_at + at, inverse)
    is_finite = (tl.abs(low) < INFINITY) & (tl.abs(step) < INFINITY)
    tl.store(finite_at, 0, mask=is_finite == 0)


@triton.jit
def sampled_ranges_kernel(
    values_at: tl.tensor,
    parts_at: tl.tensor,
    table_at: tl.tensor,
    low_at: tl.tensor,
    inverse_at: tl.tensor,
    finite_at: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    programs: tl.tensor,
    TOUCHING: tl.constexpr,
    BUCKETS: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    INDEX: tl.constexpr,
    ONE_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The ranges of `ranges.RangeRule` from at most BLOCK sampled elements; grid (groups, buckets).

    TOUCHING takes the extremes from `parts`, see `extremes_kernel`; with one bucket no more is looked at.
    """
    group, bucket = tl.program_id(0), tl.program_id(1)
    parts = parts_at + group.to(tl.int64) * 2 * programs
    samples = tl.cdiv(size, stride)
    chunk = tl.cdiv(samples, BUCKETS)
    first = tl.minimum(bucket * chunk, samples - 1)
    if TOUCHING:
        last = tl.minimum(first + chunk, samples - 1)
        low, high = extreme_of(parts, 0, programs, PARTS), extreme_of(parts, 1, programs, PARTS)
        if BUCKETS > 1:
            keys = sampled_keys(values_at, group, size, groups, inner, stride, INDEX, ONE_RUN, BLOCK)
            low_key, high_key = kth_keys(keys, first, last)
            low = tl.where(bucket > 0, value_of(low_key), low)
            high = tl.where(bucket < BUCKETS - 1, value_of(high_key), high)
    else:
        last = tl.minimum(first + chunk - 1, samples - 1)
        keys = sampled_keys(values_at, group, size, groups, inner, stride, INDEX, ONE_RUN, BLOCK)
        low_key, high_key = kth_keys(keys, first, last)
        low, high = value_of(low_key), value_of(high_key)
    at = group.to(tl.int64) * BUCKETS + bucket
    store_range(low, high, at, table_at, low_at, inverse_at, finite_at, LEVELS)
