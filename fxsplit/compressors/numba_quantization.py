"""Codes and values of the range quantizers, as loops for numba; see `scheme.Scheme` for the arithmetic.

Here the codes are not clamped, since they cannot leave their range: with x in [minimum, maximum], v = (x -
minimum) * inverse is in [0, levels * (1 + 2**-51)], which rounds to at most `levels`; and v + u stays below
levels + 1, from which u keeps a distance of 2**-33.

A run is a stretch of elements that share a group. Tables are `[buckets, groups]`; in those of the kernels
that go by columns, [buckets, columns], element i belongs to column i % columns.

For `cpu_kernels` only: this module needs numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fxsplit.compressors.numba_support import kernel

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Seeds = npt.NDArray[np.uint64]

PART = 1024
"""Elements that go through several loops while they are in the first-level cache."""

MAX_COMPARED = 64
"""Up to so many buckets, comparing with each minimum in turn is faster than a binary search an element."""


@kernel
def extremes(bits: Array, flip: np.signedinteger, keys: Array) -> None:
    """Lowers keys[0] and raises keys[1], `[2, groups]`, to the extremes of `bits` [outer, groups, inner].

    The bits are read as signed integers. A key is what orders floats as integers: their bits with, where they
    are negative, all but the sign inverted by `flip`.
    """
    for outer in range(bits.shape[0]):
        for group in range(bits.shape[1]):
            run = bits[outer, group]
            low, high = keys[0, group], keys[1, group]
            for k in range(run.size):
                key = run[k] ^ flip if run[k] < 0 else run[k]
                low = min(low, key)
                high = max(high, key)
            keys[0, group], keys[1, group] = low, high


@kernel
def column_extremes(bits: Array, flip: np.signedinteger, keys: Array) -> None:
    """As `extremes`, for the columns of `bits`, signed `[rows, columns]`."""
    low, high = keys[0], keys[1]
    for row in range(bits.shape[0]):
        run = bits[row]
        for k in range(run.size):
            key = run[k] ^ flip if run[k] < 0 else run[k]
            low[k] = min(low[k], key)
            high[k] = max(high[k], key)


@kernel
def quantize_one(values: Array, start: int, inner: int, minima: Floats, inverse: Floats, codes: Array) -> None:
    """The codes of values from element `start` on, to the nearest, with one bucket."""
    done = 0
    while done < values.size:
        run = (start + done) // inner
        stop = min(values.size, (run + 1) * inner - start)
        part, out = values[done:stop], codes[done:stop]
        minimum, scale = minima[0, run % minima.shape[1]], inverse[0, run % minima.shape[1]]
        for k in range(part.size):
            out[k] = np.int32(np.rint((np.float64(part[k]) - minimum) * scale))
        done = stop


@kernel
def quantize_nibbles(
    values: Array, start: int, inner: int, minima: Floats, inverse: Floats, packed: Array
) -> None:
    """As `quantize_one` with codes of 4 bits, two to a byte; `start` and `inner` are even."""
    done = 0
    while done < packed.size:
        run = (start + 2 * done) // inner
        stop = min(packed.size, ((run + 1) * inner - start) // 2)
        part, out = values[2 * done : 2 * stop], packed[done:stop]
        minimum, scale = minima[0, run % minima.shape[1]], inverse[0, run % minima.shape[1]]
        for k in range(out.size):
            low = np.int32(np.rint((np.float64(part[2 * k]) - minimum) * scale))
            high = np.int32(np.rint((np.float64(part[2 * k + 1]) - minimum) * scale))
            out[k] = low | high << 4
        done = stop


@kernel
def quantize_two(
    values: Array, start: int, inner: int, bounds: Array, minima: Floats, inverse: Floats, width: int, codes: Array
) -> None:
    """As `quantize_one`, with two buckets; `bounds` are the minima in the dtype of the values."""
    done = 0
    while done < values.size:
        run = (start + done) // inner
        stop = min(values.size, (run + 1) * inner - start)
        part, out = values[done:stop], codes[done:stop]
        g = run % minima.shape[1]
        bound, low, high, low_scale, high_scale = (
            bounds[1, g],
            minima[0, g],
            minima[1, g],
            inverse[0, g],
            inverse[1, g],
        )
        for k in range(part.size):
            minimum, scale, base = low, low_scale, 0
            if part[k] >= bound:
                minimum, scale, base = high, high_scale, width
            out[k] = np.int32(np.rint((np.float64(part[k]) - minimum) * scale)) + base
        done = stop


@kernel
def quantize_four(
    values: Array, start: int, inner: int, bounds: Array, minima: Floats, inverse: Floats, width: int, codes: Array
) -> None:
    """As `quantize_two`, with four buckets."""
    done = 0
    while done < values.size:
        run = (start + done) // inner
        stop = min(values.size, (run + 1) * inner - start)
        part, out = values[done:stop], codes[done:stop]
        g = run % minima.shape[1]
        e1, e2, e3 = bounds[1, g], bounds[2, g], bounds[3, g]
        m0, m1, m2, m3 = minima[0, g], minima[1, g], minima[2, g], minima[3, g]
        s0, s1, s2, s3 = inverse[0, g], inverse[1, g], inverse[2, g], inverse[3, g]
        for k in range(part.size):
            minimum, scale, base = m0, s0, 0
            if part[k] >= e1:
                minimum, scale, base = m1, s1, width
            if part[k] >= e2:
                minimum, scale, base = m2, s2, 2 * width
            if part[k] >= e3:
                minimum, scale, base = m3, s3, 3 * width
            out[k] = np.int32(np.rint((np.float64(part[k]) - minimum) * scale)) + base
        done = stop


@kernel
def quantize_any(
    values: Array,
    start: int,
    inner: int,
    bounds: Array,
    minima: Floats,
    inverse: Floats,
    width: int,
    seeds: Seeds,
    index: Array,
    scratch: Floats,
    codes: Array,
) -> None:
    """With any number of buckets, by columns if `inner` is 0, and stochastic if there are `seeds` [groups].

    `index`, of integers, and `scratch` are memory for `PART` numbers each.
    """
    buckets, groups = minima.shape
    done = 0
    while done < values.size:
        first, step, stop = _next_part(values.size, start, done, inner, groups)
        part, out = values[done:stop], codes[done:stop]
        places, scaled = index[: part.size], scratch[: part.size]
        if buckets == 1 and step == 0:
            minimum, scale = minima[0, first], inverse[0, first]
            for k in range(part.size):
                places[k] = 0
                scaled[k] = (np.float64(part[k]) - minimum) * scale
        else:
            _find_buckets(part, bounds, first, step, places)
            for k in range(part.size):
                bucket, column = np.int64(places[k]), first + k * step
                scaled[k] = (np.float64(part[k]) - minima[bucket, column]) * inverse[bucket, column]
        if seeds.size:
            _dither(start + done, seeds[first : first + 1 + (part.size - 1) * step], scaled)
        for k in range(part.size):
            out[k] = np.int32(np.floor(scaled[k]) if seeds.size else np.rint(scaled[k])) + places[k] * width
        done = stop


@kernel
def find(values: Array, start: int, inner: int, bounds: Array, codes: Array) -> None:
    """As `quantize_any` where the bucket is the code."""
    groups, done = bounds.shape[1], 0
    while done < values.size:
        first, step, stop = _next_part(values.size, start, done, inner, groups)
        _find_buckets(values[done:stop], bounds, first, step, codes[done:stop])
        done = stop


@kernel
def round_at_random(
    values: Array,
    start: int,
    inner: int,
    inverse: Floats,
    seeds: Seeds,
    limits: tuple[float, float, float],
    scratch: Floats,
    rounded: Array,
) -> None:
    """As `torch_kernels.round_at_random`, for elements from `start` on; by columns if `inner` is 0.

    `limits` are the least normal number of the dtype, its epsilon, and its greatest number; `scratch` is memory
    for `[2, PART]` numbers.
    """
    least, epsilon, most = limits
    groups, done = inverse.size, 0
    scaled, units = scratch[0], scratch[1]
    bits, unit_bits = scaled.view(np.int64), units.view(np.int64)
    while done < values.size:
        first, step, stop = _next_part(values.size, start, done, inner, groups)
        part, out = values[done:stop], rounded[done:stop]
        for k in range(part.size):
            scaled[k] = np.float64(part[k]) * inverse[first + k * step]
        for k in range(part.size):
            unit_bits[k] = bits[k] & 0x7FF0000000000000
        for k in range(part.size):
            units[k] = max(units[k], least) * epsilon
            scaled[k] /= units[k]
        _dither(start + done, seeds[first : first + 1 + (part.size - 1) * step], scaled[: part.size])
        for k in range(part.size):
            out[k] = min(max(np.floor(scaled[k]) * units[k], -most), most)
        done = stop


@kernel
def _next_part(size: int, start: int, done: int, inner: int, groups: int) -> tuple[int, int, int]:
    """Of at most `PART` values from `done` on, of a block that begins with element `start`.

    Returns:
        The group of the first; how much further that of the next is, 1 by columns, where `inner` is 0, and else
        0; and where the part ends in the block.
    """
    if inner > 0:
        run = (start + done) // inner
        return run % groups, 0, min(size, (run + 1) * inner - start, done + PART)
    first = (start + done) % groups
    return first, 1, min(size, done + groups - first, done + PART)


@kernel
def _find_buckets(part: Array, bounds: Array, first: int, step: int, places: Array) -> None:
    """Fills `places` with the buckets of values of group `first`, or of the columns from there on."""
    buckets = bounds.shape[0]
    for k in range(part.size):
        places[k] = 0
    if buckets <= MAX_COMPARED and step == 0:
        for bucket in range(1, buckets):
            bound = bounds[bucket, first]
            for k in range(part.size):
                places[k] += part[k] >= bound
    elif buckets <= MAX_COMPARED:
        for bucket in range(1, buckets):
            row = bounds[bucket, first : first + part.size]
            for k in range(part.size):
                places[k] += part[k] >= row[k]
    else:
        for k in range(part.size):
            low, half = 0, buckets >> 1
            while half > 0:  # no branch on the values: it would be guessed wrong every second time
                low += half * np.int64(part[k] >= bounds[low + half, first + k * step])
                half >>= 1
            places[k] = low


@kernel
def _dither(start: int, seeds: Seeds, scaled: Floats) -> None:
    """Adds u, see `scheme.dither`, to scaled values of elements from `start` on: of one seed, or with one each."""
    low, one, seed = np.uint64(0xFFFFFFFF), seeds.size == 1, seeds[0]
    for k in range(scaled.size):
        number = (np.uint64(start + k) + (seed if one else seeds[k])) & low
        number ^= number >> np.uint64(16)
        number = (number * np.uint64(0x7FEB352D)) & low
        number ^= number >> np.uint64(15)
        number = (number * np.uint64(0x846CA68B)) & low
        number ^= number >> np.uint64(16)
        scaled[k] += (np.float64(np.int64(number)) + 0.5) * 2.0**-32


@kernel
def lookup(codes: Array, start: int, inner: int, table: Array, values: Array) -> None:
    """values[k] = table[group, codes[k]], for elements from `start` on; `table` is `[groups, 2**bits]`."""
    done = 0
    while done < codes.size:
        run = (start + done) // inner
        stop = min(codes.size, (run + 1) * inner - start)
        part, out, row = codes[done:stop], values[done:stop], table[run % table.shape[0]]
        for k in range(part.size):
            out[k] = row[part[k]]
        done = stop


@kernel
def reconstruct_one(
    codes: Array, start: int, inner: int, minima: Floats, steps: Floats, limit: float, values: Array
) -> None:
    """values[k] = minimum + step * code, held to +- `limit`, with one bucket."""
    done = 0
    while done < codes.size:
        run = (start + done) // inner
        stop = min(codes.size, (run + 1) * inner - start)
        part, out = codes[done:stop], values[done:stop]
        minimum, step = minima[0, run % minima.shape[1]], steps[0, run % minima.shape[1]]
        for k in range(part.size):
            out[k] = min(max(minimum + step * part[k], -limit), limit)
        done = stop


@kernel
def reconstruct(
    codes: Array, start: int, inner: int, minima: Floats, steps: Floats, shift: int, limit: float, values: Array
) -> None:
    """As `reconstruct_one`, with any number of buckets; by columns if `inner` is 0."""
    groups, mask = minima.shape[1], (1 << shift) - 1
    done = 0
    while done < codes.size:
        if inner > 0:
            run = (start + done) // inner
            first, step, stop = run % groups, 0, min(codes.size, (run + 1) * inner - start)
        else:
            first, step = (start + done) % groups, 1
            stop = min(codes.size, done + groups - first)
        part, out = codes[done:stop], values[done:stop]
        for k in range(part.size):
            bucket = np.int64(part[k]) >> shift
            offset = steps[bucket, first + k * step] * (part[k] & mask)
            out[k] = min(max(minima[bucket, first + k * step] + offset, -limit), limit)
        done = stop


@kernel
def pack(codes: Array, bits: int, packed: Array) -> None:
    """As `packing.pack`; the codes are a multiple of 8."""
    if bits == 4:
        for k in range(packed.size):
            packed[k] = codes[2 * k] | codes[2 * k + 1] << 4
        return
    half, width = np.uint64(4 * bits), np.uint64(bits)
    for group in range(codes.size // 8):
        eight, out = codes[8 * group : 8 * group + 8], packed[group * bits : group * bits + bits]
        low, high = np.uint64(0), np.uint64(0)
        for k in range(4):
            low |= np.uint64(eight[k]) << (width * np.uint64(k))
            high |= np.uint64(eight[k + 4]) << (width * np.uint64(k))
        low |= high << half
        high >>= np.uint64(64) - half
        for k in range(min(bits, 8)):
            out[k] = np.uint8(low >> np.uint64(8 * k))
        for k in range(8, bits):
            out[k] = np.uint8(high >> np.uint64(8 * k - 64))


@kernel
def unpack(packed: Array, bits: int, codes: Array) -> None:
    """As `packing.unpack`; the codes are a multiple of 8."""
    if bits == 4:
        for k in range(packed.size):
            codes[2 * k] = packed[k] & 15
            codes[2 * k + 1] = packed[k] >> 4
        return
    half, width = np.uint64(4 * bits), np.uint64(bits)
    mask = (np.uint64(1) << width) - np.uint64(1)
    for group in range(codes.size // 8):
        eight, source = codes[8 * group : 8 * group + 8], packed[group * bits : group * bits + bits]
        low, high = np.uint64(0), np.uint64(0)
        for k in range(min(bits, 8)):
            low |= np.uint64(source[k]) << np.uint64(8 * k)
        for k in range(8, bits):
            high |= np.uint64(source[k]) << np.uint64(8 * k - 64)
        high = (high << (np.uint64(64) - half)) | (low >> half)
        for k in range(4):
            eight[k] = (low >> (width * np.uint64(k))) & mask
            eight[k + 4] = (high >> (width * np.uint64(k))) & mask
