"""The work of `sparse` on a CPU, by compiled loops that need no memory beside the result."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxsplit.compressors import sparse
from fxsplit.compressors.cpu_kernels import INTEGERS, compiled
from fxsplit.compressors.packing import packed_bytes
from fxsplit.compressors.positions import low_bits_of, positions_bytes

COUNTED_BITS = 16
"""Bits of a magnitude that one histogram tells apart."""


@compiled(sparse.gather_largest)
def gather_largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `sparse.gather_largest`; the least magnitude is found from histograms of 16 bits at a time."""
    from fxsplit.compressors import numba_sparse as loops

    signed, _, kind = INTEGERS[values.element_size()]
    bits, total = values.view(signed).numpy().view(kind), values.numel()
    most, width = kind(np.iinfo(kind).max >> 1), np.iinfo(kind).bits
    bound, left = 0, count
    for shift in range(width - COUNTED_BITS, -1, -COUNTED_BITS):
        counts = np.zeros(1 << COUNTED_BITS, np.int64)
        loops.count_magnitudes(bits, most, bound, shift, shift + COUNTED_BITS < width, counts)
        above = np.cumsum(counts[::-1])
        cell = int(np.searchsorted(above, left))  # counted from the largest
        left -= int(above[cell - 1]) if cell else 0
        bound = bound << COUNTED_BITS | counts.size - 1 - cell
    kept, packed = values.new_empty(count), torch.zeros(positions_bytes(count, total), dtype=torch.uint8)
    low_bits = low_bits_of(count, total)
    split = 0 if low_bits is None else packed_bytes(count, low_bits)
    low, high = packed.numpy()[:split], packed.numpy()[split:]
    into = kept.view(signed).numpy().view(kind)
    loops.gather(bits, most, kind(bound), left, -1 if low_bits is None else low_bits, into, low, high)
    return kept, packed


@compiled(sparse.scatter)
def scatter(kept: Tensor, packed: Tensor, total: int) -> Tensor:
    """As `sparse.scatter`."""
    from fxsplit.compressors import numba_sparse as loops

    signed, _, kind = INTEGERS[kept.element_size()]
    low_bits = low_bits_of(kept.numel(), total)
    split = 0 if low_bits is None else packed_bytes(kept.numel(), low_bits)
    length = total if low_bits is None else kept.numel() + ((total - 1) >> low_bits)
    octets, spread = packed.contiguous().numpy(), torch.zeros(total, dtype=kept.dtype)
    loops.scatter(
        kept.contiguous().view(signed).numpy().view(kind),
        octets[:split],
        octets[split:],
        length,
        -1 if low_bits is None else low_bits,
        spread.view(signed).numpy().view(kind),
    )
    return spread
