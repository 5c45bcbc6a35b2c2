"""The documentation of the compressors: its tables are complete and true, and its example runs."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fxsplit.compressors import COMPRESSORS, Compressor, compressor, registry
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec
from tests.test_compressors import gaussian, round_trip

TEXT = (Path(__file__).parent.parent / "docs" / "compressors.md").read_text()
RESULTS = Path(__file__).parent.parent / "benchmarks" / "accuracy" / "README.md"
CUTS = [TensorSpec((64, 32, 112, 112), torch.float32), TensorSpec((32, 128, 768), torch.float32)]


def example(folder: Path) -> ModuleType:
    """The example, as a module of another package."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    path = folder / "sign_of_the_docs.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_every_compressor_is_in_the_table() -> None:
    listed = re.findall(r"^\| `([a-z0-9]+)B?` \|", TEXT, re.MULTILINE)
    assert sorted({kind.name for kind in COMPRESSORS} - set(listed)) == []


@pytest.mark.parametrize("row", re.findall(r"^\| `(.+)` \| ([0-9.]+) \| ([0-9.]+) \|$", TEXT, re.MULTILINE))
def test_ratios(row: tuple[str, str, str]) -> None:
    spelling, *ratios = row
    assert [f"{compressor(spelling).wire_bytes(cut) / cut.nbytes:.3f}" for cut in CUTS] == ratios


def test_formulas() -> None:
    spec = TensorSpec((4, 6, 10, 10), torch.float32)
    expected = {
        **{"none": 9600, "fp16": 4800, "bf16": 4800, "fp8": 2404, "uniform8": 2448, "uniform4": 1248},
        **{
            "sortquant8": 2400 + 8 * 4,
            "fastquant8": 2400 + 8 * 4,
            "kmeans4": 1200 + 64,
            "kmeans4(group=channel)": 1200 + 6 * 64,
        },
        **{"kmeans8": 2400 + 1024, "fp8(group=channel)": 2424, "adaptive4(group=channel)": 1200 + 6 * 64 + 6},
        **{"poweriter(rank=2)": 4 * 2 * 106 * 4, "svd(rank=2)": 4 * 2 * 106 * 4},
    }
    assert {spelling: compressor(spelling).wire_bytes(spec) for spelling in expected} == expected


def test_what_is_said_of_accuracy_was_measured() -> None:
    """Every row is one of `benchmarks/accuracy`, of its longest training, and its numbers are those there."""
    results = RESULTS.read_text().split("<!-- end of results -->")[0]
    rows = [
        [cell.strip().strip("`") for cell in line.split("|")[1:-1]]
        for line in TEXT.split("<!-- study -->")[1].split("<!-- end of study -->")[0].splitlines()
        if line.startswith("| `")
    ]
    assert len(rows) > 8
    measured = [
        [cell.strip().strip("`") for cell in line.split("|")[1:-1]]
        for line in results.splitlines()
        if re.match(r"\| .*±", line)
    ]
    assert f"{next(row for row in measured if row[0] == 'none')[5].split(' ')[0]} %" in TEXT
    for activation, gradient, *numbers in rows:
        gradient = activation if gradient == "the same" else gradient
        (row,) = [
            row
            for row in measured
            if [c.replace("iterations=3, ", "") for c in row[1:3]] == [activation, gradient]
        ]
        assert [row[3], row[4], row[6].split(" ")[0]] == numbers


def test_gradients_have_a_milder_codec() -> None:
    wanted = {
        **{"uniform8": "uniform8", "sortquant8": "sortquant8", "uniform4": "uniform8", "kmeans4": "uniform8"},
        **{"sortquant4(split=2)": "uniform8", "adaptive3": "uniform8", "uniform4+zstd": "uniform8+zstd"},
        **{"topk+uniform4": "topk+uniform8", "fp8": "fp8", "none": "none"},
        "uniform4(feedback=true)": "uniform8(feedback=true)",
    }
    assert {spelling: str(compressor(spelling).for_gradients()) for spelling in wanted} == wanted


def test_groups_by_default() -> None:
    """Channels, unless their tables are more than an eighth of the codes; the tensor for the documents' codecs."""
    large, small = TensorSpec((16, 32, 8, 8), torch.float32), TensorSpec((16, 1280), torch.float32)
    for name in ("uniform8", "uniform4", "kmeans4", "adaptive4"):
        found, tensor = compressor(name), compressor(f"{name}(group=tensor)")
        channel = compressor(f"{name}(group=channel)")
        assert found.wire(large) == channel.wire(large) and found.wire(small) == tensor.wire(small)
    assert compressor("sortquant8") == compressor("sortquant8(group=tensor)")
    assert compressor("fastquant8") == compressor("fastquant8(group=tensor)")


def test_the_example_is_a_compressor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = example(tmp_path).Sign
    entry = EntryPoint("sign", "sign_of_the_docs:Sign", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    codec = compressor("sign(gain=0.5)")
    assert codec == kind(gain=0.5) and str(codec) == "sign(gain=0.5)" and isinstance(codec, Compressor)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for shape in ((), (0,), (1,), (7,), (2, 3, 5)):
            x = gaussian(*shape, dtype=dtype)
            found = round_trip(codec, x)
            if x.numel():
                torch.testing.assert_close(found, x.sign() * 0.5 * x.abs().mean(), rtol=1e-2, atol=0)
    with pytest.raises(CompressorError, match="1 NaN"):
        codec.encode(torch.tensor([float("nan")]))
