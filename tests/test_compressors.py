"""What every compressor promises, for every compressor that is registered."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxsplit.compressors import COMPRESSORS, Compressor, compressor
from fxsplit.compressors.adaptive import Adaptive
from fxsplit.compressors.entropy import Entropy
from fxsplit.compressors.learned import Learned
from fxsplit.compressors.low_rank import LowRank
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec
from tests import codec_claims
from tests.codec_claims import own_bound, refuses

OTHER_SPELLINGS = [
    *(f"uniform{bits}" for bits in (2, 4, 5, 12, 16)),
    *(f"sortquant{bits}" for bits in (2, 3, 4, 6, 12, 16)),
    *("sortquant8(split=4)", "sortquant8(split=7)", "sortquant12(split=8)"),
    *("fastquant4", "fastquant5", "fastquant6", "fastquant12", "fastquant16"),
    *("fastquant8(sample=0)", "fastquant8(sample=7)", "fastquant8(split=4, sample=100)"),
    *("uniform4(group=channel)", "sortquant8(group=sample)", "fastquant6(group=channel, sample=5)"),
    *("uniform8(rounding=stochastic)", "sortquant4(group=channel, rounding=stochastic)"),
    *codec_claims.SPELLINGS,
]
OTHERS = (Learned, LowRank, Entropy, Adaptive)  # with tests of their own, or no default
SPELLINGS = [kind.name for kind in COMPRESSORS if not issubclass(kind, OTHERS)] + OTHER_SPELLINGS
LOSSY = [spelling for spelling in SPELLINGS if spelling != "none"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def round_trip(codec: Compressor, x: Tensor) -> Tensor:
    """Encodes and decodes, holding both ends to the interface."""
    before, spec = x.clone(), TensorSpec.of(x)
    payload = codec.encode(x)
    assert tuple(TensorSpec.of(tensor) for tensor in payload) == codec.wire(spec)
    assert sum(tensor.numel() * tensor.element_size() for tensor in payload) == codec.wire_bytes(spec)
    for tensor in payload:
        assert tensor.is_contiguous() and tensor.device == x.device and not tensor.requires_grad
    sent = copy.deepcopy(payload)
    decoded = codec.decode(payload, spec)
    assert TensorSpec.of(decoded) == spec and decoded.is_contiguous() and decoded.device == x.device
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(a, b) for a, b in zip(payload, sent, strict=True))
    assert torch.equal(codec.decode(list(sent), spec), decoded)
    return decoded


def largest_error(codec: Compressor, x: Tensor) -> float:
    """Bound on the error of any element: half of the widest step, and the rounding of step and output."""
    if (bound := own_bound(codec, x)) is not None:
        return bound
    if codec.encode(x)[0].dtype != torch.uint8:
        return 0.0
    bits, split = getattr(codec, "bits", 8), getattr(codec, "split_bits", 0)
    minima, steps = codec.encode(x)[1].double()
    levels = 2 ** (bits - split) - 1
    at_most = (minima.abs() + levels * steps).max().item()
    rounding = torch.finfo(x.dtype).eps * at_most + 2.0**-23 * levels * steps.max().item()
    share = 1.0 if "stochastic" in str(codec) else 0.5
    return float(share * steps.max().item() + rounding)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (2,), (3, 5), (0,), (4, 0, 2), (2, 3, 7, 11), (257,)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_round_trip(spelling: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codec, x = compressor(spelling), gaussian(*shape, dtype=dtype)
    if refuses(codec, x):
        return
    decoded = round_trip(codec, x)
    if x.numel():
        assert (decoded.double() - x.double()).abs().max().item() <= largest_error(codec, x)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_more_than_one_block(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x = compressor(spelling), gaussian(5, 3, 13)
    whole = codec.encode(x), round_trip(codec, x)
    monkeypatch.setattr("fxsplit.compressors.torch_kernels.block_size", lambda device: 32)
    blocks = codec.encode(x), round_trip(codec, x)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], blocks[0], strict=True))
    assert torch.equal(whole[1], blocks[1])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_strides_do_not_matter(spelling: str) -> None:
    codec, x = compressor(spelling), gaussian(2, 6, 5, 4)
    expected = codec.encode(x)
    spread = torch.zeros(2, 6, 5, 8)
    spread[..., ::2] = x
    same = [
        x.to(memory_format=torch.channels_last),
        spread[..., ::2],
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.cat((torch.zeros(1), x.flatten()))[1:].view(2, 6, 5, 4),
    ]
    for view in same:
        assert all(torch.equal(a, b) for a, b in zip(codec.encode(view), expected, strict=True))
        round_trip(codec, view)
    round_trip(codec, x[:, :1].expand(2, 6, 5, 4))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3.0, 1e-7])
def test_constants_are_exact(spelling: str, value: float, dtype: torch.dtype) -> None:
    codec, x = compressor(spelling), torch.full((3, 7), value, dtype=dtype)
    if value and isinstance(codec, codec_claims.INEXACT_ON_CONSTANTS):
        assert (round_trip(codec, x).double() - x.double()).abs().max().item() <= largest_error(codec, x)
    else:
        assert torch.equal(round_trip(codec, x), x)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_equal_inputs_give_equal_payloads(spelling: str) -> None:
    codec, x = compressor(spelling), gaussian(40, 50).relu()
    again = codec.encode(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(codec.encode(x), again, strict=True))


@pytest.mark.parametrize("spelling", LOSSY)
def test_signed_zeros_give_the_same_payload(spelling: str) -> None:
    if isinstance(compressor(spelling), codec_claims.KEEP_THE_SIGN_OF_ZERO):
        return
    x = torch.tensor([-0.0, 0.0, -0.0, 1.0, 0.0, -0.0])
    for a, b in zip(compressor(spelling).encode(x), compressor(spelling).encode(x.abs()), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_of_autograd(spelling: str, requires_grad: bool) -> None:
    x = gaussian(4, 5).requires_grad_(requires_grad)
    for tensor in (x, x * 2, torch.nn.Parameter(x.detach())):
        round_trip(compressor(spelling), tensor)
    with torch.inference_mode():
        round_trip(compressor(spelling), gaussian(4, 5) * 2)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_lazily_negated_view(spelling: str) -> None:
    x = torch.complex(gaussian(2, 3), gaussian(2, 3)).conj().imag
    assert x.is_neg()
    codec = compressor(spelling)
    for a, b in zip(codec.encode(x), codec.encode(-gaussian(2, 3)), strict=True):
        assert torch.equal(a, b) and not a.is_neg()


@pytest.mark.parametrize("spelling", LOSSY)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([float("nan")], "1 NaN and 0 infinite of 60"),
        ([float("inf")], "0 NaN and 1 infinite of 60"),
        ([float("-inf")], "0 NaN and 1 infinite of 60"),
        ([float("-inf"), float("nan"), float("inf")], "1 NaN and 2 infinite of 60"),
        ([float("nan")] * 60, "60 NaN and 0 infinite of 60"),
        ([float("inf")] * 60, "0 NaN and 60 infinite of 60"),
    ],
)
def test_refuses_what_is_not_finite(spelling: str, dtype: torch.dtype, values: list[float], found: str) -> None:
    x = gaussian(60, dtype=dtype)
    x[len(x) // 2 - len(values) // 2 :][: len(values)] = torch.tensor(values, dtype=dtype)
    with pytest.raises(CompressorError) as caught:
        compressor(spelling).encode(x.view(6, 10))
    assert str(caught.value).splitlines()[1:3] == [
        f"  found:   {found} elements",
        "  allowed: finite values",
    ]
    assert "'none'" in str(caught.value.hint)


@pytest.mark.parametrize("spelling", LOSSY)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_refuses_what_is_not_floating_point(spelling: str, dtype: torch.dtype) -> None:
    x = torch.zeros(3, dtype=dtype)
    with pytest.raises(CompressorError, match=r"allowed: float16, bfloat16, float32, float64"):
        compressor(spelling).encode(x)
    with pytest.raises(CompressorError, match="'none'"):
        compressor(spelling).wire(TensorSpec.of(x))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_refuses_a_payload_of_something_else(spelling: str) -> None:
    codec, x = compressor(spelling), gaussian(5, 9)
    payload, spec = codec.encode(x), TensorSpec.of(x)
    wrong: list[tuple[Sequence[Tensor], TensorSpec]] = [
        ((), spec),
        (payload, TensorSpec((5, 11), x.dtype)),
        (payload, TensorSpec((5, 9), torch.float64)),
        ([tensor.to(torch.int16) for tensor in payload], spec),
    ]
    for tensors, announced in wrong:
        if tensors is payload and codec.wire(announced) == codec.wire(spec):
            continue  # nothing tells them apart
        with pytest.raises(CompressorError, match=r"not a payload of .* for float") as caught:
            codec.decode(tensors, announced)
        assert "same compressor" in str(caught.value.hint)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_is_a_frozen_hashable_value(spelling: str) -> None:
    codec = compressor(spelling)
    assert dataclasses.is_dataclass(codec) and hash(codec) == hash(compressor(spelling))
    assert pickle.loads(pickle.dumps(codec)) == copy.deepcopy(codec) == codec
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.bits = 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_devices_agree_bit_for_bit(spelling: str, dtype: torch.dtype, device: str) -> None:
    codec = compressor(spelling)
    for x in (gaussian(3, 7, 33), gaussian(4001).relu(), gaussian(64, 65).pow(5), gaussian(1), gaussian(0)):
        x = x.to(dtype)
        if refuses(codec, x):
            continue
        if isinstance(codec, codec_claims.EQUAL_UP_TO_ROUNDING_ON_OTHER_DEVICES):
            here, there = round_trip(codec, x).double(), round_trip(codec, x.to(device)).cpu().double()
            assert float((here - there).norm()) <= 0.02 * float(x.double().norm())
            continue
        payload, other = codec.encode(x), codec.encode(x.to(device))
        assert all(torch.equal(a, b.cpu()) for a, b in zip(payload, other, strict=True))
        decoded = round_trip(codec, x.to(device))
        assert torch.equal(decoded.cpu(), codec.decode(payload, TensorSpec.of(x)))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("spelling", LOSSY)
def test_devices_refuse_alike(spelling: str, device: str) -> None:
    x = gaussian(60)
    x[7] = float("nan")
    with pytest.raises(CompressorError, match="1 NaN and 0 infinite of 60"):
        compressor(spelling).encode(x.view(6, 10).to(device))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float32, torch.float8_e4m3fn]
)
def test_none_takes_everything_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(dtype)
    decoded = round_trip_bytes(x.T)
    assert torch.equal(decoded.view(torch.uint8), x.T.contiguous().view(torch.uint8))
    nothing = torch.tensor([float("nan"), float("inf"), -0.0])
    assert torch.equal(round_trip_bytes(nothing).view(torch.int32), nothing.view(torch.int32))


def round_trip_bytes(x: Tensor) -> Tensor:
    codec, spec = compressor("none"), TensorSpec.of(x)
    assert codec.wire(spec) == (spec,) and codec.wire_bytes(spec) == spec.nbytes
    return codec.decode(codec.encode(x), spec)


def test_none_resolves_conjugate_views() -> None:
    x = torch.complex(gaussian(3), gaussian(3))
    (sent,) = compressor("none").encode(x.conj())
    assert not sent.is_conj() and torch.equal(sent, x.conj().resolve_conj())
