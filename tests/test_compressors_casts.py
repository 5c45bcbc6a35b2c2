"""Casts to 16 and 8 bits, and booleans as bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fxsplit.compressors import BFloat16, Compressor, Float8, Float16, PackedBool, compressor
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def decoded(codec: Compressor, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), TensorSpec.of(x))


@pytest.mark.parametrize("codec", [Float16(), BFloat16()])
@pytest.mark.parametrize("dtype", FLOATS)
def test_casts_are_torch_s(codec: Float16 | BFloat16, dtype: torch.dtype) -> None:
    x = (gaussian(50, 40).exp() * gaussian(50, 40)).to(dtype)
    assert torch.equal(codec.encode(x)[0], x.to(codec.dtype))
    assert torch.equal(decoded(codec, x), x.to(codec.dtype).to(dtype))
    assert codec.wire_bytes(TensorSpec.of(x)) == 4000


def test_signs_of_zero_are_kept() -> None:
    x = torch.tensor([0.0, -0.0])
    for codec in (Float16(), BFloat16(), Float8(), Float8("e5m2")):
        assert torch.equal(torch.signbit(decoded(codec, x)), torch.signbit(x))


def test_fp16_refuses_what_overflows() -> None:
    x = torch.tensor([1.0, 65519.0, -65520.0, 1e30])
    assert decoded(Float16(), x[:2]).tolist() == [1.0, 65504.0]
    with pytest.raises(CompressorError) as caught:
        Float16().encode(x)
    assert str(caught.value) == (
        "fp16 cannot hold values of this size\n"
        "  found:   2 of 4 elements, up to 1e+30 in magnitude\n"
        "  allowed: magnitudes up to 65504\n"
        "  try:     lower the loss scale if these are gradients, or send this edge with 'fp8', which has a scale "
        "of its own, or with 'none'"
    )


def test_bf16_refuses_what_overflows() -> None:
    with pytest.raises(CompressorError, match="1 of 2 elements"):
        BFloat16().encode(torch.tensor([1e300, 1.0], dtype=torch.float64))


def test_values_at_the_end_of_the_range_stay_finite() -> None:
    """65504 is 65536 in bf16 and in e4m3, which float16 has not."""
    x = torch.tensor([65504.0, -65504.0, 1.0], dtype=torch.float16)
    for codec in (BFloat16(), Float8(), Float8("e5m2")):
        assert decoded(codec, x)[:2].tolist() == [65504.0, -65504.0]
    for dtype in FLOATS:
        largest = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
        assert bool(decoded(Float8(), largest).isfinite().all())


def test_decoding_makes_new_memory() -> None:
    x = torch.ones(3, dtype=torch.float16)
    decoded(Float16(), x).zero_()
    assert x.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("exponent", [-120, -40, 0, 3, 90])
def test_fp8_takes_the_nearest_number(format: str, exponent: int) -> None:
    x = torch.ldexp(torch.cat((gaussian(3000), gaussian(50) * 1e-3)), torch.tensor(exponent))
    codec = Float8(format)
    scale = codec.encode(x)[1].double()
    dtype = torch.float8_e4m3fn if format == "e4m3" else torch.float8_e5m2
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()] * scale
    nearest = (x.double()[:, None] - numbers).abs().amin(1)
    assert torch.equal((decoded(codec, x).double() - x.double()).abs(), nearest)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_fp8_s_scale_is_the_least_power_of_two(format: str) -> None:
    top = {"e4m3": 448.0, "e5m2": 57344.0}[format]
    for largest, scale in ((top, 1.0), (top * 1.001, 2.0), (top / 2, 0.5), (top * 2.0**-140, 2.0**-126)):
        assert Float8(format).encode(torch.tensor([largest, 0.0]))[1].item() == scale
    assert decoded(Float8(format), torch.tensor([top, 1.0])).tolist() == [top, 1.0]


def test_fp8_of_float64_has_float64_s_range() -> None:
    x = torch.tensor([1e300, -3e299], dtype=torch.float64)
    torch.testing.assert_close(decoded(Float8(), x), x, rtol=2.0**-4, atol=0)


def test_fp8_knows_two_formats() -> None:
    with pytest.raises(CompressorError) as caught:
        compressor("fp8(format=e4m4)")
    assert str(caught.value) == (
        "unknown format\n  where:   fp8: format\n  found:   'e4m4'\n  allowed: e4m3, e5m2\n  try:     e4m3"
    )


@pytest.mark.parametrize("spelling", ["fp16", "bf16", "fp8", "fp8(format=e5m2)"])
def test_names_that_end_in_digits(spelling: str) -> None:
    assert str(compressor(spelling)) == spelling
    with pytest.raises(CompressorError, match="unknown compressor"):
        compressor("fp17")


SHORT = ["fp16", "bf16", "fp8", "fp8(format=e5m2)", "fp8(group=channel)"]
"""Casts that round."""


def at_random(spelling: str) -> Compressor:
    return compressor(f"{spelling.removesuffix(')')}{', ' if '(' in spelling else '('}rounding=stochastic)")


def grid(codec: Compressor) -> tuple[int, int]:
    """Significant bits, and the exponent of the least normal number."""
    if isinstance(codec, Float8):
        return (4, -6) if codec.format == "e4m3" else (3, -14)
    return (11, -14) if isinstance(codec, Float16) else (8, -126)


@pytest.mark.parametrize("spelling", SHORT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [7, 20000], ids=["torch", "compiled"])
def test_stochastic_rounding_takes_one_of_the_two_numbers_around(
    spelling: str, dtype: torch.dtype, count: int
) -> None:
    """By an independent reference, in exact arithmetic on powers of two: floor(v / unit + u) * unit, 0 < u < 1."""
    codec, x = at_random(spelling), gaussian(1, 3, count).pow(3).to(dtype).transpose(1, 2)
    found = decoded(codec, x).double().numpy()
    scale = codec.encode(x)[1].double().numpy() if isinstance(codec, Float8) else np.ones(1)
    values = x.double().numpy() / scale
    significant, least = grid(codec)
    exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, least)
    unit = np.ldexp(1.0, exponent - significant + 1)
    below = np.floor(values / unit) * unit
    assert bool(((found == below * scale) | (found == (below + unit) * scale)).all())
    nearest = decoded(compressor(spelling), x).double().numpy()
    assert bool((found[values == below] == nearest[values == below]).all())  # its own numbers are left alone
    assert np.mean(found != nearest) > 0.1


@pytest.mark.parametrize("spelling", SHORT)
def test_stochastic_rounding_keeps_the_mean(spelling: str) -> None:
    """The errors of many elements are as far from 0 on average as those of independent ones may be."""
    codec, x = at_random(spelling), gaussian(40, 1000) * 0.37 + 0.11
    error = (decoded(codec, x).double() - x.double()).flatten()
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(error.numel())
    again = [
        (decoded(codec, torch.cat((x, torch.full((1, 1000), 1e-3 * k)))).double()[:40] - x) for k in range(64)
    ]
    mean = torch.stack(again).mean(0)  # the same elements in 64 tensors: their errors differ
    assert float(mean.std()) < 2 * float(error.std()) / 8


def test_stochastic_rounding_keeps_what_is_too_small_on_average() -> None:
    x = torch.full((400, 100), 2.0**-24 / 8)  # an eighth of fp16's least number
    x[0, 0] = 1.0
    assert float(decoded(Float16(), x)[1:].max()) == 0.0
    assert float(decoded(at_random("fp16"), x)[1:].mean() / x[1:].mean()) == pytest.approx(1.0, abs=0.1)


def test_stochastic_rounding_stays_in_the_range() -> None:
    x = torch.tensor([65519.0, -65519.0, 1.0])
    assert decoded(at_random("fp16"), x).tolist() == [65504.0, -65504.0, 1.0]
    for spelling in ("fp16", "bf16"):
        x = torch.tensor([1e300, 1.0], dtype=torch.float64)
        with pytest.raises(CompressorError) as caught:
            at_random(spelling).encode(x)
        assert f"{spelling}(rounding=stochastic) cannot hold values of this size" in str(caught.value)
    x = gaussian(30, 30) * 1e3
    assert torch.equal(at_random("fp16").encode(x.half())[0], x.half())


@pytest.mark.parametrize("group", ["channel", "sample", 8])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_fp8_has_a_scale_for_each_group(group: str | int, format: str) -> None:
    """What a group decodes to is what it would alone."""
    x = gaussian(4, 6, 8) * torch.logspace(-6, 6, 6)[:, None]
    codec = Float8(format, group=group)
    found, (_, scale) = decoded(codec, x), codec.encode(x)
    dimension = {"channel": 2, "sample": 0}.get(str(group), 1)
    rows, back = (t.reshape(-1, 8) if group == 8 else t.movedim(dimension, 0).flatten(1) for t in (x, found))
    for row, got, one in zip(rows, back, scale, strict=True):
        assert torch.equal(decoded(Float8(format), row), got)
        assert torch.equal(Float8(format).encode(row)[1][0], one)


@pytest.mark.parametrize(
    "spelling", ["fp8(group=rows)", "fp8(group=4)", "bf16(group=channel)", "fp16(rounding=up)"]
)
def test_options_that_there_are_not(spelling: str) -> None:
    with pytest.raises(CompressorError, match=r"wrong argument|has no argument"):
        compressor(spelling)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (9,), (2, 1, 31, 31)])
def test_booleans_are_exact(shape: tuple[int, ...]) -> None:
    x, codec = gaussian(*shape) > 0.5, PackedBool()
    spec = TensorSpec.of(x)
    assert codec.takes(spec) and codec.wire_bytes(spec) == -(-x.numel() // 8)
    for view in (x, x.transpose(-1, -2)) if x.dim() > 1 else (x,):
        payload = codec.encode(view)
        assert tuple(map(TensorSpec.of, payload)) == codec.wire(TensorSpec.of(view))
        back = codec.decode(payload, TensorSpec.of(view))
        assert back.dtype == torch.bool and torch.equal(back, view)


def test_packed_bool_takes_nothing_else() -> None:
    assert not PackedBool().takes(TensorSpec((3,), torch.uint8))
    with pytest.raises(CompressorError, match=r"allowed: bool\n.*'none'"):
        PackedBool().encode(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(CompressorError, match="not a payload"):
        PackedBool().decode((torch.zeros(3, dtype=torch.uint8),), TensorSpec((3,), torch.bool))
