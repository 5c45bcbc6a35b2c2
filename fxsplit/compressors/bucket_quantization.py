"""Buckets of equal population: what sort and fast quantization share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxsplit.compressors.quantization import Quantization


@dataclass(frozen=True)
class BucketQuantization(Quantization):
    """Base of the quantizers whose buckets hold (about) equally many elements each.

    Args:
        bits: bits an element, 2 to 16.
        split: how many of them choose the bucket, 1 to bits - 1; a quarter of them (at least one) if None,
            the documents' 16 = 12 + 4, 12 = 9 + 3, 8 = 6 + 2 and 4 = 3 + 1.
    """

    split: int | None = None

    def __post_init__(self) -> None:
        """Checks bits, then split against them."""
        super().__post_init__()
        if self.split is not None:
            self.check_integer("split", 1, self.bits - 1)

    @property
    def split_bits(self) -> int:
        """`split`, or its default."""
        return max(1, self.bits // 4) if self.split is None else self.split


def chunk_ranges(values: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """First and last value of each chunk of the sorted values, as `torch.chunk` divides them.

    The chunks hold ceil(n / buckets) values each and the last fewer, so there can be fewer chunks than
    buckets; the ranges of the buckets left over are the greatest value alone.

    Args:
        values: floating point `[n]`, n at least 1.
        buckets: how many ranges are wanted.

    Returns:
        Minima and maxima, float64 `[buckets]` each, on the device of `values`. NaN sorts last.
    """
    count = values.numel()
    starts = range(0, count, -(-count // buckets))
    ordered = _sorted(values)
    firsts = torch.arange(0, count, starts.step, device=values.device)
    lasts = (firsts + starts.step).clamp_(max=count) - 1
    left_over = ordered[-1:].expand(buckets - len(starts))
    minima = torch.cat((ordered[firsts], left_over))
    maxima = torch.cat((ordered[lasts], left_over))
    return minima.double(), maxima.double()


def _sorted(values: Tensor) -> Tensor:
    """The values in ascending order, NaN last; 16-bit floats may come back as float32.

    On a CPU by numpy, which sorts by vector instructions. `torch.sort` carries every value's position along
    and takes some twenty times as long. Selecting the ranks alone, by `numpy.partition`, is no better: a list
    of ranks takes longer than the sort, and so does a single one where many values are equal, as behind a
    ReLU.
    """
    if values.device.type != "cpu":
        return values.sort().values
    half = values.dtype in (torch.float16, torch.bfloat16)  # numpy has no bfloat16, and no fast float16
    return torch.from_numpy(np.sort((values.float() if half else values).numpy()))
