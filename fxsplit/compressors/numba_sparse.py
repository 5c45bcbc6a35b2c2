"""Top-k as loops for numba: histograms of magnitudes, and positions packed as they are found; see `positions`.

For `cpu_sparse` only: this module needs numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fxsplit.compressors.numba_support import kernel

Bits = npt.NDArray[np.unsignedinteger]
Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@kernel
def count_magnitudes(
    bits: Bits, most: np.unsignedinteger, above: int, shift: int, prefixed: bool, counts: Integers
) -> None:
    """Counts magnitudes by the 16 bits from `shift` on; if `prefixed`, those whose bits above are `above`.

    A magnitude is the bits of a float without that of the sign, which `most` has not.
    """
    for k in range(bits.size):
        cells = np.int64((bits[k] & most) >> shift)
        if not prefixed or cells >> 16 == above:
            counts[cells & 0xFFFF] += 1


@kernel
def gather(
    bits: Bits,
    most: np.unsignedinteger,
    bound: np.unsignedinteger,
    ties: int,
    low_bits: int,
    kept: Bits,
    low: Bytes,
    high: Bytes,
) -> None:
    """Copies the elements of magnitudes above `bound` and the first `ties` that have it, and their positions.

    `low` and `high` are zeros and get the positions: by Elias-Fano's code, or as a bitmap in `high` if
    `low_bits` is -1.
    """
    found, written, filled, waiting = 0, 0, 0, np.int64(0)
    for k in range(bits.size):
        magnitude = bits[k] & most
        if magnitude > bound or (magnitude == bound and ties > 0):
            ties -= magnitude == bound
            kept[found] = bits[k]
            place = k
            if low_bits >= 0:
                place = (k >> low_bits) + found
                waiting |= (k & ((1 << low_bits) - 1)) << filled
                filled += low_bits
                while filled >= 8:
                    low[written] = waiting & 255
                    waiting >>= 8
                    filled -= 8
                    written += 1
            high[place >> 3] |= 1 << (place & 7)
            found += 1
    if filled > 0:
        low[written] = waiting


@kernel
def scatter(kept: Bits, low: Bytes, high: Bytes, length: int, low_bits: int, spread: Bits) -> None:
    """Undoes `gather`: `spread` is zeros and gets the elements; `length` is how many bits of `high` are used.

    Where there are fewer positions than elements, the first place gets the others, and no position is beyond
    the end.
    """
    found, taken, filled, waiting = 0, 0, 0, np.int64(0)
    for octet in range(high.size):
        marks = np.int64(high[octet])
        for bit in range(8):
            if marks >> bit & 1 and found < kept.size and octet * 8 + bit < length:
                place = octet * 8 + bit
                if low_bits >= 0:
                    while filled < low_bits:
                        waiting |= np.int64(low[taken]) << filled
                        filled += 8
                        taken += 1
                    place = int(((place - found) << low_bits) | (waiting & ((1 << low_bits) - 1)))
                    waiting >>= low_bits
                    filled -= low_bits
                spread[min(place, spread.size - 1)] = kept[found]
                found += 1
    if found < kept.size:
        spread[0] = kept[kept.size - 1]
