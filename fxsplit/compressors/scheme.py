"""How the codes of one tensor are made: what encoding and decoding kernels are told beside the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsplit.compressors.grouping import Layout

_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Scheme:
    """The layout of the groups and the numbers of bits.

    With the ranges of its group and bucket, the code of an element x is

        bucket << Q | clamp(round((x - minimum) * inverse), 0, levels)      levels = 2**Q - 1

    in float64, every operation rounded on its own. `round` goes to the nearest integer, ties to the even one;
    with `stochastic` it is floor(v + u), where u is that of `dither`.
    """

    layout: Layout
    bits: int
    split_bits: int
    stochastic: bool = False

    @property
    def buckets(self) -> int:
        """2**S: ranges of a group."""
        return 1 << self.split_bits

    @property
    def offset_bits(self) -> int:
        """Q: bits inside a bucket."""
        return self.bits - self.split_bits

    @property
    def levels(self) -> int:
        """The greatest code inside a bucket."""
        return (1 << self.offset_bits) - 1


def make_table(minima: Tensor, maxima: Tensor, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What the receiver and the sender use of the ranges.

    Args:
        minima: float64 `[groups, buckets]`.
        maxima: likewise.
        levels: number of steps from a minimum to its maximum.
        dtype: of the table.

    Returns:
        The table `[2, groups, buckets]`: minima and steps = (maximum - minimum) / levels; the minima; and
        inverse = levels / (maximum - minimum), float64 `[groups, buckets]`: 0 where the range is 0, and at
        most the greatest float64, which it would exceed where the range of float64 values is below 1e-303.
    """
    minima = minima + 0.0  # turns -0.0 into 0.0: of these equals a sort may put either first
    spans = maxima + 0.0 - minima
    # Divided by a tensor: CUDA multiplies by the reciprocal of a number, which rounds differently.
    steps = spans / torch.full_like(spans, levels)
    inverse = torch.where(spans > 0, torch.full_like(spans, levels) / spans, 0.0)
    inverse = inverse.clamp_(max=torch.finfo(torch.float64).max)
    return torch.stack((minima, steps)).to(dtype), minima, inverse


def mix(numbers: Tensor) -> Tensor:
    """A hash of 32-bit numbers in which every bit depends on all (`lowbias32`), in int64.

    Source: Chris Wellons, "Prospecting for Hash Functions", 2018; public domain.

    >>> mix(torch.arange(3)).tolist()
    [0, 1753845952, 3507691905]
    """
    numbers = numbers ^ numbers >> 16
    numbers = numbers * 0x7FEB352D & _LOW_32
    numbers = numbers ^ numbers >> 15
    numbers = numbers * (0x846CA68B - (1 << 32)) & _LOW_32  # the same modulo 2**32, and no overflow of int64
    return numbers ^ numbers >> 16


def seeds(table: Tensor) -> Tensor:
    """The seed of each group: a hash of the 32-bit words of its row of the table.

    Args:
        table: `[2, groups, buckets]`, float32 or float64.

    Returns:
        int64 `[groups]`, 0 to 2**32 - 1: mix(sum over j of mix(word j + (j + 1) * 0x9E3779B9)), modulo 2**32,
        where the words are those of the minima and then those of the steps, low word first.
    """
    words = table.transpose(0, 1).contiguous().view(torch.int32).view(table.shape[1], -1).long() & _LOW_32
    places = torch.arange(1, words.shape[1] + 1, device=table.device) * 0x9E3779B9
    return mix(mix(words + places & _LOW_32).sum(1) & _LOW_32)


def dither(elements: Tensor, seed: Tensor) -> Tensor:
    """The u that an element is rounded with: (mix(element + seed of its group) + 1/2) / 2**32, in (0, 1).

    A function of the element's place and of its group's ranges alone, so that every device gives the same
    codes, and another tensor other ones. It is never so small or great that a value on a level would leave
    it.

    Args:
        elements: int64, indices of the elements in logical order.
        seed: int64, the seeds of their groups.

    Returns:
        float64, all multiples of 2**-33.
    """
    return (mix(elements + seed & _LOW_32).double() + 0.5) * 2.0**-32
