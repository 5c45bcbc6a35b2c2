"""What checksums, transactions and snapshots cost: one training that does with and without them in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
import torchvision
from torch.nn import functional as F

import fxsplit
from fxsplit.runtime import packet, rpc, transaction
from fxsplit.runtime.durable import DurableEngine

from .training import CUTS, DEVICES, batch, settings

PIXELS = 96
SAMPLES = 16
TURN = 2
"""Steps of a turn: without, with, without, with, and so on; in one of ten is a snapshot."""

EVERY = 50
"""Steps from one snapshot to the next, for which the cost of one is stated."""

PARTS = ("checksums", "transactions", "snapshots")

_checksum_of, _before = packet.checksum_of, transaction.Before.of


def protect(parts: tuple[str, ...]) -> None:
    """Gives packets of this process checksums, or makes its steps such that they can be taken back, or neither."""
    made = _checksum_of if "checksums" in parts else lambda key, packet: 0
    packet.checksum_of = rpc.checksum_of = made  # type: ignore[attr-defined]
    nothing = classmethod(lambda cls, optimizer, *rest: cls(optimizer, [], {}, []))
    transaction.Before.of = _before if "transactions" in parts else nothing  # type: ignore[method-assign, assignment]


class Alternating(torch.optim.SGD):
    """Counts the steps of its process, and turns protection on and off: all processes do so between two steps."""

    def __init__(self, params: Any, parts: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["parts"] = parts
        self._steps = 0

    def step(self, closure: Any = None) -> Any:
        """A step, and then perhaps a turn."""
        loss = super().step(closure)
        self._steps += 1
        protect(self.param_groups[0]["parts"] if is_protected(self._steps) else ())
        return loss


def is_protected(step: int) -> bool:
    """Whether a step is done with what is measured."""
    return step // TURN % 2 == 1


def overhead(steps: int, parts: tuple[str, ...]) -> dict[str, Any]:
    """Trains, in turns with and without protection; a turn is compared with those around it.

    Args:
        steps: how many.
        parts: what is measured, of `PARTS`.
    """
    settings()
    model = torchvision.models.mobilenet_v2(num_classes=10)
    turns_s: list[float] = []
    taken: list[int] = []
    with tempfile.TemporaryDirectory() as directory:
        snapshots = fxsplit.Snapshots(directory, every=10 * TURN)
        options: dict[str, Any] = {"example_inputs": batch(0, PIXELS, SAMPLES)[0], "verify": False, "chunks": 2}
        with fxsplit.compile(model, DEVICES, cuts=CUTS, snapshots=snapshots, **options) as pipe:
            engine = pipe._engine
            assert isinstance(engine, DurableEngine)
            optimizer = pipe.optimizer(Alternating, lr=0.01, momentum=0.9, parts=parts)
            data = [batch(number, PIXELS, SAMPLES) for number in range(8)]
            for step in range(steps // TURN * TURN):
                if step % TURN == 0:
                    start_s = time.perf_counter()
                x, y = data[step % len(data)]
                engine._is_inside = not (is_protected(step) and "snapshots" in parts)  # no journal, no snapshot
                pipe.step(x, target=y, loss_fn=F.cross_entropy)
                optimizer.step()
                optimizer.zero_grad()
                if (step + 1) % TURN == 0:
                    turns_s.append(time.perf_counter() - start_s)
                    taken.append(engine._taken_step)
            engine._is_inside = True
    return {"parts": list(parts), "steps": steps, **_costs(turns_s, taken)}


def _costs(turns_s: list[float], taken: list[int]) -> dict[str, Any]:
    """What a step and a snapshot cost.

    Args:
        turns_s: seconds of each turn.
        taken: the step of the last snapshot after each.
    """
    steps_s: list[float] = []
    snapshots_s: list[float] = []
    for turn in range(5, len(turns_s) - 1, 2):  # the first ones warm up
        before, after = turns_s[turn - 1], turns_s[turn + 1]
        more_s = turns_s[turn] - (before + after) / 2
        if taken[turn] == taken[turn - 1]:
            steps_s.append(more_s / TURN)
        else:
            snapshots_s.append(more_s)
    step_s = statistics.median(turns_s[4::2]) / TURN
    cost_s = statistics.median(steps_s)
    snapshot_s = statistics.median(snapshots_s) - TURN * cost_s if snapshots_s else 0.0
    return {
        "step_s": round(step_s, 4),
        "each_step_percent": round(100.0 * cost_s / step_s, 2),
        "quartiles_percent": [round(100.0 * q / step_s, 2) for q in statistics.quantiles(steps_s)[::2]],
        "snapshot_s": round(snapshot_s, 4),
        "snapshots": len(snapshots_s),
        "overhead_percent": round(100.0 * (cost_s + snapshot_s / EVERY) / step_s, 2),
    }
