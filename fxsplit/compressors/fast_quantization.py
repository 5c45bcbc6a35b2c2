"""Fast quantization: buckets of about equal population, bounded by values of a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxsplit.compressors.bucket_quantization import BucketQuantization
from fxsplit.compressors.grouping import Layout, sample_stride
from fxsplit.compressors.ranges import RangeRule


@dataclass(frozen=True)
class FastQuantization(BucketQuantization):
    """Algorithm 2: sort quantization with the bounds of the buckets taken as k-th values, without a sort.

    The k-th values are those of a sample, every m-th element; the least and the greatest value are exact.
    Bucket j reaches from bound j to bound j + 1, so that every value lies in a bucket whatever the sample
    missed.

    Source: "Fast Quantization", Algorithm 2 of "Parallelism Pipeline and Compression Algorithm", which leaves
    open where the k-th values come from.

    Args:
        bits: bits an element, 2 to 16.
        split: S, the bits that choose the bucket, 1 to bits - 1; max(1, bits // 4) if None.
        sample: about how many elements of each group the bounds are taken from; 0 means all.
        group: which elements share buckets; "tensor" is the document's. See `Quantization`.
        rounding: "nearest" or "stochastic"; see `Quantization`.

    Wire: codes, uint8 `[ceil(n * bits / 8)]`; table `[2, 2**S]` or `[2, groups, 2**S]`, minimum and step of
    each bucket. The error of an element is at most half a step of its bucket (stochastic: a step).

    Raises:
        CompressorError: an option is not in its range.

    >>> str(FastQuantization(sample=4096))
    'fastquant8(sample=4096)'
    """

    name: ClassVar[str] = "fastquant"

    sample: int = 16384

    def __post_init__(self) -> None:
        """Checks bits, split and sample."""
        super().__post_init__()
        self.check_integer("sample", 0)

    def rule(self, layout: Layout) -> RangeRule:
        """From each bound to the next; the first is the exact minimum and the last the exact maximum."""
        return RangeRule(1 << self.split_bits, sample_stride(layout.group_size, self.sample))
