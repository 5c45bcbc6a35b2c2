"""Buckets of equal population: what sort and fast quantization share."""

from __future__ import annotations

from dataclasses import dataclass

from fxsplit.compressors.quantization import Quantization


@dataclass(frozen=True)
class BucketQuantization(Quantization):
    """Base of the quantizers whose buckets hold (about) equally many elements each.

    Args:
        bits: bits an element, 2 to 16.
        split: how many of them choose the bucket, 1 to bits - 1; a quarter of them (at least one) if None,
            the documents' 16 = 12 + 4, 12 = 9 + 3, 8 = 6 + 2 and 4 = 3 + 1.
        group: which elements share ranges; see `Quantization`.
        rounding: "nearest" or "stochastic"; see `Quantization`.
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
