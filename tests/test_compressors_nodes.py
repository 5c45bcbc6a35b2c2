"""The graph nodes of a compressor: what goes forward, what comes back, and what shapes alone tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxsplit.compressors import compressor
from fxsplit.compressors.nodes import Decode, Encode
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

ELEMENTWISE = [
    *("none", "fp16", "bf16", "fp8", "uniform2", "uniform8", "uniform8(group=channel)", "sortquant8"),
    *("sortquant4(split=2, rounding=stochastic)", "fastquant12", "kmeans3", "kmeans4(group=channel)"),
]
"""Their bytes are in proportion to the elements, and a table beside them."""


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "gradient", ["none", "uniform8", "uniform4(group=channel, rounding=stochastic)", "topk(ratio=0.2)"]
)
@pytest.mark.parametrize("spelling", ["uniform4", "sortquant8", "kmeans2", "topk(ratio=0.1)", "fp8"])
def test_the_gradient_goes_straight_through(spelling: str, gradient: str) -> None:
    """As if the rounding were not there, but for its own compression."""
    forward, backward = compressor(spelling), compressor(gradient)
    x, g = gaussian(4, 6, 5, 5).requires_grad_(), gaussian(4, 6, 5, 5, seed=1)
    y = Decode(forward, backward)(Encode(forward)(x))
    assert torch.equal(y, forward.decode(forward.encode(x.detach()), TensorSpec.of(x)))
    y.backward(g)
    assert x.grad is not None
    assert torch.equal(x.grad, backward.decode(backward.encode(g), TensorSpec.of(g)))


def test_without_gradients_nothing_is_remembered() -> None:
    codec = compressor("uniform4(feedback=true)")
    sender, receiver, x = Encode(codec), Decode(codec, codec), gaussian(8, 8)
    with torch.no_grad():
        receiver(sender(x))
    assert not sender.memory
    sender(x)
    assert sender.memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spelling", ELEMENTWISE)
def test_more_elements_than_32_bits_can_count(spelling: str, dtype: torch.dtype) -> None:
    """By shape alone: a billion times as many elements are a billion times the bytes, but for the table."""
    codec = compressor(spelling)
    small, large = TensorSpec((8, 64, 1 << 10), dtype), TensorSpec((1 << 23, 64, 1 << 10), dtype)
    tables = [sum(part.nbytes for part in codec.wire(spec)[1:]) for spec in (small, large)]
    assert tables[0] == tables[1]
    assert codec.wire(large)[0].nbytes == codec.wire(small)[0].nbytes << 20 > 1 << 32
    assert codec.wire_bytes(large) == (codec.wire(small)[0].nbytes << 20) + tables[0]


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("poweriter(rank=9)", "rank"),
        ("svd(rank=9)", "rank"),
        ("convinsert(ratio=0.0001)", "no layer sends so little"),
        ("uniform8(group=77)", "cannot be divided into blocks"),
        ("kmeans4(group=77)", "cannot be divided into blocks"),
    ],
)
def test_what_does_not_fit_is_refused_by_shape_alone(spelling: str, message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        compressor(spelling).wire(TensorSpec((2, 8, 4, 4), torch.float32))
