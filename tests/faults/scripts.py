"""What the tests of faults share: a small model to train, and scripts in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent
CHAIN = ["cpu", "one/cpu", "two/cpu"]
CUTS = ["3", "6"]


def small_model(dropout: float = 0.1) -> nn.Module:
    """Linear layers, batch norm and dropout: weights, buffers and random numbers in each of three stages."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def batch(number: int, samples: int = 8) -> tuple[Tensor, Tensor]:
    """The inputs and labels of a step."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(samples, 16, generator=generator), torch.randint(4, (samples,), generator=generator)


def start(script: Path, *arguments: str) -> subprocess.Popen[str]:
    """Runs a script with this checkout's package."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def await_true(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds until a condition holds."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, what
        time.sleep(0.02)
    return time.monotonic() - start_s


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
