"""Triton's kernels give the numbers of the plain torch ones on the CPU, and say so where they give up."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fxsplit.compressors import FastQuantization, SortQuantization, Uniform, kernels, torch_kernels
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.scheme import Scheme, seeds
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec
from tests.test_compressors_kernels import FLOATS, LAYOUTS, data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MORE_LAYOUTS = [Layout(1, 1, 3_000_001), Layout(16, 32, 3136), Layout(64, 1280, 49), Layout(3, 7, 40_000)]
KINDS = [
    *("gaussian", "relu", "signed zeros", "relu6", "integers", "constant"),
    *("heavy", "tiny", "descending", "one outlier"),
]


def triton() -> kernels.Kernels:
    """The kernels that a CUDA tensor gets; the test is about nothing if those are torch's."""
    found = kernels.kernels_for(torch.device("cuda"), 1)
    assert found is not torch_kernels
    return found


def close_enough(found: Tensor, expected: Tensor, may_give_up: bool = False) -> None:
    """Equal, but that zeros have either sign, and where allowed NaN."""
    found = found.cpu()
    if may_give_up:
        found = torch.where(found.isnan(), expected, found)
    assert torch.equal(found + 0.0, expected + 0.0)


@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE_LAYOUTS], ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_and_values_are_equal(layout: Layout, stochastic: bool) -> None:
    fast = triton()
    for index, (bits, split) in enumerate(
        [*((bits, 0) for bits in range(2, 17)), (4, 1), (4, 2), (8, 2), (8, 3), (8, 4), (12, 8), (16, 4)]
    ):
        if layout.numel > 100_000 and index % 4:
            continue
        dtype = FLOATS[index % 4]
        x, scheme = data(layout.numel, dtype=dtype), Scheme(layout, bits, split, stochastic)
        codec = SortQuantization(bits, split) if split else Uniform(bits)
        wide = torch.promote_types(dtype, torch.float32)
        found = fast.ranges(x.cuda(), layout, codec.rule(layout), scheme.levels, wide)
        expected = torch_kernels.ranges(x, layout, codec.rule(layout), scheme.levels, wide)
        assert found.are_finite()
        for name in ("table", "minima", "inverse"):
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
        seed = seeds(expected.table) if stochastic else None
        if stochastic:
            assert seed is not None
            device_seed = fast.seeds(found.table)
            assert torch.equal(device_seed.cpu().long() & 0xFFFFFFFF, seed.long() & 0xFFFFFFFF)
        else:
            device_seed = None
        codes = torch_kernels.encode(x, expected.minima, expected.inverse, seed, scheme)
        device_codes = fast.encode(x.cuda(), found.minima, found.inverse, device_seed, scheme)
        assert torch.equal(device_codes.cpu(), codes)
        spec = TensorSpec.of(x)
        decoded = fast.decode(device_codes, found.table, scheme, spec)
        assert torch.equal(decoded.cpu(), torch_kernels.decode(codes, expected.table, scheme, spec))


@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE_LAYOUTS], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extremes_and_ranks_are_those_of_a_sort(layout: Layout, kind: str) -> None:
    fast = triton()
    for dtype in FLOATS:
        x = data(layout.numel, kind, dtype)
        if not bool(x.isfinite().all()):
            continue
        close_enough(fast.extremes(x.cuda(), layout), torch_kernels.extremes(x, layout))
        for buckets in (2, 4, 8):
            size = layout.group_size
            step = -(-size // buckets)
            starts = [min(start, size - 1) for start in range(0, step * buckets, step)]
            ranks = sorted({*starts, *(max(start - 1, 0) for start in starts), size - 1})
            expected = torch_kernels.order_statistics(x, layout, ranks)
            close_enough(fast.order_statistics(x.cuda(), layout, ranks), expected, may_give_up=True)


@pytest.mark.parametrize("kind", KINDS)
def test_on_usual_data_nothing_is_sorted(kind: str) -> None:
    """The answer NaN, after which everything is sorted, is for data that was made for it."""
    x, ranks = data(3_000_000, kind), [0, 749_999, 750_000, 1_499_999, 1_500_000, 2_249_999, 2_250_000, 2_999_999]
    found = triton().order_statistics(x.cuda(), Layout(1, 1, len(x)), ranks)
    close_enough(found[0], x.double().sort().values[ranks])


@pytest.mark.parametrize("group", ["tensor", "channel", "sample", 64])
def test_codecs_give_the_cpus_bytes(group: str | int) -> None:
    shapes = [(), (1,), (4, 32, 28, 28), (8, 16, 64), (3, 1280, 7, 7)]
    for shape, dtype, rounding in itertools.product(shapes, FLOATS, ("nearest", "stochastic")):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)
        if isinstance(group, int) and x.numel() % group:
            continue
        for codec in (
            Uniform(8, group=group, rounding=rounding),
            Uniform(4, group=group, rounding=rounding),
            SortQuantization(8, group=group, rounding=rounding),
            FastQuantization(8, group=group, rounding=rounding),
        ):
            on_cpu, on_gpu = codec.encode(x), codec.encode(x.cuda())
            for a, b in zip(on_gpu, on_cpu, strict=True):
                assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)), (str(codec), shape, dtype)
            spec = TensorSpec.of(x)
            assert torch.equal(codec.decode(on_gpu, spec).cpu(), codec.decode(on_cpu, spec))


def test_views_and_other_layouts_in_memory() -> None:
    x = torch.randn(8, 16, 14, 14, generator=torch.Generator().manual_seed(0))
    for view in (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, ::2], x[1:, 3:, :, 5]):
        codec = SortQuantization(8, group="channel")
        on_cpu, on_gpu = codec.encode(view), codec.encode(view.cuda())
        assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, on_cpu, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_wherever_it_is(value: float) -> None:
    for codec in (Uniform(8), SortQuantization(8), SortQuantization(8, group="channel"), FastQuantization(8)):
        for place in (0, 1, 777, 99_999):
            x = data(100_000).view(4, 5, 5000)
            x.view(-1)[place] = value
            counts = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
            with pytest.raises(CompressorError, match=counts):
                codec.encode(x.cuda())
