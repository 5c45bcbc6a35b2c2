"""K-means quantization against plain versions of it, and against the optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxsplit.compressors import Compressor, KMeans, compressor
from fxsplit.compressors.base import Memory
from fxsplit.compressors.packing import unpack
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec


def gaussian(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count))


def data(kind: str, count: int) -> Tensor:
    x = gaussian(count)
    kinds = {
        "gaussian": x,
        "relu": x.relu(),
        "laplace": x * x.abs(),
        "heavy": x.pow(7) * 1e3,
        "sparse": torch.where(gaussian(count + 1)[1:] > 1.6, x, 0.0),
        "outlier": torch.cat((x[1:] * 1e-3, torch.tensor([1e4]))),
        "integers": (4 * x).round(),
    }
    return kinds[kind]


KINDS = ("gaussian", "relu", "laplace", "heavy", "sparse", "outlier", "integers")


def decoded(codec: Compressor, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), TensorSpec.of(x))


def squared_error(codec: Compressor, x: Tensor) -> float:
    return float((decoded(codec, x).double() - x.double()).square().sum())


def least_squared_error(x: Tensor, count: int) -> float:
    """The optimum for `count` values, by dynamic programming over the cells of the sorted elements."""
    ordered = x.double().sort().values
    ordered = ordered - ordered.mean()
    zero = torch.zeros(1, dtype=torch.float64)
    sums, squares = torch.cat((zero, ordered.cumsum(0))), torch.cat((zero, ordered.square().cumsum(0)))
    start, end = torch.arange(len(x) + 1)[:, None], torch.arange(len(x) + 1)
    size = (end - start).clamp(min=1)
    cost = (squares - squares[:, None]) - (sums - sums[:, None]).square() / size  # [start, end]
    cost = cost.clamp(min=0).masked_fill(end < start, float("inf"))
    best = cost[0]
    for _ in range(count - 1):
        best = (best[:, None] + cost).amin(0)
    return float(best[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_near_the_optimum(kind: str, bits: int) -> None:
    x = data(kind, 500)
    least = least_squared_error(x, 2**bits)
    # The hard case are a few more distinct values than there are codes.
    factor = {"integers": 2.5, "sparse": 1.5}.get(kind, 1.35)
    assert squared_error(KMeans(bits, sample=0), x) <= factor * least + 1e-9 * float(x.square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_each_element_takes_the_nearest_value(kind: str, bits: int) -> None:
    x = data(kind, 3001)
    packed, codebook = KMeans(bits).encode(x)
    assert bool((codebook.diff() >= 0).all())
    distance = (x.double()[:, None] - codebook.double()).abs()
    found = codebook[unpack(packed, bits, 3001).long()].double()
    rounding = 2.0**-23 * codebook.abs().max().item()
    assert bool(((x.double() - found).abs() <= distance.amin(1) + rounding).all())


def test_values_are_the_means_of_their_cells() -> None:
    """Lloyd's condition, after so many iterations that nothing changes."""
    x = gaussian(2000).double()
    packed, codebook = KMeans(3, iterations=1000, sample=0).encode(x)
    codes = unpack(packed, 3, 2000)
    # The extremes are counted twice.
    weighted = torch.cat((x, x.aminmax().min[None], x.aminmax().max[None]))
    codes = torch.cat((codes, codes.aminmax().min[None], codes.aminmax().max[None]))
    means = torch.stack([weighted[codes == code].mean() for code in range(8)])
    torch.testing.assert_close(codebook, means, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_better_than_equal_steps(kind: str) -> None:
    x = data(kind, 20000)
    error = squared_error(KMeans(4), x)
    assert error <= squared_error(compressor("uniform4"), x)
    assert error <= squared_error(compressor("sortquant4"), x)


@pytest.mark.parametrize("seed", range(10))
def test_few_distinct_values_are_exact(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(12, generator=generator).pow(3)
    x = values[torch.randint(12, (3000,), generator=generator)]
    assert torch.equal(decoded(KMeans(4), x), x)


def test_an_outlier_outside_the_sample_keeps_its_place() -> None:
    x = gaussian(100_000)
    x[12345] = 1e4
    assert decoded(KMeans(4, sample=1000), x)[12345] == 1e4


def test_the_sample_is_of_all_columns() -> None:
    x = torch.arange(64.0).repeat(4096)
    assert squared_error(KMeans(6, sample=4096), x) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_warm_start(bits: int) -> None:
    """Never much worse than without, and better where the tensors are alike."""
    codec, memory = KMeans(bits, iterations=2), dict[str, Tensor]()
    for step, scale in enumerate((1, 1, 1, 1, 1e3, 1e-3, -1e10, 1e-20, 0, 1)):
        x = gaussian(5000 + step) * scale
        payload = codec.encode_next(x, memory)
        warm = float((codec.decode(payload, TensorSpec.of(x)) - x).double().square().sum())
        assert warm <= 1.01 * squared_error(codec, x)
        assert codec.memory_bytes(TensorSpec.of(x)) == (memory["codebook"].nbytes, 0)
    same = gaussian(5000)
    errors = [squared_error(codec, same)]
    for _ in range(5):
        payload = codec.encode_next(same, memory)
        errors.append(float((codec.decode(payload, TensorSpec.of(same)) - same).double().square().sum()))
    assert errors[-1] < errors[0]


def test_memories_that_do_not_fit() -> None:
    x, codec = gaussian(100), KMeans(4)
    cold = codec.encode(x)
    memories: list[Memory] = [
        {"codebook": torch.zeros(8)},
        {"codebook": torch.full((16,), 3e38)},
        {"codebook": torch.full((16,), 1e300, dtype=torch.float64)},
    ]
    for memory in memories:
        assert all(torch.equal(a, b) for a, b in zip(codec.encode_next(x, memory), cold, strict=True))
    memory = memories[0]
    codec.encode_next(gaussian(0), memory)
    assert torch.equal(memory["codebook"], cold[1])


def test_options() -> None:
    assert compressor("kmeans3(iterations=4, sample=0)") == KMeans(3, 4, 0)
    assert str(compressor("kmeans")) == "kmeans4"
    for spelling in ("kmeans9", "kmeans0", "kmeans4(iterations=-1)", "kmeans4(sample=0.5)"):
        with pytest.raises(CompressorError, match="allowed: an integer from"):
            compressor(spelling)


def test_wire() -> None:
    spec = TensorSpec((3, 5), torch.bfloat16)
    assert [str(s) for s in KMeans(3).wire(spec)] == ["uint8[6]", "float32[8]"]
    assert KMeans(4).wire_bytes(TensorSpec((64, 32, 112, 112), torch.float32)) == 64 * 32 * 112 * 112 // 2 + 64


def test_a_codebook_of_each_group_is_that_of_the_group_alone() -> None:
    x = gaussian(4 * 6 * 50).view(4, 6, 50).pow(3)
    for group, parts in (("sample", x.unbind(0)), ("channel", x.unbind(2)), (60, x.view(-1, 60).unbind(0))):
        codebook = KMeans(2, group=group).encode(x)[1]
        for found, part in zip(codebook, parts, strict=True):
            expected = KMeans(2, sample=0).encode(part)[1]
            # The same numbers in the same order; the stride of a sample of the part alone is 1, too.
            assert torch.equal(found, expected)


def test_stochastic_rounding_keeps_the_mean() -> None:
    x = torch.cat([gaussian(100).clamp(-1.5, 1.5)] * 1000)
    for group in ("tensor", 100):
        codec = KMeans(2, group=group, rounding="stochastic")
        mean = decoded(codec, x).view(1000, 100).double().mean(0)
        assert float((mean - x[:100].double()).abs().max()) < 0.12  # 4 deviations of 1000 choices of two values
        assert float(mean.mean() - x[:100].double().mean()) < 0.01
    extremes = KMeans(2, rounding="stochastic").encode(x)[1][[0, -1]]
    assert extremes.tolist() == [float(x.min()), float(x.max())]
