"""Hours of training with a random fault every few seconds: no step lost, nothing grows."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
import warnings
from collections import Counter
from typing import Any

import torch

import fxsplit

from .faults import SOAK, descriptors, memory_bytes
from .training import compiled, train, undisturbed

TIMEOUT_S = 5.0


def soak(minutes: float, every_s: float) -> dict[str, Any]:
    """Trains for so long, with a fault every so many seconds; compares with an undisturbed run afterwards.

    Args:
        minutes: how long.
        every_s: seconds between two faults.
    """
    losses: dict[int, float] = {}
    faults: Counter[str] = Counter()
    samples: list[tuple[float, int, int]] = []
    end_s = time.monotonic() + 60.0 * minutes
    over = threading.Event()
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with compiled(fxsplit.Snapshots(directory, every=20), timeout_s=TIMEOUT_S) as pipe:
            torch.manual_seed(1)

            def disturb() -> None:
                numbers = random.Random(0)
                while not over.wait(every_s):
                    fault, worker = numbers.choice(SOAK), numbers.choice(["one", "two"])
                    fault(pipe, worker)
                    faults[fault.__name__] += 1
                    samples.append((time.monotonic(), memory_bytes(os.getpid()), descriptors(os.getpid())))

            threading.Thread(target=disturb, daemon=True).start()

            def log(number: int, loss: float, at: float) -> None:
                assert number not in losses, "a step was made twice"
                losses[number] = loss

            found = train(pipe, 10**9, log, lambda: time.monotonic() > end_s)
            over.set()
            recoveries = pipe._engine.recoveries  # type: ignore[attr-defined]
    steps = len(losses)
    expected, undisturbed_losses = undisturbed(steps)
    half = len(samples) // 2
    return {
        "minutes": minutes,
        "faults": dict(faults),
        "recoveries": recoveries,
        "steps": steps,
        "accounted_for": sorted(losses) == list(range(steps)),
        "same_losses": [losses[n] for n in range(steps)] == undisturbed_losses,
        "identical": found == expected,
        "memory_mib": [
            round(max(m for _, m, _ in part) / 2**20) for part in (samples[:half], samples[half:]) if part
        ],
        "descriptors": [max(d for _, _, d in part) for part in (samples[:half], samples[half:]) if part],
    }
