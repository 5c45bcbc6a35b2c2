"""Bits given where the error is largest, and entropy coding of codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxsplit.compressors import compressor
from fxsplit.compressors.exact import exact_coding
from fxsplit.compressors.grouping import Layout
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def uneven(channels: int = 16) -> Tensor:
    """Channels whose ranges differ a thousandfold, as behind a batch norm with learned scales."""
    return gaussian(8, channels, 5, 7) * torch.logspace(-2, 1, channels)[:, None, None]


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (4, 6), (2, 5, 7), (2, 3, 5, 7), (3, 1, 2)])
def test_adaptive_round_trip(shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> None:
    codec, x = compressor(f"adaptive{bits}"), gaussian(*shape).to(dtype)
    spec = TensorSpec.of(x)
    payload = codec.encode(x)
    assert tuple(TensorSpec.of(tensor) for tensor in payload) == codec.wire(spec)
    decoded = codec.decode(payload, spec)
    assert TensorSpec.of(decoded) == spec and decoded.is_contiguous()
    if x.numel():
        assert (decoded.double() - x.double()).abs().max() <= (x.double().max() - x.double().min()) / 2 + 1e-2


def error(spelling: str, x: Tensor) -> float:
    codec = compressor(spelling)
    return float((codec.decode(codec.encode(x), TensorSpec.of(x)) - x).double().norm() / x.double().norm())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_adaptive_beats_the_same_bits_for_all(bits: int) -> None:
    """At the same bytes, but for one a channel."""
    x = uneven().repeat(8, 1, 1, 1)
    spec, plain = TensorSpec.of(x), f"kmeans{bits}(group=channel)"
    assert compressor(f"adaptive{bits}(group=channel)").wire_bytes(spec) == compressor(plain).wire_bytes(spec) + 16
    assert error(f"adaptive{bits}(group=channel)", x) < 0.75 * error(plain, x)


@pytest.mark.parametrize("group", ["tensor", "sample", "channel", 8])
@pytest.mark.parametrize("shape", [(5, 8, 3, 8), (16, 24)])
def test_adaptive_is_kmeans_where_groups_are_equal(shape: tuple[int, ...], group: str | int) -> None:
    x = gaussian(1, 8).expand(*shape[:-1], 8).contiguous() if len(shape) == 4 else gaussian(1, 8).repeat(16, 3)
    if group in ("channel", "sample") and len(shape) == 2:
        x = x.t().contiguous() if group == "sample" else x[:, :1].expand(16, 24).contiguous()
    given, _ = compressor(f"adaptive3(group={group})").encode(x)
    groups = Layout.of(TensorSpec.of(x), group)
    if bool((groups.rows(x.view(-1)) == groups.rows(x.view(-1))[:1]).all()):
        assert given.tolist() == [3] * groups.groups
        assert error(f"adaptive3(group={group})", x) == error(f"kmeans3(group={group})", x)


def test_adaptive_gives_no_bits_to_what_is_constant() -> None:
    x = uneven()
    x[:, 3] = 0.7
    codec = compressor("adaptive3(group=channel)")
    given, buffer = codec.encode(x)
    assert int(given[3]) == 0 and given.tolist()[-1] > 3
    decoded = codec.decode((given, buffer), TensorSpec.of(x))
    assert torch.equal(decoded[:, 3], x[:, 3])


@pytest.mark.parametrize("shape", [(8, 16, 5, 7), (40, 3, 100), (2, 2, 30_000)])
def test_adaptive_does_not_depend_on_how_much_is_done_at_once(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = gaussian(*shape) * torch.logspace(-2, 0, shape[-1])
    for spelling in ("adaptive3(group=channel)", "adaptive2(group=sample, rounding=stochastic)"):
        codec = compressor(spelling)
        whole = codec.encode(x)
        decoded = codec.decode(whole, TensorSpec.of(x))
        with monkeypatch.context() as patch:
            patch.setattr("fxsplit.compressors.adaptive.AT_ONCE", 64)
            patch.setattr("fxsplit.compressors.codebooks.SAMPLED_AT_ONCE", 64)
            assert all(torch.equal(a, b) for a, b in zip(codec.encode(x), whole, strict=True))
            assert torch.equal(codec.decode(whole, TensorSpec.of(x)), decoded)


def test_adaptive_stochastic_keeps_the_mean() -> None:
    x = uneven().repeat(8, 1, 1, 1)
    codec = compressor("adaptive3(group=channel, rounding=stochastic)")
    assert int(codec.encode(x)[0].min()) >= 1
    lost = (codec.decode(codec.encode(x), TensorSpec.of(x)) - x).double()
    for channel in lost.transpose(0, 1).flatten(1):
        assert abs(float(channel.mean())) < 4.5 * float(channel.std()) / channel.numel() ** 0.5


def test_adaptive_refuses_another_payload() -> None:
    x = uneven()
    given, buffer = compressor("adaptive3(group=channel)").encode(x)
    with pytest.raises(CompressorError, match="not a payload"):
        compressor("adaptive3(group=channel)").decode((torch.full_like(given, 8), buffer), TensorSpec.of(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_adaptive_refuses_what_is_not_finite(bad: float) -> None:
    x = gaussian(4, 4)
    x[1, 2] = bad
    with pytest.raises(CompressorError, match="finite values only"):
        compressor("adaptive4").encode(x)


def test_adaptive_refuses_integers() -> None:
    with pytest.raises(CompressorError, match="floating point"):
        compressor("adaptive4").wire(TensorSpec((4,), torch.int64))


# ---------------------------------------------------------------------- entropy coding


@pytest.mark.parametrize("first", ["uniform8", "sortquant4(split=2)", "fastquant8"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (64, 64)])
def test_entropy_coding_is_lossless(first: str, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    plain, coded, spec = compressor(first), compressor(f"{first}+zstd"), TensorSpec.of(x)
    assert torch.equal(coded.decode(coded.encode(x), spec), plain.decode(plain.encode(x), spec))
    sent = sum(tensor.nbytes for tensor in coded.encode(x))
    assert sent <= coded.wire_bytes(spec) == plain.wire_bytes(spec) + 1


def test_entropy_coding_pays_where_values_are_uneven() -> None:
    x = gaussian(256, 256).relu() ** 3
    sent = [sum(t.nbytes for t in compressor(name).encode(x)) for name in ("uniform8", "uniform8+zstd")]
    assert sent[1] < 0.6 * sent[0]


@pytest.mark.parametrize("place", range(0, 40, 3))
def test_damaged_payloads_are_refused_or_harmless(place: int) -> None:
    """A flipped byte never reads or writes beyond what the spec allows."""
    codec, x = compressor("zstd"), torch.arange(600).remainder(7).to(torch.uint8)
    (payload,) = codec.encode(x)
    damaged = payload.clone()
    damaged[place % len(damaged)] ^= 0xFF
    try:
        decoded = codec.decode((damaged,), TensorSpec.of(x))
    except CompressorError as error:
        assert "damaged" in str(error)
    else:
        assert decoded.shape == x.shape
    with pytest.raises(CompressorError, match="damaged"):
        codec.decode((payload[:0],), TensorSpec.of(x))


def test_entropy_coding_takes_bytes_only() -> None:
    with pytest.raises(CompressorError, match="behind one"):
        compressor("zstd").encode(gaussian(3))


# ---------------------------------------------------------------------- integers and booleans


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (64, 7)])
@pytest.mark.parametrize("span", [1, 2, 200, 2**16, 2**40])
def test_integers_come_back(dtype: torch.dtype, shape: tuple[int, ...], span: int) -> None:
    info = torch.iinfo(dtype)
    low = max(info.min, -3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(low, min(info.max, low + span) + 1, shape, dtype=torch.int64, generator=generator).to(dtype)
    spec, coding = TensorSpec.of(x), exact_coding(TensorSpec.of(x))
    payload = coding.encode(x)
    assert torch.equal(coding.decode(payload, spec), x)
    assert sum(tensor.nbytes for tensor in payload) <= coding.wire_bytes(spec)


def test_the_greatest_and_the_least_integer() -> None:
    info = torch.iinfo(torch.int64)
    x = torch.tensor([info.min, info.max, 0])
    coding = exact_coding(TensorSpec.of(x))
    assert torch.equal(coding.decode(coding.encode(x), TensorSpec.of(x)), x)


def test_a_mask_takes_a_bit_an_element() -> None:
    mask = torch.ones(16, 128, dtype=torch.int64)
    mask[3, 100:] = 0
    sent = exact_coding(TensorSpec.of(mask)).encode(mask)
    assert sum(tensor.nbytes for tensor in sent) == 16 + 16 * 128 // 8
    truth = mask.bool()
    assert exact_coding(TensorSpec.of(truth)).wire_bytes(TensorSpec.of(truth)) == 16 * 128 // 8


def test_what_is_no_integer_is_sent_as_it_is() -> None:
    assert str(exact_coding(TensorSpec((3,), torch.complex64))) == "none"
    with pytest.raises(CompressorError, match="integers only"):
        exact_coding(TensorSpec((3,), torch.int64)).encode(gaussian(3))
    codec = exact_coding(TensorSpec((3,), torch.int64))
    with pytest.raises(CompressorError, match="not a payload"):
        codec.decode(codec.encode(torch.arange(3)), TensorSpec((40,), torch.int64))
