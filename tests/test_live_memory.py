"""What is kept for backwards: counted in a real step, it is what the simulation of its schedule says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsplit
from fxsplit.runtime.live_memory import Ledger
from tests.comparison import CHAIN2, CHAIN3, MOBILENET, SANDWICH
from tests.models import images, mobilenet

LABELS = torch.arange(12) % 10
TOLERANCE = 0.1


def test_a_ledger_counts_what_autograd_saves() -> None:
    """Each storage once, no parameter, no slice of somebody's batch; nothing is left when the graph is gone."""
    layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    batch = torch.randn(6, 8)
    ledger = Ledger([layers])
    with ledger.saving([batch[:3]]):
        output = layers(batch[:3])
    one = 3 * 8 * 4
    assert ledger.live_bytes == 2 * one, "both results of tanh, the first of which the second layer saves, too"
    held = ledger.hold([output])
    assert ledger.live_bytes == 2 * one
    output.sum().backward()
    assert ledger.live_bytes == one
    del held
    assert (ledger.live_bytes, ledger.peak_bytes) == (0, 2 * one)


@pytest.mark.parametrize(
    ("schedule", "devices"),
    [
        ("gpipe", CHAIN3),
        ("1f1b", CHAIN3),
        ("interleaved", SANDWICH),
        ("zero-bubble", CHAIN3),
        ("auto", SANDWICH),
    ],
)
@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_the_peak_is_the_simulated_one(schedule: str, devices: list[str], checkpoint: str) -> None:
    options: dict[str, Any] = {"cuts": MOBILENET[3], "chunks": 6, "schedule": schedule, "checkpoint": checkpoint}
    x = images(12)
    with fxsplit.compile(mobilenet(), devices, **options, transport="in_process", verify=False) as pipe:
        pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
        found = pipe.live_memory(lambda: pipe.step(x, target=LABELS, loss_fn=F.cross_entropy))
        assert found.counted == found.simulated
        for worker, counted in found.counted_bytes.items():
            assert counted == pytest.approx(found.simulated_bytes[worker], rel=TOLERANCE), found
        if schedule == "1f1b":
            assert all(live <= len(devices) - stage for stage, live in enumerate(found.counted))


def test_it_is_counted_by_worker_processes_and_changes_no_number() -> None:
    x = images(12)
    losses = []
    for counts in (False, True):
        with fxsplit.compile(
            mobilenet(), CHAIN2, cuts=MOBILENET[2], chunks=3, schedule="1f1b", verify=False
        ) as pipe:
            step = partial(pipe.step, x, target=LABELS, loss_fn=F.cross_entropy)
            step()
            if counts:
                found = pipe.live_memory(step)
                assert found.counted == (2, 1)
                for worker, counted in found.counted_bytes.items():
                    assert counted == pytest.approx(found.simulated_bytes[worker], rel=TOLERANCE), found
            else:
                step()
                step()
            losses.append([*pipe.gradients().values()])
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))
