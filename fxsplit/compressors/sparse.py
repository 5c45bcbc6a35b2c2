"""The elements of largest magnitude and their packed positions, in plain torch; see `TopK`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxsplit.compressors.positions import pack_positions, unpack_positions

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather_largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` elements of largest magnitude and their positions; of equals, those at lower positions.

    NaN and infinity have the largest magnitudes of all.

    Args:
        values: flat.
        count: 1 to the number of values, or 0 if there are none.

    Returns:
        The elements, bit for bit, in the order of their positions; and these as `pack_positions` writes them.
    """
    positions = _largest(values, count)
    return values[positions], pack_positions(positions, values.numel())


def scatter(kept: Tensor, packed: Tensor, total: int) -> Tensor:
    """Undoes `gather_largest`: `total` values, zeros but for the elements at their positions."""
    positions = unpack_positions(packed, kept.numel(), total)
    return torch.zeros(total, dtype=kept.dtype, device=kept.device).index_copy_(0, positions, kept)


def _largest(values: Tensor, count: int) -> Tensor:
    """Positions of the `count` elements of largest magnitude, int64, ascending."""
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=values.device)
    dtype = _BITS[values.element_size()]
    # Without the sign the bits of floating point numbers, read as an integer, are in the order of magnitude.
    magnitudes = values.view(dtype) & torch.iinfo(dtype).max
    bound = _kth_largest(magnitudes, count)
    chosen = magnitudes > bound
    ties = (magnitudes == bound).nonzero().view(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return torch.nonzero_static(chosen, size=count).view(-1)


def _kth_largest(magnitudes: Tensor, count: int) -> int:
    """The `count`-th largest of some integers."""
    if magnitudes.device.type == "cpu":  # many times as fast there as torch
        index = magnitudes.numel() - count
        return int(np.partition(magnitudes.numpy(), index)[index])
    return int(torch.topk(magnitudes, count, sorted=False).values.min())
