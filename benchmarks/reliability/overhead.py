"""What checksums, transactions and snapshots cost: the same training with and without them, in turns."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.runtime import rpc, transaction

from .training import CUTS, DEVICES, batch, settings

PIXELS = 96
SAMPLES = 16
STEPS = 110  # with two snapshots among them
WARM_UP = 10


class Unprotected(nn.Identity):
    """Where it is loaded, packets have no checksum and steps cannot be taken back."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """On a worker, as a part of a stage."""
        self.__dict__.update(state)
        unprotect()


def unprotect() -> None:
    """Does so in this process."""
    rpc.checksum_of = lambda key, packet: 0  # type: ignore[attr-defined]
    transaction.Before.of = classmethod(lambda cls, optimizer, g: cls(optimizer, [], {}, []))  # type: ignore[assignment,method-assign]


def run(is_protected: bool) -> list[float]:
    """Seconds of each step, in this process and two workers."""
    settings()
    model = torchvision.models.mobilenet_v2(num_classes=10)
    if not is_protected:
        unprotect()
        for block in (4, 8, 16):
            model.features[block] = nn.Sequential(model.features[block], Unprotected())
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        snapshots = fxsplit.Snapshots(directory, every=50) if is_protected else None
        example: Tensor = batch(0, PIXELS, SAMPLES)[0]
        with fxsplit.compile(
            model, DEVICES, cuts=CUTS, chunks=2, verify=False, example_inputs=example, snapshots=snapshots
        ) as pipe:
            optimizer = pipe.optimizer(torch.optim.SGD, lr=0.01, momentum=0.9)
            for number in range(STEPS):
                x, y = batch(number, PIXELS, SAMPLES)
                start_s = time.perf_counter()
                pipe.step(x, target=y, loss_fn=F.cross_entropy)
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - start_s)
    return seconds[WARM_UP:]


def overhead(rounds: int) -> dict[str, Any]:
    """Runs both in turns, each in a process of its own.

    Args:
        rounds: of both.
    """
    means: dict[bool, list[float]] = {False: [], True: []}
    medians: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for is_protected in (False, True):
            command = [sys.executable, "-m", "benchmarks.reliability.overhead", str(int(is_protected))]
            seconds = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            means[is_protected].append(statistics.fmean(seconds))
            medians[is_protected].append(statistics.median(seconds))
            print(f"{'with' if is_protected else 'without'}: mean {means[is_protected][-1]:.4f} s a step")
    plain, protected = (statistics.median(means[key]) for key in (False, True))
    return {
        "rounds": rounds,
        "without_s": round(plain, 4),
        "with_s": round(protected, 4),
        "overhead_percent": round(100.0 * (protected / plain - 1.0), 2),
        "without_median_s": round(statistics.median(medians[False]), 4),
        "with_median_s": round(statistics.median(medians[True]), 4),
    }


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1] == "1")))
