"""Compiled kernels give the numbers of the plain torch ones, and are not missed where they do not work."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fxsplit.compressors import (
    Compressor,
    FastQuantization,
    SortQuantization,
    Uniform,
    cpu_kernels,
    kernels,
    torch_kernels,
)
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.packing import pack
from fxsplit.compressors.scheme import Scheme, make_table, seeds
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

ROOT = Path(__file__).parent.parent
LAYOUTS = [
    Layout(1, 1, 1),
    Layout(1, 1, 2047),
    Layout(1, 5, 403),
    Layout(3, 5, 64),
    Layout(4, 3, 49),
    Layout(2, 40, 8),
    Layout(33, 17, 1),
    Layout(9, 6, 5),
    Layout(1, 1, 300_000),
    Layout(2, 3, 130),
]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CODECS: list[Compressor] = [
    *(Uniform(bits) for bits in (2, 4, 7, 8, 11, 16)),
    *(SortQuantization(bits, split) for bits, split in ((4, 1), (8, 2), (8, 3), (12, 8), (16, 4))),
]


def data(count: int, kind: str = "gaussian", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    kinds = {
        "gaussian": x,
        "relu": x.relu(),
        "signed zeros": torch.where(x > 0.3, x, x.sign() * 0.0),
        "relu6": (4 * x).clamp(0, 6),
        "integers": (3 * x).round(),
        "constant": torch.full_like(x, -1.5),
        "heavy": x.pow(9),
        "tiny": x * 1e-41,
        "huge": x.clamp(-3, 3) * 1e38,
        "descending": x.sort(descending=True).values,
        "one outlier": torch.cat((x[1:] * 1e-3, torch.tensor([1e4]))),
    }
    return kinds[kind].to(dtype)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled kernels whatever the size, selection in place of every sort, no failure covered up."""
    monkeypatch.setattr(kernels, "COMPILED_FROM", 0)
    monkeypatch.setattr(cpu_kernels, "SORTED_UP_TO", 0)
    monkeypatch.setattr(cpu_kernels, "_failed", False)
    yield
    assert cpu_kernels.available()


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_and_values_are_equal(layout: Layout, stochastic: bool) -> None:
    for index, codec in enumerate(CODECS):
        dtype = FLOATS[index % 4] if layout.numel < 10_000 else torch.float32
        assert isinstance(codec, Uniform | SortQuantization)
        x, scheme = data(layout.numel, dtype=dtype), Scheme(layout, codec.bits, codec.split_bits, stochastic)
        minima, maxima = codec.rule(layout).ranges(
            x, layout, torch_kernels.extremes, torch_kernels.order_statistics
        )
        wide = torch.promote_types(dtype, torch.float32)
        table, minima, inverse = make_table(minima, maxima, scheme.levels, wide)
        seed = seeds(table) if stochastic else None
        expected = torch_kernels.encode(x, minima, inverse, seed, scheme)
        assert torch.equal(cpu_kernels.encode(x, minima, inverse, seed, scheme), expected)
        spec = TensorSpec.of(x)
        back = torch_kernels.decode(expected, table, scheme, spec)
        assert torch.equal(cpu_kernels.decode(expected, table, scheme, spec), back)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("bits", range(2, 17))
