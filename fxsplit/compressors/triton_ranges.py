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
def kth_key(keys: tl.tensor, k: tl.tensor) -> tl.tensor:
    """The key of rank k, from 0: the least number that more than k are up to; GREATEST stands for no key.

    Each step asks at three places at once, in parts of 21 bits of one sum.
    """
    low = tl.min(keys, 0).to(tl.int64)
    high = tl.max(tl.where(keys == GREATEST, tl.min(keys, 0), keys), 0).to(tl.int64)
    while low < high:
        span = high - low
        first, second, third = low + (span >> 2), low + (span >> 1), low + ((3 * span) >> 2)
        asked = (keys <= first.to(tl.int32)).to(tl.int64)
        asked += tl.where(keys <= second.to(tl.int32), 1 << 21, 0).to(tl.int64)
        asked += tl.where(keys <= third.to(tl.int32), 1, 0).to(tl.int64) << 42
        counts = tl.sum(asked, 0)
        more1, more2 = (counts & 0x1FFFFF) > k, ((counts >> 21) & 0x1FFFFF) > k
        more3 = (counts >> 42) > k
        low = tl.where(more1, low, tl.where(more2, first + 1, tl.where(more3, second + 1, third + 1)))
        high = tl.where(more1, first, tl.where(more2, second, tl.where(more3, third, high)))
    return low.to(tl.int32)


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
    """Parts [groups, 2, programs]: the greatest inverted and the greatest plain key; grid (groups, programs)."""
    group = tl.program_id(0).to(INDEX)
    lanes = tl.arange(0, BLOCK).to(INDEX)
    first = tl.load(values_at + place(group * 0, group, size, groups, inner, ONE_RUN)).to(tl.float32)
    high = tl.zeros((BLOCK,), tl.int32) + float_key(first)
    low = ~high
    for tile in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
        j = tl.cast(tile, INDEX) * BLOCK + lanes
        x = tl.load(values_at + place(j, group, size, groups, inner, ONE_RUN), mask=j < size, other=0.0)
        key = float_key(tl.where(j < size, x.to(tl.float32), first))
        high = tl.maximum(high, key)
        low = tl.maximum(low, ~key)
    part = parts_at + tl.program_id(0) * 2 * tl.num_programs(1) + tl.program_id(1)
    tl.store(part, tl.max(low, 0))
    tl.store(part + tl.num_programs(1), tl.max(high, 0))


@triton.jit
def extreme_of(parts: tl.tensor, side: tl.tensor, programs: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    """The least (side 0) or the greatest value of a group from its parts [2, programs], float32."""
    lanes = tl.arange(0, PARTS)
    keys = tl.load(parts + side * programs + lanes, mask=lanes < programs, other=-GREATEST - 1)
    greatest = tl.max(keys, 0)
    return value_of(tl.where(side == 0, ~greatest, greatest))


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
            if bucket > 0:
                low = value_of(kth_key(keys, first))
            if bucket < BUCKETS - 1:
                high = value_of(kth_key(keys, last))
    else:
        last = tl.minimum(first + chunk - 1, samples - 1)
        keys = sampled_keys(values_at, group, size, groups, inner, stride, INDEX, ONE_RUN, BLOCK)
        low, high = value_of(kth_key(keys, first)), value_of(kth_key(keys, last))
    at = group.to(tl.int64) * BUCKETS + bucket
    store_range(low, high, at, table_at, low_at, inverse_at, finite_at, LEVELS)
