"""Positions of chosen elements in few bits; how many is known from the numbers of elements alone.

k ascending positions below n are written in one of two forms, whichever takes fewer bytes:

- a bitmap: n bits, of which k are set;
- Elias-Fano: the low l bits of each position, packed, and behind them a string of bits in which bit
  (position_i >> l) + i is set for each i. The string has k + ((n - 1) >> l) bits; l is chosen to make the
  whole smallest, and the whole is within about 2 bits a position of the least that any code could take:
  10 % of many elements take 0.525 bits an element, 1 % take 0.086.

Source: Elias, "Efficient storage and retrieval by content and address of static files", 1974; Fano, 1971.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsplit.compressors.packing import MAX_BITS, pack, packed_bytes, unpack
from fxsplit.errors import CompressorError


def positions_bytes(count: int, total: int) -> int:
    """Bytes that `count` positions below `total` take.

    >>> positions_bytes(100, 1000), positions_bytes(500, 1000)
    (66, 125)
    """
    low_bits = low_bits_of(count, total)
    return -(-total // 8) if low_bits is None else _elias_fano_bytes(count, total, low_bits)


def pack_positions(positions: Tensor, total: int) -> Tensor:
    """Packs positions into bytes.

    Args:
        positions: int64 `[k]`, ascending, without repetition, below `total`; this is not checked.
        total: n, the number of elements.

    Returns:
        uint8 `[positions_bytes(k, n)]`.

    >>> pack_positions(torch.tensor([0, 3]), total=8).tolist()
    [9]
    """
    count = positions.numel()
    low_bits = low_bits_of(count, total)
    if low_bits is None:
        return pack(_marks(positions, total), 1)
    order = torch.arange(count, device=positions.device)
    high = pack(_marks((positions >> low_bits) + order, count + ((total - 1) >> low_bits)), 1)
    if low_bits == 0:
        return high
    return torch.cat((pack(positions & ((1 << low_bits) - 1), low_bits), high))


def unpack_positions(packed: Tensor, count: int, total: int) -> Tensor:
    """Reads the positions that `pack_positions` wrote.

    Bytes that it did not write give positions too, in no particular order; they are all below `total`.

    Returns:
        int64 `[count]` on the device of `packed`.

    Raises:
        CompressorError: `packed` is not uint8 of that many bytes.

    >>> unpack_positions(torch.tensor([9], dtype=torch.uint8), count=2, total=8).tolist()
    [0, 3]
    """
    size = positions_bytes(count, total)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise CompressorError(
            f"{count} positions below {total} are not packed like this",
            found=f"{packed.dtype} of shape {tuple(packed.shape)}",
            allowed=f"torch.uint8 of shape ({size},)",
        )
    low_bits = low_bits_of(count, total)
    if low_bits is None:
        positions = _marked(unpack(packed, 1, total), count)
    else:
        split = packed_bytes(count, low_bits)
        marks = unpack(packed[split:], 1, count + ((total - 1) >> low_bits))
        positions = (_marked(marks, count) - torch.arange(count, device=packed.device)) << low_bits
        if low_bits:
            positions |= unpack(packed[:split], low_bits, count)
    return positions.clamp_(0, max(total - 1, 0))


def low_bits_of(count: int, total: int) -> int | None:
    """How many bits Elias-Fano keeps apart; None: the bitmap is as small."""
    least, low_bits = min((_elias_fano_bytes(count, total, bits), bits) for bits in range(MAX_BITS + 1))
    return None if least >= -(-total // 8) else low_bits


def _elias_fano_bytes(count: int, total: int, low_bits: int) -> int:
    return packed_bytes(count, low_bits) + packed_bytes(count + ((total - 1) >> low_bits), 1)


def _marks(where: Tensor, length: int) -> Tensor:
    """uint8 `[length]`, 1 at the given places and 0 elsewhere."""
    return torch.zeros(length, dtype=torch.uint8, device=where.device).index_fill_(0, where, 1)


def _marked(marks: Tensor, count: int) -> Tensor:
    """The first `count` places that are not 0, ascending; -1 where there are fewer."""
    return torch.nonzero_static(marks, size=count).view(-1)
