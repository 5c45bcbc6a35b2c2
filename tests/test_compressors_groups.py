"""The options of the quantizers, `group` and `rounding`, against a reference in plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fxsplit.compressors import Compressor, FastQuantization, SortQuantization, Uniform, compressor
from fxsplit.compressors.packing import unpack
from fxsplit.compressors.quantization import Quantization
from fxsplit.compressors.scheme import dither, mix
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

GROUPS = ["tensor", "sample", "channel", 8, 35]
SHAPES = [(2, 5, 7, 4), (4, 10, 7), (5, 56), (280,)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def data(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))
    kinds = {
        "gaussian": x,
        "relu": x.relu(),
        "heavy": x.pow(5),
        "ties": (2 * x).round() / 4,
        "constant": torch.full_like(x, -1.25),
        "one constant channel": torch.cat((torch.zeros_like(x[:1]), x[1:])),
    }
    return kinds[kind].to(dtype)


def group_of_elements(shape: tuple[int, ...], group: str | int) -> tuple[Integers, int]:
    """The group of every element, in logical order, and the number of groups."""
    places = np.indices(shape).reshape(len(shape), -1)
    if isinstance(group, int):
        return np.arange(math.prod(shape)) // group, math.prod(shape) // group
    dimension = {"sample": 0, "channel": 2 if len(shape) == 3 else 1}.get(group, -1)
    if dimension < 0 or len(shape) <= dimension:
        return np.zeros(math.prod(shape), np.int64), 1
    return places[dimension], shape[dimension]


def ranges(values: Floats, codec: Quantization) -> tuple[Floats, Floats]:
    """Minima and maxima of the buckets of one group."""
    if isinstance(codec, Uniform):
        return values.min(keepdims=True), values.max(keepdims=True)
    buckets = 2**codec.split_bits
    chunks = [chunk.numpy() for chunk in torch.chunk(torch.from_numpy(np.sort(values)), buckets)]
    chunks += [values.max(keepdims=True)] * (buckets - len(chunks))
    minima = np.array([chunk[0] for chunk in chunks])
    if isinstance(codec, FastQuantization):  # of all the elements, in these tests
        return minima, np.append(minima[1:], values.max())
    return minima, np.array([chunk[-1] for chunk in chunks])


def reference_mix(number: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        number = ((number ^ number >> shift) * factor) % 2**32
    return number


def reference_dither(table: Tensor, elements: Integers, groups: Integers) -> Floats:
    """u of every element; `table` is [2, groups, buckets]."""
    seeds = []
    for group in range(table.shape[1]):
        words = np.frombuffer(table[:, group].contiguous().numpy().tobytes(), np.uint32)
        total = sum(reference_mix((int(w) + (j + 1) * 0x9E3779B9) % 2**32) for j, w in enumerate(words))
        seeds.append(reference_mix(total % 2**32))
    return np.array(
        [(reference_mix((int(i) + seeds[g]) % 2**32) + 0.5) / 2**32 for i, g in zip(elements, groups, strict=True)]
    )


def reference(x: Tensor, codec: Quantization) -> tuple[Integers, Tensor]:
    """Codes and table, from the definition: in float64, every operation rounded on its own."""
    values = x.double().flatten().numpy()
    groups, count = group_of_elements(tuple(x.shape), codec.group)
    width = 2 ** (codec.bits - codec.split_bits)
    found = [ranges(values[groups == g], codec) for g in range(count)]
    minima, maxima = (np.stack(part) + 0.0 for part in zip(*found, strict=True))
    spans = maxima - minima
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(spans > 0, (width - 1) / spans, 0.0)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    table = torch.from_numpy(np.stack((minima, spans / (width - 1)))).to(dtype)
    bucket = (values[:, None] >= minima[groups, 1:]).sum(1)
    scaled = (values - minima[groups, bucket]) * inverse[groups, bucket]
    if codec.rounding == "stochastic":
        rounded = np.floor(scaled + reference_dither(table, np.arange(len(values)), groups))
    else:
        rounded = np.rint(scaled)
    codes = bucket * width + np.clip(rounded, 0, width - 1).astype(np.int64)
    return codes, table[:, 0] if codec.group == "tensor" else table


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "ties", "one constant channel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_codes_and_tables_are_those_of_the_definition(
    kind: str, shape: tuple[int, ...], group: str | int, rounding: str
) -> None:
    for dtype in FLOATS if rounding == "nearest" else [torch.float32, torch.float64]:
        x = data(kind, shape, dtype)
        for codec in (
            Uniform(4, group=group, rounding=rounding),
            SortQuantization(8, group=group, rounding=rounding),
            FastQuantization(5, 2, group=group, rounding=rounding),
            SortQuantization(10, 4, group=group, rounding=rounding),
        ):
            codes, table = codec.encode(x)
            expected_codes, expected_table = reference(x, codec)
            assert torch.equal(table, expected_table)
            assert np.array_equal(unpack(codes, codec.bits, x.numel()).numpy(), expected_codes)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_decodes_to_minimum_and_steps(group: str | int, dtype: torch.dtype) -> None:
    x = data("gaussian", (2, 5, 7, 4), dtype)
    for codec in (Uniform(4, group=group), SortQuantization(8, group=group), FastQuantization(13, 2, group=group)):
        codes, table = codec.encode(x)
        numbers = unpack(codes, codec.bits, x.numel()).numpy().astype(np.int64)
        groups, count = group_of_elements(tuple(x.shape), group)
        minima, steps = table.double().numpy().reshape(2, count, -1)
        width = 2 ** (codec.bits - codec.split_bits)
        values = minima[groups, numbers // width] + steps[groups, numbers // width] * (numbers % width)
        expected = torch.from_numpy(values).to(table.dtype).to(dtype).view(x.shape)
        assert torch.equal(codec.decode((codes, table), TensorSpec.of(x)), expected)


@pytest.mark.parametrize(
    ("shape", "group", "groups"),
    [
        ((4, 3, 5, 5), "tensor", ()),
        ((4, 3, 5, 5), "sample", (4,)),
        ((4, 3, 5, 5), "channel", (3,)),
        ((4, 3, 5, 5, 2), "channel", (3,)),
        ((4, 3, 5), "channel", (5,)),
        ((4, 3), "channel", (3,)),
        ((4, 3), "sample", (4,)),
        ((12,), "channel", (1,)),
        ((12,), "sample", (12,)),
        ((), "channel", (1,)),
        ((), "sample", (1,)),
        ((0, 3), "sample", (0,)),
        ((0, 3), "channel", (3,)),
        ((3, 0), "channel", (0,)),
        ((4, 3, 0, 5), "channel", (3,)),
        ((4, 16), 8, (8,)),
        ((4, 16), 64, (1,)),
        ((0, 16), 8, (0,)),
    ],
)
def test_shape_of_the_table(shape: tuple[int, ...], group: str | int, groups: tuple[int, ...]) -> None:
    for codec in (Uniform(4, group=group), SortQuantization(8, group=group), FastQuantization(8, group=group)):
        spec = TensorSpec(shape, torch.float32)
        codes, table = codec.wire(spec)
        assert codes == TensorSpec((math.ceil(spec.numel * codec.bits / 8),), torch.uint8)
        assert table == TensorSpec((2, *groups, 2**codec.split_bits), torch.float32)
        x = torch.randn(shape)
        payload = codec.encode(x)
        assert tuple(TensorSpec.of(tensor) for tensor in payload) == codec.wire(spec)
        assert codec.decode(payload, spec).shape == x.shape


def test_a_block_must_divide_the_tensor_before_any_data_is_there() -> None:
    for codec in (Uniform(8, group=16), SortQuantization(8, group=16)):
        with pytest.raises(CompressorError, match="cannot be divided into blocks of 16") as caught:
            codec.wire(TensorSpec((3, 40), torch.float32))
        assert caught.value.found == "120 elements" and caught.value.allowed == "a multiple of 16"
        with pytest.raises(CompressorError, match="cannot be divided into blocks of 16"):
            codec.encode(torch.ones(3, 40))


@pytest.mark.parametrize("group", ["row", "", 7, 0, -8, True, 8.0, None])
def test_refuses_other_groups(group: Any) -> None:
    for kind in (Uniform, SortQuantization, FastQuantization):
        with pytest.raises(CompressorError, match="tensor, sample, channel, or an integer of at least 8"):
            kind(8, group=group)


@pytest.mark.parametrize("rounding", ["up", "", None, 1])
def test_refuses_other_roundings(rounding: Any) -> None:
    with pytest.raises(CompressorError, match="allowed: nearest, stochastic"):
        Uniform(8, rounding=rounding)


@pytest.mark.parametrize(
    ("spelling", "expected", "canonical"),
    [
        ("uniform4(group=channel)", Uniform(4, group="channel"), "uniform4(group=channel)"),
        ("uniform4(group=64)", Uniform(4, group=64), "uniform4(group=64)"),
        ('sortquant8(group="tensor")', SortQuantization(8, group="tensor"), "sortquant8"),
        (
            "sortquant8(group=channel, rounding=stochastic)",
            SortQuantization(8, group="channel", rounding="stochastic"),
            "sortquant8(group=channel, rounding=stochastic)",
        ),
        (
            "fastquant8(rounding=nearest,group=sample)",
            FastQuantization(8, group="sample"),
            "fastquant8(group=sample)",
        ),
    ],
)
def test_spellings(spelling: str, expected: Compressor, canonical: str) -> None:
    assert compressor(spelling) == expected == compressor(canonical)
    assert str(expected) == canonical


def test_channels_of_different_size_are_kept_apart() -> None:
    x = torch.randn(4, 6, 9, 9) * torch.logspace(-3, 3, 6)[:, None, None]
    by_channel = (
        Uniform(8, group="channel").decode(Uniform(8, group="channel").encode(x), TensorSpec.of(x)) - x
    ).square()
    tensor = Uniform(8, group="tensor")
    whole = (tensor.decode(tensor.encode(x), TensorSpec.of(x)) - x).square()
    assert (by_channel.sum((0, 2, 3)) <= whole.sum((0, 2, 3)) * 1.1).all()
    assert by_channel[:, 0].sum() < 1e-6 * whole[:, 0].sum()


def decoded(codec: Compressor, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), TensorSpec.of(x))


@pytest.mark.parametrize("spelling", ["uniform4", "uniform2", "sortquant4", "sortquant8(split=4)", "fastquant3"])
def test_stochastic_rounding_has_no_bias(spelling: str) -> None:
    """One value many times between two levels: the mean of what comes back is the value, to 4.5 sigma."""
    codec = compressor(spelling)
    codec = type(codec)(**{**vars(codec), "rounding": "stochastic"})
    count, ends = 50_000, torch.linspace(-1, 1, 1000)
    for value in (-0.77, -0.001, 0.3, 0.51):
        x = torch.cat((ends, torch.full((count,), value), ends))
        found = decoded(codec, x)[1000:-1000].double()
        step = (found.max() - found.min()).item()
        assert len(found.unique()) <= 2
        assert abs(found.mean().item() - torch.tensor(value).item()) <= 4.5 * step / 2 / math.sqrt(count) + 1e-7


def test_stochastic_error_of_a_tensor_averages_out() -> None:
    x = torch.randn(100, 1000)
    steps = Uniform(4).encode(x)[1][1].item()
    errors = decoded(Uniform(4, rounding="stochastic"), x) - x
    assert errors.abs().max() <= steps * 1.0001
    assert errors.mean().abs() <= 4.5 * steps / 2 / math.sqrt(x.numel())
    columns = errors.mean(0) / (steps / 2 / 10)  # no column, and no row, is rounded one way
    assert columns.abs().max() < 6 and (errors.mean(1) / (steps / 2 / math.sqrt(1000))).abs().max() < 6
    assert abs(torch.corrcoef(torch.stack((errors[:, :-1].flatten(), errors[:, 1:].flatten())))[0, 1]) < 0.02


@pytest.mark.parametrize("group", GROUPS)
def test_ends_of_a_range_stay_as_they_are(group: str | int) -> None:
    x = data("gaussian", (2, 5, 7, 4))
    groups = torch.from_numpy(group_of_elements(tuple(x.shape), group)[0])
    for bits in (2, 4, 8, 16):
        found = decoded(Uniform(bits, group=group, rounding="stochastic"), x).flatten()
        for g in groups.unique():
            values, back = x.flatten()[groups == g], found[groups == g]
            assert back[values.argmin()] == values.min()
            torch.testing.assert_close(back[values.argmax()], values.max(), rtol=1e-6, atol=1e-6)


def test_levels_stay_as_they_are() -> None:
    x = torch.arange(-8, 8).repeat(500).float()
    assert torch.equal(decoded(Uniform(4, rounding="stochastic"), x), x)


def test_another_tensor_is_rounded_by_other_numbers() -> None:
    codec, x = Uniform(4, rounding="stochastic"), torch.rand(1000)
    assert torch.equal(codec.encode(x)[0], codec.encode(x.clone())[0])
    x[3] = 1.5
    up = [(codec.encode(y)[0] != Uniform(4).encode(y)[0]) for y in (x, x * 1.0000005)]
    assert not torch.equal(*up)
    rows = torch.rand(1, 1000).repeat(2, 1)  # two groups with the same ranges
    first, second = decoded(Uniform(4, group="sample", rounding="stochastic"), rows)
    assert not torch.equal(first, second)


def test_the_hash_is_the_published_one() -> None:
    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert mix(torch.tensor(numbers)).tolist() == [reference_mix(number) for number in numbers]
    u = dither(torch.arange(100_000), torch.tensor(7))
    assert 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-squared of 99 degrees of freedom
