"""`fxsplit bench`: a table, a picture and a trace of real steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxsplit.cli import app

MODEL = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
example_inputs = torch.rand(8, 16)
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def test_it_runs_measures_and_draws(model_file: Path, tmp_path: Path) -> None:
    picture, trace = tmp_path / "step.png", tmp_path / "trace.json"
    arguments = [
        "bench",
        str(model_file),
        "--cuts",
        "2",
        "--steps",
        "3",
        "--chunks",
        "2",
        "--compressor",
        "uniform8",
    ]
    arguments += ["--plot", str(picture), "--trace", str(trace)]
    environment = {"COLUMNS": "200", "FXSPLIT_CACHE": str(tmp_path / "nothing measured")}
    result = CliRunner().invoke(app, arguments, env=environment)
    assert result.exit_code == 0, result.output
    assert "predictions rest on estimates of cpu, server/cpu: `fxsplit calibrate" in result.output
    assert "3 calls, 24 samples" in result.output and "3 steps each: median" in result.output
    assert "the plan: 2" in result.output and "measured / predicted" in result.output
    assert "cut 2 " in result.output or "micro-batches" in result.output or "no compression" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {event["ph"] for event in json.loads(trace.read_text())["traceEvents"]} == {"M", "X"}


def test_it_says_what_is_wrong(model_file: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(model_file), "--cuts", "2", "--schedule", "zigzag"])
    assert result.exit_code == 1 and "zigzag" in result.output and "gpipe" in result.output
    result = CliRunner().invoke(app, ["worker", "--join", "nowhere", "--name", "a"], env={"FXSPLIT_TOKEN": "t"})
    assert result.exit_code == 1 and "not an address" in result.output
    result = CliRunner().invoke(app, ["worker", "--join", "h:1", "--name", "a"], env={"FXSPLIT_TOKEN": ""})
    assert result.exit_code == 1 and "FXSPLIT_TOKEN" in result.output
