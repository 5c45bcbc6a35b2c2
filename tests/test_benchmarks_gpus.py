"""The benchmarks on GPUs, as far as they can be tried without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpus.__main__ import table
from benchmarks.gpus.balance import fastest_cuts, partition
from benchmarks.gpus.contenders import CONTENDERS, Contender
from benchmarks.gpus.plot import draw
from benchmarks.gpus.tasks import TASKS

ROOT = Path(__file__).parent.parent


def test_cuts_are_where_the_stages_take_equally_long() -> None:
    assert partition([4.0, 1.0, 1.0, 2.0], 2) == [1]
    assert partition([1.0] * 12, 4) == [3, 6, 9]
    assert partition([5.0, 1.0, 1.0], 3) == [1, 2]
    assert fastest_cuts(["a", "b", "c"], [], 4, 2, "gpipe") == ["a", "b", "c"]


def test_cuts_are_moved_as_long_as_the_simulated_step_gets_shorter() -> None:
    """12 equal blocks, 4 stages, 4 micro-batches: a short first and last stage fill and drain sooner."""
    blocks = [str(i) for i in range(1, 12)]
    assert fastest_cuts(blocks, [], 4, 4, "gpipe") == ["2", "6", "10"]
    assert fastest_cuts(blocks, [], 4, 2, "gpipe") == ["3", "6", "9"]


def test_contenders_are_spelled_and_fit_their_tasks() -> None:
    for task, contenders in CONTENDERS.items():
        assert task in TASKS
        assert len({contender.name for contender in contenders}) == len(contenders)
        assert all(Contender.parse(contender.spell()) == contender for contender in contenders)


def test_a_contender_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    only = "kind=single;kind=fxsplit,stages=2,chunks=2;kind=fxsplit,stages=2,chunks=99"
    only += ";kind=fxsplit,stages=1,chunks=2,replicas=2"
    sizes = ["--rounds", "2", "--steps", "1", "--warm-up", "2"]
    command = [sys.executable, "-m", "benchmarks.gpus", "run", "--cpu", "--tasks", "tiny", "--only", only, *sizes]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())["tasks"]["tiny"]
    assert [len(row["seconds"]) for row in rows] == [2, 2, 0, 2]
    assert rows[2]["reason"] and "Traceback" in done.stderr
    assert f"fails: {rows[2]['reason']}" in table("tiny", rows)
    draw({"tiny": rows}, {}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000
