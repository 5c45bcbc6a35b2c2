"""Exact bit packing: codes of 1 to 16 bits without a wasted bit between them.

The codes form one string of bits in little-endian order: code i occupies bits [i * bits, (i + 1) * bits), and
bit k is bit k % 8 of byte k // 8.

The work is done for many codes at once: codes stand in cells of 8 or 16 bits, and neighbouring cells, read as
one of twice the width, are merged until the codes in a cell end on a byte boundary; then the cell's low bytes
are the result. Merging moves the high half down with one multiplication, since for a cell of two halves of c
bits

    low + high * 2**c - high * (2**c - 2**k) = low + high * 2**k

With 6 bits: four codes to a cell of 32 bits, of which 24 are used: 3 bytes. Reading a cell as one of twice
the width takes a little-endian machine, as all that torch runs on are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxsplit.errors import CompressorError

MAX_BITS = 16

_WIDER = {torch.uint8: torch.int16, torch.int16: torch.int32, torch.int32: torch.int64}
_NARROWER = {torch.int64: torch.int32, torch.int32: torch.int16, torch.int16: torch.uint8}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: ceil(count * bits / 8).

    >>> packed_bytes(3, 12)
    5
    """
    return -(-count * bits // 8)


def code_dtype(bits: int) -> torch.dtype:
    """The dtype in which codes of `bits` bits are handled: uint8 up to 8 bits, int32 above."""
    return torch.uint8 if bits <= 8 else torch.int32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes into bytes.

    Args:
        codes: integers in [0, 2**bits), any integer dtype, any shape, in logical order. The range is
            not checked: a larger code spills into its neighbours.
        bits: bits a code, 1 to 16.

    Returns:
        uint8 `[ceil(codes.numel() * bits / 8)]` on the device of `codes`; the unused high bits of the last
        byte are zero. With 8 and 16 bits it may share memory with `codes`.

    Raises:
        CompressorError: `bits` is out of range, or `codes` is not of an integer dtype.

    >>> pack(torch.tensor([1, 2, 3]), bits=4).tolist()
    [33, 3]
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise CompressorError("codes are integers", found=codes.dtype, allowed="an integer dtype")
    codes = codes.reshape(-1)
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    if bits == 16:
        return codes.to(torch.int16).contiguous().view(torch.uint8)
    size, width = _group(bits)
    groups = -(-codes.numel() // size)
    cells = codes.to(_cell_dtype(bits))
    if codes.numel() % size:
        cells = torch.cat((cells, cells.new_zeros(groups * size - codes.numel())))
    merged = _merge(cells.clone() if cells is codes else cells, bits)
    packed = torch.empty(groups, width, dtype=torch.uint8, device=codes.device)
    if width == 1:
        packed.copy_(merged.view(groups, 1))  # the conversion keeps the low byte
    else:
        octets = merged.view(torch.uint8).view(groups, size * cells.element_size())
        # By columns: rows of so few bytes cost more to begin than to copy.
        for column in range(width):
            packed[:, column] = octets[:, column]
    return packed.view(-1)[: packed_bytes(codes.numel(), bits)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Reads the codes that `pack` wrote.

    Args:
        packed: uint8 `[ceil(count * bits / 8)]`.
        bits: bits a code, 1 to 16.
        count: number of codes.

    Returns:
        The codes, `[count]` on the device of `packed`: uint8 up to 8 bits (8: `packed` itself), int32 above.

    Raises:
        CompressorError: `bits` is out of range, or `packed` is not uint8 of that many bytes.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), bits=4, count=3).tolist()
    [1, 2, 3]
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise CompressorError(
            f"{count} codes of {bits} bits are not packed like this",
            found=f"{packed.dtype} of shape {tuple(packed.shape)}",
            allowed=f"torch.uint8 of shape ({packed_bytes(count, bits)},)",
        )
    if bits == 8:
        return packed
    if bits == 16:
        # A view as 16-bit words needs an even address, which a slice of a receive buffer need not have.
        aligned = packed.clone() if packed.storage_offset() % 2 else packed.contiguous()
        return aligned.view(torch.int16).to(torch.int32) & 0xFFFF
    size, width = _group(bits)
    groups = -(-count // size)
    if packed.numel() < groups * width:
        packed = torch.cat((packed, packed.new_zeros(groups * width - packed.numel())))
    octets = torch.zeros(groups, size * _cell_dtype(bits).itemsize, dtype=torch.uint8, device=packed.device)
    for column, source in enumerate(packed.view(groups, width).unbind(1)):
        octets[:, column] = source
    return _divide(octets.view(-1), bits)[:count].to(code_dtype(bits))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise CompressorError("bits a code out of range", found=bits, allowed=f"1 to {MAX_BITS}")


def _group(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest group that ends on a byte boundary."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _cell_dtype(bits: int) -> torch.dtype:
    """Where a code stands alone; int16, since torch has no arithmetic on uint16."""
    return torch.uint8 if bits <= 8 else torch.int16


def _merge(cells: Tensor, bits: int) -> Tensor:
    """Merges cells of one code each, in place, into cells whose low bits hold a group without gaps."""
    used = bits
    while used % 8 and cells.dtype != torch.int64:
        half = 8 * cells.dtype.itemsize
        cells = cells.view(_WIDER[cells.dtype])
        cells.sub_(cells >> half, alpha=(1 << half) - (1 << used))
        used *= 2
    if used % 8:  # bits is odd and above 8: a group is 8 codes in two cells of 64 bits, 4 * bits used in each
        low, high = cells.view(-1, 2).unbind(1)
        low |= high << used
        high >>= 64 - used
    return cells


def _divide(octets: Tensor, bits: int) -> Tensor:
    """Undoes `_merge`, in place: from the bytes of the merged cells to cells of one code each."""
    dtype, used = _cell_dtype(bits), bits
    while used % 8 and dtype != torch.int64:
        dtype, used = _WIDER[dtype], used * 2
    cells = octets.view(dtype)
    if used % 8:
        low, high = cells.view(-1, 2).unbind(1)
        high <<= 64 - used
        high |= (low >> used) & ((1 << (64 - used)) - 1)
        low &= (1 << used) - 1
    while cells.dtype != _cell_dtype(bits):
        half = 4 * cells.dtype.itemsize
        used //= 2
        cells.add_(cells >> used, alpha=(1 << half) - (1 << used))
        cells = cells.view(_NARROWER[cells.dtype])
    return cells
