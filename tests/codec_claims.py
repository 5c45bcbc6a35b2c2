"""What compressors promise beyond what all of them do, for the tests that run over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxsplit.compressors import BFloat16, Compressor, Float8, Float16, KMeans, TopK
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.low_rank import LowRank
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

INEXACT_ON_CONSTANTS = (Float16, BFloat16, Float8, LowRank, TopK)
KEEP_THE_SIGN_OF_ZERO = (Float16, BFloat16, Float8, LowRank, TopK)
EQUAL_UP_TO_ROUNDING_ON_OTHER_DEVICES = (LowRank,)

SPELLINGS = [
    *(
        "kmeans1",
        "kmeans2",
        "kmeans5",
        "kmeans8",
        "kmeans4(sample=7)",
        "kmeans3(sample=0)",
        "kmeans2(group=channel)",
        "kmeans4(group=sample, rounding=stochastic)",
        "kmeans3(rounding=stochastic)",
        "kmeans(iterations=0)",
    ),
    *("fp8(format=e5m2)", "topk(ratio=0.01)", "topk(ratio=0.5)", "topk(ratio=1.0)"),
    *("poweriter(rank=1)", "poweriter(ratio=1.0, cold_iterations=5)", "svd(rank=1)", "svd(ratio=0.7)"),
]


def refuses(codec: Compressor, x: Tensor) -> bool:
    """Whether the compressor does not take a tensor of this shape; it must then say so before there is data."""
    if codec.takes(TensorSpec.of(x)):
        return False
    with pytest.raises(CompressorError) as early:
        codec.wire(TensorSpec.of(x))
    with pytest.raises(CompressorError) as late:
        codec.encode(x)
    assert str(early.value) == str(late.value) and "'none'" in str(early.value.hint)
    return True


def own_bound(codec: Compressor, x: Tensor) -> float | None:
    """The error of any element that the compressor's documentation allows; None if it is not known here."""
    largest = float(x.double().abs().max())
    output = torch.finfo(x.dtype).eps * largest
    if isinstance(codec, Float16 | BFloat16):
        return torch.finfo(codec.dtype).eps / 2 * largest + (2.0**-25 if isinstance(codec, Float16) else output)
    if isinstance(codec, Float8):
        significant, smallest = (2.0**-4, 2.0**-10) if codec.format == "e4m3" else (2.0**-3, 2.0**-17)
        return significant * largest + smallest * float(codec.encode(x)[1]) + output
    if isinstance(codec, KMeans):
        layout = Layout.of(TensorSpec.of(x), codec.group)
        rows = layout.rows(x.double().reshape(-1)).reshape(layout.groups, -1, 1)
        codebook = codec.encode(x)[1].double().view(layout.groups, 1, -1)
        if codec.rounding == "stochastic":
            return float(codebook.diff(dim=2).max()) + output
        return float((rows - codebook).abs().amin(2).max()) + output
    if isinstance(codec, TopK):
        return float(codec.encode(x)[0].abs().min())
    if isinstance(codec, LowRank):
        return float(x.double().norm()) * (1 + 4 * torch.finfo(x.dtype).eps)
    return None
