"""Budgets and plans that cannot be: what the command line says, and that nothing is started."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxsplit.cli import app
from tests.processes import worker_processes

MODEL = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(16, {width}), nn.ReLU(), nn.Linear({width}, 16), nn.ReLU(), nn.Linear(16, 4))
example_inputs = torch.rand(8, 16)
"""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No worker process before or after."""
    assert worker_processes() == []
    yield
    assert worker_processes() == []


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text(MODEL.format(width=16))
    return str(path)


def refused(*arguments: str) -> str:
    """What is said; never a traceback, nothing on standard output."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    return result.stderr


def test_a_budget_that_nothing_satisfies_names_the_line_the_miss_and_the_nearest_plan(model_file: str) -> None:
    said = refused("analyze", model_file, "--devices", "cpu,cuda", "--budget", "link_bytes=10")
    assert "no plan satisfies the budget: link_bytes from client to cuda is missed by" in said
    assert "found:" in said and "allowed: 10 B" in said and "nearest plan on cpu, cuda, cuts:" in said
    said = refused("analyze", model_file, "--devices", "cpu", "--budget", "step_time=1ns")
    assert "step_time is missed by" in said and "nearest plan on cpu" in said
    said = refused("analyze", model_file, "--devices", "cpu,cuda", "--budget", "memory.cpu=10B")
    assert "memory of cpu is missed by" in said


def test_the_memory_of_the_optimizer_binds(model_file: str) -> None:
    given = ("analyze", model_file, "--devices", "cpu", "--json", "--budget")
    result = CliRunner().invoke(app, [*given, "memory=1MB", "--optimizer", "adam"])
    states = json.loads(result.stdout)["parts"][0]["memory_bytes"]
    assert "memory of cpu is missed by" in refused(*given, f"memory={states - 1}", "--optimizer", "adam")
    assert CliRunner().invoke(app, [*given, f"memory={states - 1}", "--optimizer", "sgd"]).exit_code == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--budget", "memory=2Gb"), "unknown unit"),
        (("--budget", "memory=-2GB"), "negative"),
        (("--bandwidth", "50"), None),
        (("--bandwidth", "50 parsec"), "bandwidth has an unknown unit"),
        (("--bandwidth", "-1MB/s"), "bandwidth is negative"),
        (("--bandwidth", "0"), "more than zero"),
        (("--bandwidth", "tpu=1MB/s"), "bandwidth names an unknown device"),
        (("--bandwidth", "cpu->tpu=1MB/s"), "bandwidth names an unknown device"),
        (("--bandwidth", "cuda=1MB/s", "--bandwidth", "cuda=2MB/s"), "not a quantity of a link"),
        (("--latency", "-3ms"), "latency is negative"),
        (("--latency", "cuda=fast"), "latency of cuda does not begin with a number"),
        (("--budget", "memory.tpu=1GB"), "memory names an unknown device"),
        (("--budget", "link_bytes.nowhere=1GB"), "link_bytes names an unknown cut"),
        (("--budget", "link_bytes.cpu->tpu=1GB"), "link_bytes names an unknown device"),
        (("--budget", "link_bytes.cpu->cuda=10B"), "link_bytes from client to cuda is missed by"),
        (("--price", "tpu=1", "--objective", "price"), "price names an unknown device"),
        (("--price", "cuda=-1", "--objective", "price"), "a price is not a number"),
        (("--price", "cuda=cheap"), "not a price"),
        (("--objective", "speed"), "unknown objective"),
        (("--optimizer", "adamax"), "unknown optimizer"),
        (("--placement", "best"), "unknown placement"),
        (("--schedule", "zigzag"), "unknown schedule"),
        (("--profile", "cuda=missing.json"), "the calibration cannot be read"),
        (("--links", "missing.json"), "the links cannot be read"),
    ],
)
def test_bad_options(model_file: str, options: tuple[str, ...], says: str | None) -> None:
    if says is None:
        assert CliRunner().invoke(app, ["analyze", model_file, *options]).exit_code == 0
    else:
        assert says in refused("analyze", model_file, *options)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda data: data.update(version=99), "newer version"),
    "older": (lambda data: data.update(version=1), "older version"),
    "a field is missing": (lambda data: data.pop("edges"), "no key 'edges'"),
    "a negative number": (lambda data: data["parts"][0].update(macs=-1), "macs"),
    "another model": (lambda data: data.update(fingerprint="0" * 16), "another model"),
    "stages that are not there": (lambda data: data["devices"].append("b/cpu"), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_plan_that_does_not_fit_is_refused_and_nothing_started(
    model_file: str, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "plan.json"
    given = ["analyze", model_file, "--devices", "cpu,server/cpu", "--save", str(path)]
    assert CliRunner().invoke(app, given).exit_code == 0
    data = json.loads(path.read_text())
    change, says = DAMAGES[damage]
    change(data)
    path.write_text(json.dumps(data))
    assert says in refused("bench", model_file, "--plan", str(path))


def test_a_plan_of_another_file_or_none_is_refused(model_file: str, tmp_path: Path) -> None:
    path, other = tmp_path / "plan.json", tmp_path / "other.py"
    other.write_text(MODEL.format(width=32))
    assert CliRunner().invoke(app, ["analyze", str(other), "--save", str(path)]).exit_code == 0
    assert "made for another model" in refused("bench", model_file, "--plan", str(path))
    path.write_text(path.read_text()[:100])
    assert "the plan is damaged" in refused("bench", model_file, "--plan", str(path))
    assert "the plan cannot be read" in refused("bench", model_file, "--plan", str(tmp_path / "none.json"))


def test_a_saved_plan_is_run(model_file: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    given = ["analyze", model_file, "--devices", "cpu,server/cpu", "--chunks", "2", "--save", str(path)]
    assert CliRunner().invoke(app, given).exit_code == 0
    run = ["bench", model_file, "--plan", str(path), "--steps", "2", "--neighbours", "0"]
    result = CliRunner().invoke(app, run, env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "the plan: " in result.output and "step predicted" in result.output
