"""The training that is disturbed: MobileNetV2 in three stages, dropout and all, deterministic.

As a program, `python -m benchmarks.reliability.training DIRECTORY STEPS LOG STATE`, it goes on from the snapshots
in the directory, writes a line for each step into the log, and the digest of everything it ends with into STATE.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

import fxsplit

DEVICES = ("cpu", "one/cpu", "two/cpu")
CUTS = ("features.5", "features.14")
SAMPLES = 8


def settings() -> None:
    """What makes the numbers those of every other run."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def batch(number: int, pixels: int = 32, samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """The images and labels of a step."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(samples, 3, pixels, pixels, generator=generator)
    return images, torch.randint(10, (samples,), generator=generator)


def compiled(snapshots: fxsplit.Snapshots | None, transport: str = "rpc", **options: Any) -> fxsplit.Pipeline:
    """The pipeline."""
    settings()
    model = torchvision.models.mobilenet_v2(num_classes=10)
    arguments: dict[str, Any] = {"cuts": CUTS, "chunks": 2, "verify": False, "example_inputs": batch(0)[0]}
    return fxsplit.compile(model, DEVICES, snapshots=snapshots, transport=transport, **{**arguments, **options})


def train(
    pipe: fxsplit.Pipeline, steps: int, log: Callable[[int, float, float], None], until: Callable[[], bool]
) -> str:
    """Trains, by steps of the pipeline and by calls in turn.

    Args:
        pipe: the pipeline.
        steps: at most.
        log: told number, loss and the time of its commit (`time.monotonic`) of each step.
        until: ends it earlier when true.

    Returns:
        the digest of weights, buffers, optimizer and random numbers.
    """
    optimizer = pipe.optimizer(torch.optim.SGD, lr=0.01, momentum=0.9)
    for number in pipe.remaining(range(steps)):
        x, y = batch(number)
        if number % 4 == 3:
            loss = F.cross_entropy(pipe(x), y)
            loss.backward()
        else:
            loss = pipe.step(x, target=y, loss_fn=F.cross_entropy).loss
        optimizer.step()
        log(number, float(loss.detach()), time.monotonic())
        optimizer.zero_grad()
        if until():
            break
    return digest(pipe, optimizer)


def digest(pipe: fxsplit.Pipeline, optimizer: torch.optim.Optimizer) -> str:
    """Of everything that training has made."""
    found = hashlib.sha256()
    state: dict[str, Any] = dict(pipe.state_dict())
    for index, entry in optimizer.state_dict()["state"].items():
        state |= {f"{index}.{key}": value for key, value in entry.items()}
    state["random"] = torch.get_rng_state()
    for name, value in sorted(state.items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def undisturbed(steps: int) -> tuple[str, list[float]]:
    """Digest and losses of a run of its own, in one process."""
    losses: list[float] = []
    with compiled(None, transport="in_process") as pipe:
        torch.manual_seed(1)
        return train(pipe, steps, lambda number, loss, at: losses.append(loss), lambda: False), losses


def main() -> None:
    """One client, that may be killed."""
    directory, steps, log, state = sys.argv[1:5]
    with open(log, "a") as file, compiled(fxsplit.Snapshots(directory, every=5)) as pipe:
        torch.manual_seed(1) if pipe.committed_steps == 0 else None

        def write(number: int, loss: float, at: float) -> None:
            file.write(json.dumps([number, loss, at]) + "\n")
            file.flush()

        file.write(json.dumps(["from", pipe.committed_steps, time.monotonic()]) + "\n")
        file.flush()
        Path(state).write_text(train(pipe, int(steps), write, lambda: False))


if __name__ == "__main__":
    main()