def test_every_number_of_bits_and_length(bits: int) -> None:
    for count in (1, 7, 8, 9, 1023, 40_003):
        x, codec = data(count), Uniform(bits)
        scheme, spec = Scheme(Layout(1, 1, count), bits, 0), TensorSpec.of(x)
        codes, table = codec.encode(x)
        minima = x.double().min().view(1, 1)
        _, minima, inverse = make_table(minima, x.double().max().view(1, 1), scheme.levels, torch.float32)
        assert torch.equal(codes, torch_kernels.encode(x, minima, inverse, None, scheme))
        expected = torch_kernels.decode(codes, table[:, None], scheme, spec)
        assert torch.equal(codec.decode((codes, table), spec), expected)
        shifted = torch.cat((codes[:1], codes))[1:]  # not at an even address
        assert torch.equal(codec.decode((shifted, table), spec), expected)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(
    "kind",
    [
        *("gaussian", "relu", "signed zeros", "relu6", "integers", "constant"),
        *("heavy", "tiny", "huge", "descending", "one outlier"),
    ],
)
def test_selected_ranks_are_those_of_a_sort(kind: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for count in (1, 2, 3, 10, 1000, 70_001):
            x = data(count, kind, dtype)
            if not bool(x.isfinite().all()):
                continue
            ranks = sorted({0, count // 4, count // 2, max(count // 2 - 1, 0), 3 * count // 4, count - 1})
            expected = x.double().sort().values[ranks]
            found = cpu_kernels.order_statistics(x, Layout(1, 1, count), [*ranks, count - 1])[0]
            assert torch.equal(found[:-1] + 0.0, expected + 0.0) and found[-1] == expected[-1]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.numel < 10_000], ids=str)
def test_extremes_and_ranks_of_every_group(layout: Layout) -> None:
    for dtype in FLOATS:
        x = data(layout.numel, "relu", dtype)
        assert torch.equal(cpu_kernels.extremes(x, layout), torch_kernels.extremes(x, layout))
        ranks = [0, layout.group_size // 2, layout.group_size - 1]
        expected = torch_kernels.order_statistics(x, layout, ranks)
        assert torch.equal(cpu_kernels.order_statistics(x, layout, ranks), expected)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_wherever_it_is(value: float) -> None:
    for codec in (Uniform(8), SortQuantization(8, group="channel"), FastQuantization(8, sample=10, group=500)):
        for place in (0, 1, 777, 1999):
            x = data(2000).view(4, 5, 100)
            x.view(-1)[place] = value
            counts = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
            with pytest.raises(CompressorError, match=f"{counts} of 2000"):
                codec.encode(x)


@pytest.mark.usefixtures("forced")
def test_ties_go_to_the_even_code() -> None:
    x = torch.arange(0, 15.5, 0.5)  # 16 levels, 1 apart: every second value is a tie
    for dtype in FLOATS:
        codes = Uniform(5).encode(torch.cat((x, torch.tensor([31.0]))).to(dtype))[0]
        expected = torch.from_numpy(np.rint(np.append(x.numpy(), 31.0))).int()
        assert torch.equal(codes, pack(expected, 5))


@pytest.mark.usefixtures("forced")
def test_no_threads_are_started() -> None:
    before = (
        threading.active_count(),
        len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0,
    )
    x = data(200_000)
    for codec in (Uniform(8), SortQuantization(8), FastQuantization(4)):
        codec.decode(codec.encode(x), TensorSpec.of(x))
    after = threading.active_count(), len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
    assert after == before


def in_a_process(program: str, **environment: str) -> str:
    """What a program prints in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def checksum() -> list[float]:
    """A number of each tensor that two codecs make."""
    found, x = [], data(40_000)
    for codec in (Uniform(8), FastQuantization(8)):
        codes, table = codec.encode(x)
        decoded = codec.decode((codes, table), TensorSpec.of(x))
        found += [tensor.double().sum().item() for tensor in (codes, table, decoded)]
    return found


def test_without_numba() -> None:
    """And nothing compiled is loaded before a tensor is large enough."""
    program = """
        import sys
        import torch
        from tests.test_compressors_kernels import Uniform, checksum
        Uniform(8).encode(torch.ones(100))
        names = ("numba", "fxsplit.compressors.triton_kernels")
        assert not any(name in sys.modules for name in names)
        sys.modules["numba"] = None
        print(checksum())
    """
    assert in_a_process(program).strip() == str(checksum())


def test_without_a_folder_for_what_numba_compiled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # a file, where a folder is wanted
    program = """
        from tests.test_compressors_kernels import checksum, cpu_kernels
        print(checksum())
        assert cpu_kernels.available()
    """
    found = in_a_process(program, NUMBA_CACHE_DIR=str(tmp_path / "file" / "folder"))
    assert found.strip() == str(checksum())


@pytest.mark.usefixtures("forced")
def test_a_failure_of_numba_is_said_once_and_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxsplit.compressors import numba_quantization

    x = data(5000)
    expected = Uniform(8).encode(x)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(numba_quantization, "quantize_one", fail)
    with pytest.warns(UserWarning, match="numba does not work here, .* no space left"):
        found = Uniform(8).encode(x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert kernels.kernels_for(x.device, x.numel()) is torch_kernels
    monkeypatch.setattr(cpu_kernels, "_failed", False)
