"""The examples, run as a user runs them: as scripts, with real worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--epochs=1", "--samples=200", "--image-size=32", "--batch-size=32", "--chunks=2")


def run_digits(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The demo with few samples; only its mechanics are of interest."""
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), *QUICK, *options]
    return subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_digits_compares_two_runs(tmp_path: Path) -> None:
    done = run_digits(tmp_path, "--min-accuracy=0", "--max-difference=100", "--out=curves/digits.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    table = {row[1].strip(): row[2:4] for row in (line.split("│") for line in done.stdout.splitlines()) if row[3:]}
    assert {"test accuracy", "client to server", "server to client", "compute time", "total time"} <= set(table)
    plain, compressed = (float(cell) for cell in table["ratio to uncompressed"])
    assert plain == 1.0
    assert 0.25 <= compressed <= 0.26
    assert (tmp_path / "curves" / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_digits_says_what_it_missed(tmp_path: Path) -> None:
    done = run_digits(tmp_path, "--compressor=uniform16", "--min-accuracy=0", "--max-difference=100")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "missed: uniform16 moves 0.50" in done.stdout
    assert (tmp_path / "out" / "digits.png").exists()
