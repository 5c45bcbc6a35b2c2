"""What the tests of faults share: a small model to train, and scripts in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def said_by(process: subprocess.Popen[str], timeout_s: float) -> tuple[str, str]:
    """What a process says until it ends, on its two outputs; one that does not end in time is killed."""
    try:
        return process.communicate(timeout=timeout_s)
    finally:
        process.kill()


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


def train(
    pipe: Any,
    steps: int,
    on_step: Callable[[int], None] = lambda step: None,
    at_end: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Trains by whole steps and by calls in turn; gives the final state, and the losses under 'loss'."""
    optimizer = pipe.optimizer(torch.optim.AdamW, lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    pipe.keep(scheduler=scheduler)
    losses = []
    for number in pipe.remaining(range(steps)):
        x, y = batch(number)
        on_step(number)
        if number % 3 == 2:
            loss = F.cross_entropy(pipe(x), y)
            loss.backward()
        else:
            loss = pipe.step(x, target=y, loss_fn=F.cross_entropy).loss
        losses.append(loss.detach())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    at_end()
    state: dict[str, Tensor] = {**pipe.state_dict(), "loss": torch.stack(losses) if losses else torch.zeros(0)}
    for number, entry in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    state["random"] = torch.rand(3)
    return state


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit; of the losses, those that were seen."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        wanted = value[len(value) - len(found[key]) :] if key == "loss" else value
        assert torch.equal(found[key], wanted), key
