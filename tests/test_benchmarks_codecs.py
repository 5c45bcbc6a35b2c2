"""The codec benchmark: small runs, the report, and what it calls a miss."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.codecs.data import KINDS, made
from benchmarks.codecs.error import FAMILIES, SHAPE, measure_error
from benchmarks.codecs.plot import STYLES
from benchmarks.codecs.report import README, write_report
from benchmarks.codecs.subjects import CODECS, algorithm_1, algorithm_1_back, subjects
from benchmarks.codecs.targets import FIRST_USE, TARGETS, Target, judged
from benchmarks.readme import fill
from fxsplit.compressors import compressor
from fxsplit.spec import TensorSpec

ROOT = Path(__file__).parent.parent
SECTIONS = ("speed", "costs", "targets", "hivemind", "error", "best")
IMPOSSIBLE = (Target("uniform8", "encode", -1.0),)
CERTAIN = (Target("uniform8", "encode", float("inf")),)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: it takes one core and tells malloc what to do."""
    command = [sys.executable, "-m", "benchmarks.codecs", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def speed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codecs") / "speed.json"
    codecs = "none; uniform8; topk(ratio=0.1)"
    options = ("--mib", "1", "--repeats", "1", "--no-first-use", "--codecs", codecs, "--json", str(path))
    done = run("speed", *options)
    assert done.returncode == 0, done.stderr
    assert "| uniform8 | " in done.stdout
    return path


@pytest.fixture
def speed(speed_file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(speed_file.read_text())
    return found


def test_speed_of_every_row(speed: dict[str, Any]) -> None:
    assert not speed["failures"] and speed["shape"] == [1, 32, 112, 112]
    assert speed["wire"]["uniform8"] == pytest.approx(0.25, abs=0.001) and speed["wire"]["none"] == 1.0
    assert speed["error"]["none"] == 0.0 < speed["error"]["uniform8"] < 0.02
    for measured in speed["speed"].values():
        assert len(measured["subjects"]) == 6 and measured["copy_s"] > 0
        for row in measured["subjects"].values():
            for way in ("encode", "decode"):
                low, middle, high = row[way]["multiple"]
                assert 0 <= low <= middle <= high and row[way]["samples"] >= 1


def test_a_missed_target_is_named(speed: dict[str, Any]) -> None:
    missed = [line for line, met in judged(speed, IMPOSSIBLE).items() if not met]
    assert missed and all(line.startswith("uniform8: encode") for line in missed[: len(speed["speed"])])
    assert all(judged(copy.deepcopy(speed) | {"memory": {}}, CERTAIN).values())
    slow = speed | {
        "first_use": {"uniform8": {"empty": 1e9, "cached": 0.0}},
        "memory": {"uniform8": {"encode": 9.0}},
    }
    lines = [line for line, met in judged(slow, FIRST_USE).items() if not met]
    assert len(lines) == 2 and "first use" in lines[0] and "900.0% of the tensor" in lines[1]


def test_check_fails_with_a_missed_target() -> None:
    program = (
        "from benchmarks.codecs import targets; from benchmarks.codecs.__main__ import app; "
        "targets.TARGETS['cpu'] = (targets.Target('uniform8', 'encode', -1.0),); "
        "app(['speed', '--mib', '1', '--repeats', '1', '--no-first-use', '--codecs', 'uniform8', '--check'])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "**missed**: uniform8: encode" in done.stdout and "targets missed" in done.stdout


def test_an_unknown_codec_is_refused() -> None:
    done = run("speed", "--codecs", "uniform8; nosuch8")
    assert done.returncode == 2 and "unknown compressor" in done.stderr


def test_the_report_fills_every_place(speed_file: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text())
    for name in SECTIONS:
        fill(readme, name, "nothing")
    families = {"casts": ("fp16",), "uniform": ("uniform2", "uniform4(group=128)"), "zstd": ("uniform4+zstd",)}
    found = measure_error(None, 1, families) | {"command": "none"}
    error_file = tmp_path / "error.json"
    error_file.write_text(json.dumps(found))
    gpu_file = tmp_path / "gpu.json"
    gpu = json.loads(speed_file.read_text()) | {"device": "cuda", "machine": "NVIDIA none"}
    del gpu["speed"]["fresh"]
    gpu_file.write_text(json.dumps(gpu))
    write_report([error_file, speed_file], readme)
    write_report([gpu_file], readme)
    text = readme.read_text()
    assert "\nnothing\n" not in text and "| uniform8 | " in text and "| `uniform2` | 2.00 | " in text
    assert "encode, CPU, recycled memory | " in text and "| encode, none | " in text
    for picture in ("speed.png", "error.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    kinds = {row["kind"]: row["error"] for row in found["rows"] if row["codec"] == "fp16"}
    assert len(kinds) == 7 and all(error < 0.01 for error in kinds.values())
    with pytest.raises(ValueError, match="no results"):
        (tmp_path / "empty").mkdir()
        write_report([], tmp_path / "empty" / "README.md")
    with pytest.raises(ValueError, match="has no place <!-- nosuch -->"):
        fill(readme, "nosuch", "")


def test_the_committed_readme_is_filled() -> None:
    text = README.read_text()
    for name in SECTIONS:
        inside = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]
        assert "|" in inside or "- met" in inside, name


def test_algorithm_1_is_sort_quantization() -> None:
    x = made("gaussian", (4, 8, 25))
    spec, codec = TensorSpec.of(x), compressor("sortquant8")
    expected = codec.decode(codec.encode(x), spec)
    assert torch.allclose(algorithm_1_back(algorithm_1(x), spec), expected, atol=0.02)


def test_the_tables_of_codecs() -> None:
    spec = TensorSpec(SHAPE, torch.float32)
    names = [subject.name for subject in subjects(CODECS, spec)]
    assert len(set(names)) == len(names) == len(CODECS) + 3
    assert set(STYLES) == set(FAMILIES) - {"fast"}
    assert {target.codec for targets in TARGETS.values() for target in targets} <= set(CODECS)


def test_made_data_is_the_same_for_a_seed() -> None:
    for kind in KINDS:
        assert torch.equal(made(kind, (3, 5)), made(kind, (3, 5)))
        assert not torch.equal(made(kind, (3, 5)), made(kind, (3, 5), seed=1))
    assert made("heavy", (100_000,)).abs().max() > 20 and (made("relu", (1000,)) == 0).any()
    with pytest.raises(ValueError, match="unknown kind"):
        made("nosuch", (1,))
