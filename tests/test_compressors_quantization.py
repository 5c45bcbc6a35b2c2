"""The quantizers against plain float64 versions of their algorithms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsplit.compressors import Compressor, FastQuantization, SortQuantization, Uniform, compressor
from fxsplit.compressors.packing import unpack
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec


def data(name: str, count: int) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    kinds = {
        "gaussian": x,
        "relu": x.relu(),
        "relu6": (4 * x).clamp(0, 6),
        "heavy": x.pow(7) * 1e3,
        "constant": torch.full_like(x, -1.25),
        "integers": (3 * x).round(),
        "two values": (x > 0).float(),
        "outlier": torch.cat((x[1:] * 1e-3, torch.tensor([1e4]))),
        "tiny": x * 1e-38,
        "huge": (x / x.abs().max()).double().mul(3.4e38).float(),
    }
    return kinds[name]


KINDS = (
    "gaussian",
    "relu",
    "relu6",
    "heavy",
    "constant",
    "integers",
    "two values",
    "outlier",
    "tiny",
    "huge",
)
SIZES = (1, 2, 3, 5, 17, 64, 1000, 4099)


def uniform_reference(x: Tensor, bits: int) -> Tensor:
    """[n] float64 -> what uniform quantization makes of it."""
    low, levels = x.min(), 2**bits - 1
    step = (x.max() - low) / levels
    return low + step * ((x - low) / step).round() if step > 0 else x.clone()


def sort_reference(x: Tensor, bits: int, split: int) -> Tensor:
    """Algorithm 1, line by line, in float64."""
    flat = x.double().flatten()
    ordered, index = torch.sort(flat)
    out = torch.empty_like(flat)
    for values, positions in zip(torch.chunk(ordered, 2**split), torch.chunk(index, 2**split), strict=True):
        out[positions] = uniform_reference(values, bits - split)
    return out.view(x.shape)


def decoded(codec: Compressor, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), TensorSpec.of(x))


def rounding(x: Tensor) -> float:
    """What float32 tables and outputs may add to the error for a tensor of this range."""
    wide = x.double()
    return 2.0**-23 * (wide.max() - wide.min() + wide.abs().max()).item() + 2.0**-133


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("bits", "split"),
    [(16, 4), (12, 3), (8, 2), (8, 4), (4, 1), (4, 2), (6, 1), (5, 1), (2, 1), (3, 2), (8, 7), (10, 7)],
)
def test_sort_quantization_is_algorithm_1(kind: str, size: int, bits: int, split: int) -> None:
    x = data(kind, size)
    if kind == "huge" and bits - split == 1:
        pytest.skip("a step as wide as float32 itself is refused")
    found = decoded(SortQuantization(bits, split), x).double()
    assert (found - sort_reference(x, bits, split)).abs().max().item() <= rounding(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sort_quantization_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    x = data(kind, 1001).to(dtype)
    if not bool(x.isfinite().all()):
        pytest.skip("out of the range of float16")
    expected = sort_reference(x, 8, 2)
    found = decoded(SortQuantization(8), x)
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-13 * x.abs().max().item())
    else:
        # Rounding the float32 value may fall to the other side of a tie.
        spacing = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).smallest_normal * 2.0**-7
        assert bool(((found.double() - expected).abs() <= spacing + rounding(x)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [2, 4, 8, 11, 16])
def test_uniform_is_one_range(kind: str, size: int, bits: int) -> None:
    x = data(kind, size)
    found = decoded(Uniform(bits), x).double()
    assert (found - uniform_reference(x.double(), bits)).abs().max().item() <= rounding(x)


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outlier"])
def test_codes_without_ties_are_those_of_the_sort(kind: str) -> None:
    x, bits, split = data(kind, 4099), 12, 3
    index = x.double().sort().indices
    expected = torch.empty(4099, dtype=torch.int32)
    for bucket, positions in enumerate(torch.chunk(index, 2**split)):
        values = x[positions].double()
        step = (values[-1] - values[0]) / (2 ** (bits - split) - 1)
        code = ((values - values[0]) / step).round().to(torch.int32)
        expected[positions] = (bucket << (bits - split)) + code
    codes = unpack(SortQuantization(bits, split).encode(x)[0], bits, 4099)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("size", [3, 10, 64, 4099])
def test_table_holds_minimum_and_step_of_each_chunk(size: int) -> None:
    x = data("gaussian", size)
    _, table = SortQuantization(12, 3).encode(x)
    chunks = torch.chunk(x.double().sort().values, 8)
    for bucket, chunk in enumerate(chunks):
        assert table[0, bucket] == chunk[0]
        assert table[1, bucket] == ((chunk[-1] - chunk[0]) / 511).float()
    assert torch.equal(table[0, len(chunks) :], x.max().expand(8 - len(chunks)))
    assert not table[1, len(chunks) :].any()


@pytest.mark.parametrize(("bits", "split"), [(16, 4), (12, 3), (8, 2), (4, 1), (2, 1), (3, 1), (6, 1), (5, 1)])
def test_default_split_is_a_quarter(bits: int, split: int) -> None:
    assert SortQuantization(bits).split_bits == FastQuantization(bits).split_bits == split
    assert SortQuantization(bits).wire(TensorSpec((7, 3), torch.float16)) == (
        TensorSpec((math.ceil(21 * bits / 8),), torch.uint8),
        TensorSpec((2, 2**split), torch.float32),
    )


def test_four_bits_are_four_bits() -> None:
    spec = TensorSpec((64, 32, 112, 112), torch.float32)
    for spelling in ("uniform4(group=tensor)", "sortquant4", "fastquant4"):
        assert compressor(spelling).wire_bytes(spec) <= spec.nbytes / 8 + 16
    x = data("gaussian", 1001)
    (packed, table), codec = SortQuantization(4).encode(x), SortQuantization(4)
    assert packed.numel() == 501
    low = (packed[:500] & 15).tolist()
    values = (table[0, :, None] + table[1, :, None] * torch.arange(8)).flatten()
    torch.testing.assert_close(values[low], decoded(codec, x)[:1000:2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "codec",
    [SortQuantization(8), FastQuantization(8), FastQuantization(8, sample=50), FastQuantization(6, sample=0)],
    ids=str,
)
def test_error_is_half_a_step_of_the_bucket(codec: Compressor, kind: str, dtype: torch.dtype) -> None:
    x = data(kind, 4099).to(dtype)
    codes, (minima, steps) = codec.encode(x)
    bits = 8 * codes.numel() // x.numel()
    bucket = unpack(codes, bits, x.numel()).long() >> (bits - 1 - (bits == 8))
    half = steps.double()[bucket] / 2
    error = (decoded(codec, x).double() - x.double()).abs()
    assert minima.numel() == (4 if bits == 8 else 2)
    assert bool((error <= half * (1 + 1e-6) + rounding(x)).all())


@pytest.mark.parametrize("codec", [SortQuantization(8, 4), FastQuantization(8, 4), Uniform(8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_larger_values_never_decode_to_smaller_ones(codec: Compressor, kind: str) -> None:
    x = data(kind, 1000).sort().values
    assert bool((decoded(codec, x).diff() >= -rounding(x)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_minima_of_buckets_decode_to_themselves(kind: str) -> None:
    x = data(kind, 1000)
    for codec in (SortQuantization(8, 4), FastQuantization(8, 4), Uniform(8)):
        minima = codec.encode(x)[1][0]
        found = decoded(codec, x)
        for minimum in minima:
            assert bool((found[x == minimum] == minimum).all())


def test_fast_quantization_of_all_the_data_has_the_exact_bounds() -> None:
    x = data("gaussian", 4096)
    exact, fast = SortQuantization(8).encode(x)[1], FastQuantization(8, sample=0).encode(x)[1]
    assert torch.equal(exact[0], fast[0])
    ends = torch.cat((exact[0, 1:], x.max()[None]))
    torch.testing.assert_close(fast[0] + 63 * fast[1], ends)


@pytest.mark.parametrize("bits", [8, 6, 5])
def test_fast_quantization_of_a_sample_is_nearly_as_good(bits: int) -> None:
    x = data("gaussian", 200_000)
    exact = (decoded(SortQuantization(bits), x) - x).norm()
    fast = (decoded(FastQuantization(bits, sample=4096), x) - x).norm()
    assert fast <= 1.1 * exact


def test_fast_quantization_samples_every_column() -> None:
    # Every 16th element of rows of 16 would be one column, here the only one that is constant.
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 0
    fast = (decoded(FastQuantization(8, sample=256), x) - x).norm()
    assert fast <= 1.3 * (decoded(SortQuantization(8), x) - x).norm()


@pytest.mark.parametrize("codec", [SortQuantization(2, 1), FastQuantization(2, 1)], ids=str)
def test_refuses_a_range_that_its_table_cannot_hold(codec: Compressor) -> None:
    x = torch.tensor([-3e38, -3e38, 3e38, 2e38, -3e38])
    with pytest.raises(CompressorError, match=r"span more than a step .*\n  found:   -3e\+38 to 3e\+38"):
        codec.encode(x[[0, 2, 2]])
    with pytest.raises(CompressorError, match="more bits"):
        Uniform(8).encode(torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64))


def test_greatest_numbers_do_not_overflow() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        limit = torch.finfo(dtype).max
        x = torch.tensor([-limit, limit, 0.0, limit / 3, -limit / 7], dtype=dtype)
        for codec in (Uniform(8), SortQuantization(8), FastQuantization(8)):
            assert bool(decoded(codec, x).isfinite().all())


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.integers(4, 16),
    st.data(),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_float32_values(values: list[float], bits: int, draw: st.DataObject) -> None:
    split = draw.draw(st.integers(1, bits - 2))
    x = torch.tensor(values, dtype=torch.float32)
    found = decoded(SortQuantization(bits, split), x).double()
    assert bool(((found - sort_reference(x, bits, split)).abs() <= rounding(x)).all())
    for codec in (Uniform(bits), FastQuantization(bits, split), FastQuantization(bits, split, sample=3)):
        widest = codec.encode(x)[1][1].max().item()
        assert (decoded(codec, x).double() - x.double()).abs().max().item() <= widest / 2 + rounding(x)
