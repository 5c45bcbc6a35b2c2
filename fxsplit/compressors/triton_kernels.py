"""Codes and values of the range quantizers, for Triton; see `scheme.Scheme` for the arithmetic.

A program does rows of 8 neighbouring elements, whose codes of b bits are b bytes. Every operation in float64
is rounded on its own: launch these with `enable_fp_fusion=False`. As in `numba_quantization`, the codes need
no clamping; they are cut to their bits, so that values that are not finite do no harm before they are found.

For `cuda_kernels` only: this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

SNAP = tl.constexpr(6755399441055744.0)
"""1.5 * 2**52: added to a float64, it leaves the nearest integer, ties to even, in the lowest bits."""


@triton.jit
def mix(number: tl.tensor) -> tl.tensor:
    """`scheme.mix`, of uint32."""
    number ^= number >> 16
    number *= 0x7FEB352D
    number ^= number >> 15
    number *= 0x846CA68B
    return number ^ (number >> 16)


@triton.jit
def seeds_kernel(
    table_at: tl.tensor, seeds_at: tl.tensor, half: tl.tensor, words: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """`scheme.seeds`: uint32 [groups], of a table of int32 words [2, groups, words]; grid (groups,)."""
    group = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.uint32)
    for start in range(0, 2 * words, BLOCK):
        j = start + tl.arange(0, BLOCK)
        at = table_at + j // words * half + group * words + j % words
        word = tl.load(at, mask=j < 2 * words, other=0).to(tl.uint32, bitcast=True)
        hashed = mix(word + (j + 1).to(tl.uint32) * 0x9E3779B9)
        total += tl.where(j < 2 * words, hashed, 0)
    tl.store(seeds_at + group, mix(tl.sum(total, 0)))


@triton.jit
def group_row(
    index: tl.tensor,
    row: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    ONE_GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """The groups of rows of 8 elements: of each row, [rows, 1], if runs are whole rows; else of each element."""
    if ONE_GROUP:
        return tl.zeros((1, 1), tl.int32)
    elif ALIGNED:
        return ((row * 8 // inner) % groups)[:, None]
    else:
        return (index // inner) % groups


@triton.jit
def encode_kernel(
    values_at: tl.tensor,
    packed_at: tl.tensor,
    minima_at: tl.tensor,
    inverse_at: tl.tensor,
    seeds_at: tl.tensor,
    count: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Packed codes, in units of the greatest power of two up to 8 bytes that divides BITS.

    The grid is (cdiv(rows, ROWS),), and `packed_at` has room for whole rows. WIDE is the dtype in which values
    are compared with minima: that of the table.
    """
    BUCKETS: tl.constexpr = 1 << SPLIT
    LEVELS: tl.constexpr = (1 << (BITS - SPLIT)) - 1
    # From the end, which was read last when the ranges were found, and may be in the cache.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(INDEX) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = index < count
    x = tl.load(values_at + index, mask=inside, other=0.0).to(WIDE)
    first = group_row(index, row, groups, inner, ONE_GROUP, ALIGNED) * BUCKETS
    bucket = tl.zeros((ROWS, 8), tl.int32)
    if BUCKETS == 4:
        # Choosing among numbers in registers is faster than loading one for each element. Minima are elements.
        minimum0, minimum1 = tl.load(minima_at + first).to(WIDE), tl.load(minima_at + first + 1).to(WIDE)
        minimum2, minimum3 = tl.load(minima_at + first + 2).to(WIDE), tl.load(minima_at + first + 3).to(WIDE)
        upper = x >= minimum2
        odd = x >= tl.where(upper, minimum3, minimum1)
        bucket = tl.where(upper, 2, 0) + odd.to(tl.int32)
        minimum = tl.where(upper, tl.where(odd, minimum3, minimum2), tl.where(odd, minimum1, minimum0))
        inverse0, inverse1 = tl.load(inverse_at + first), tl.load(inverse_at + first + 1)
        inverse2, inverse3 = tl.load(inverse_at + first + 2), tl.load(inverse_at + first + 3)
        inverse = tl.where(upper, tl.where(odd, inverse3, inverse2), tl.where(odd, inverse1, inverse0))
        minimum = minimum.to(tl.float64)
    else:
        for step in tl.static_range(SPLIT):
            probe = bucket + (BUCKETS >> (step + 1))
            bucket = tl.where(x >= tl.load(minima_at + first + probe).to(WIDE), probe, bucket)
        minimum = tl.load(minima_at + first + bucket)
        inverse = tl.load(inverse_at + first + bucket)
    scaled = (x.to(tl.float64) - minimum) * inverse
    if STOCHASTIC:
        seed = tl.load(seeds_at + first // BUCKETS)
        u = (mix(index.to(tl.uint32) + seed).to(tl.float64) + 0.5) * 2.3283064365386963e-10
        offset = (scaled + u).to(tl.int32)
    else:
        offset = (scaled + SNAP).to(tl.int64, bitcast=True).to(tl.int32)
    code = tl.where(inside, (bucket << (BITS - SPLIT)) | (offset & LEVELS), 0)
    store_codes(code, packed_at, row, row * 8 < count, BITS, ROWS)


@triton.jit
def store_codes(
    code: tl.tensor,
    packed_at: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Stores codes [ROWS, 8], packed."""
    UNIT: tl.constexpr = packed_at.dtype.element_ty.primitive_bitwidth
    UNITS: tl.constexpr = 8 * BITS // UNIT
    if BITS <= 8:
        shifts = (tl.arange(0, 4) * BITS)[None, None, :]
        halves = tl.sum(tl.reshape(code, (ROWS, 2, 4)) << shifts, 2).to(tl.uint32, bitcast=True)
        first, second = tl.split(halves)
        low = first.to(tl.uint64) | (second.to(tl.uint64) << (4 * BITS))
        high = low
    else:
        shifts = (tl.arange(0, 4) * BITS)[None, None, :].to(tl.uint64)
        halves = tl.sum(tl.reshape(code, (ROWS, 2, 4)).to(tl.uint64) << shifts, 2)
        low, high = tl.split(halves)
        if BITS < 16:
            low, high = low | (high << (4 * BITS)), high >> (64 - 4 * BITS)
    for unit in tl.static_range(UNITS):
        part = low >> (unit * UNIT) if unit * UNIT < 64 else high >> (unit * UNIT - 64)
        tl.store(packed_at + row * UNITS + unit, part.to(packed_at.dtype.element_ty), mask=inside)


@triton.jit
def decode_kernel(
    packed_at: tl.tensor,
    table_at: tl.tensor,
    values_at: tl.tensor,
    count: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    LIMIT: tl.constexpr,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Values of packed codes, which have room for whole rows, by a table [2, groups, 2**SPLIT]."""
    BUCKETS: tl.constexpr = 1 << SPLIT
    LEVELS: tl.constexpr = (1 << (BITS - SPLIT)) - 1
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    code = load_codes(packed_at, row, row * 8 < count, BITS, ROWS)
    first = group_row(index, row, groups, inner, ONE_GROUP, ALIGNED) * BUCKETS
    steps_at = table_at + groups * BUCKETS
    if BUCKETS <= 4:
        minimum = tl.broadcast_to(tl.load(table_at + first).to(tl.float64), (ROWS, 8))
        step = tl.broadcast_to(tl.load(steps_at + first).to(tl.float64), (ROWS, 8))
        for j in tl.static_range(1, BUCKETS):
            above = code >= (j << (BITS - SPLIT))
            minimum = tl.where(above, tl.load(table_at + first + j).to(tl.float64), minimum)
            step = tl.where(above, tl.load(steps_at + first + j).to(tl.float64), step)
    else:
        bucket = first + (code >> (BITS - SPLIT))
        minimum = tl.load(table_at + bucket).to(tl.float64)
        step = tl.load(steps_at + bucket).to(tl.float64)
    value = (minimum + step * (code & LEVELS).to(tl.float64)).to(table_at.dtype.element_ty)
    value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
    tl.store(values_at + index, value.to(values_at.dtype.element_ty), mask=index < count)


@triton.jit
def load_codes(
    packed_at: tl.tensor, row: tl.tensor, inside: tl.tensor, BITS: tl.constexpr, ROWS: tl.constexpr
) -> tl.tensor:
    """Packed codes as int32 [ROWS, 8]; the inverse of `store_codes`."""
    UNIT: tl.constexpr = packed_at.dtype.element_ty.primitive_bitwidth
    UNITS: tl.constexpr = 8 * BITS // UNIT
    low = tl.zeros((ROWS,), tl.uint64)
    high = tl.zeros((ROWS,), tl.uint64)
    for unit in tl.static_range(UNITS):
        part = tl.load(packed_at + row * UNITS + unit, mask=inside, other=0).to(tl.uint64)
        if unit * UNIT < 64:
            low |= part << (unit * UNIT)
        else:
            high |= part << (unit * UNIT - 64)
    lane = tl.arange(0, 8)[None, :]
    if BITS <= 8:
        words = low[:, None] >> (lane * BITS).to(tl.uint64)
    else:
        if BITS < 16:
            high = (low >> (4 * BITS)) | (high << (64 - 4 * BITS))
        words = tl.where(lane < 4, low[:, None], high[:, None]) >> (lane % 4 * BITS).to(tl.uint64)
    return (words & ((1 << BITS) - 1)).to(tl.int32)
