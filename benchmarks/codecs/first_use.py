"""Seconds that the first use of a compressor takes, with nothing compiled before and with what was kept on disk.

`python -m benchmarks.codecs.first_use SPELLING DEVICE` measures one in this process and prints seconds as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fxsplit.compressors import compressor
from fxsplit.spec import TensorSpec

from .data import made

FIRST_USED = ("uniform8", "sortquant8", "fastquant8")
"""Of these the first use is measured; each process takes seconds to load torch."""

SHAPE = (16, 32, 112, 112)


def measure_first_use(spellings: Sequence[str], device: torch.device) -> dict[str, dict[str, float]]:
    """For each, the seconds of the first encode and decode beyond a later one: "empty" and "cached"."""
    found: dict[str, dict[str, float]] = {}
    for spelling in spellings:
        with tempfile.TemporaryDirectory() as folder:
            found[spelling] = {state: _in_child(spelling, device, folder) for state in ("empty", "cached")}
    return found


def _in_child(spelling: str, device: torch.device, folder: str) -> float:
    command = [sys.executable, "-m", "benchmarks.codecs.first_use", spelling, str(device)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": f"{folder}/numba", "TRITON_CACHE_DIR": f"{folder}/triton"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=environment, timeout=300
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_here(spelling: str, device: torch.device) -> float:
    """Seconds of the first encode and decode of this process, less those of the third.

    Torch, its sort and its copies are in use before: loading them is not the compressor's.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
    codec, x = compressor(spelling), made("gaussian", SHAPE).to(device)
    spec = TensorSpec.of(x)
    x.view(-1)[:1000].sort().values.add(1).round().isfinite().all().item()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        codec.decode(codec.encode(x), spec)
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[0] - times[2]


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], torch.device(sys.argv[2]))))
