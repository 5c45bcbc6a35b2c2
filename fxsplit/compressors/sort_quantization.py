"""Sort quantization: exact buckets of equal population."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxsplit.compressors.bucket_quantization import BucketQuantization
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.ranges import RangeRule


@dataclass(frozen=True)
class SortQuantization(BucketQuantization):
    """Algorithm 1: sort the values, divide them into 2**S chunks, quantize each chunk uniformly with Q bits.

    Chunks are those of `torch.chunk`; S + Q = bits. Of the sorted values only the first and the last of each
    chunk are needed, and these are found without a sort; the chunk of an element follows from its value.

    Source: "Sort Quantization", Algorithm 1 of "Parallelism Pipeline and Compression Algorithm".

    Args:
        bits: bits an element, 2 to 16.
        split: S, 1 to bits - 1; max(1, bits // 4) if None.
        group: which elements are sorted together; "tensor" is the document's. See `Quantization`.
        rounding: "nearest" or "stochastic"; see `Quantization`.

    Wire: codes, uint8 `[ceil(n * bits / 8)]`; table `[2, 2**S]` or `[2, groups, 2**S]`, minimum and step of
    each bucket. The error of an element is at most half a step of its bucket (stochastic: a step).

    Raises:
        CompressorError: an option is not in its range.

    >>> str(SortQuantization()), str(SortQuantization(bits=8, split=4))
    ('sortquant8', 'sortquant8(split=4)')
    """

    name: ClassVar[str] = "sortquant"

    def rule(self, layout: Layout) -> RangeRule:
        """The least and the greatest value of each chunk."""
        return RangeRule(1 << self.split_bits, touching=False)
