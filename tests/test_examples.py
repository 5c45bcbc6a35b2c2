"""The examples: run as a user runs them, as scripts with real worker processes; and what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from fxsplit.runtime.metrics import Metrics
from fxsplit.runtime.report import LinkTraffic
from tests.scripts import EXAMPLES, load_example

DIGITS = EXAMPLES / "digits.py"
QUICK = ("--epochs=1", "--samples=100", "--image-size=32", "--batch-size=32", "--chunks=2")


def test_digits_compares_two_runs(tmp_path: Path) -> None:
    # A single epoch teaches nothing, so the limits of accuracy are lifted; that of the bytes is kept.
    done = subprocess.run(
        [sys.executable, str(DIGITS), *QUICK, "--min-accuracy=0", "--max-difference=100"],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    table = {row[1].strip(): row[2:4] for row in (line.split("│") for line in done.stdout.splitlines()) if row[3:]}
    assert {"test accuracy", "client to server", "server to client", "compute time", "total time"} <= set(table)
    plain, compressed = (float(cell) for cell in table["ratio to uncompressed"])
    assert plain == 1.0
    assert 0.25 <= compressed <= 0.26
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def digits() -> Any:
    """The script as a module."""
    return load_example("digits")


@pytest.mark.parametrize(
    ("plain", "compressed", "wire_bytes", "missed"),
    [
        (98.0, 97.5, 260, None),
        (94.9, 95.5, 250, "missed: none: test accuracy 94.9 %, less than 95 %"),
        (98.7, 97.6, 250, "missed: the accuracies are 1.1 points apart, more than 1"),
        (98.0, 98.0, 270, "missed: sortquant8 moves 0.270 of the bytes, more than 0.26"),
    ],
)
def test_digits_ends_with_status_1_if_it_misses_a_limit(
    digits: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plain: float,
    compressed: float,
    wire_bytes: int,
    missed: str | None,
) -> None:
    def train(compressor: str | None, *_: object) -> Any:
        name, accuracy, sent = (
            ("none", plain, 1000) if compressor is None else (compressor, compressed, wire_bytes)
        )
        metrics = Metrics(calls=1, samples=64, total_s=1.0)
        metrics.add_traffic(LinkTraffic("client", "server", False, 1000, sent, 1))
        return digits.Run(name, [1.0], [accuracy], metrics)

    monkeypatch.setattr(digits, "train", train)
    if missed is None:
        digits.main(samples=100, out=tmp_path / "digits.png")
    else:
        with pytest.raises(typer.Exit) as ending:
            digits.main(samples=100, out=tmp_path / "digits.png")
        assert ending.value.exit_code == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missed")]
    assert lines == ([missed] if missed else [])
    assert (tmp_path / "digits.png").exists()
