"""Training goes on when workers are lost, or the client: bit for bit as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import SnapshotError, WorkerError, WorkerLost
from fxsplit.runtime.host_random import host_seed, host_states, set_host_states
from tests.faults.scripts import CHAIN, CUTS, ROOT, assert_same, batch, said_by, small_model, start, train
from tests.processes import worker_processes

OPTIONS: dict[str, Any] = {"cuts": CUTS, "chunks": 2, "verify": False}
STEPS = 12


def undisturbed(**options: Any) -> dict[str, torch.Tensor]:
    with fxsplit.compile(small_model(), CHAIN, transport="in_process", **{**OPTIONS, **options}) as pipe:
        torch.manual_seed(1)
        return train(pipe, STEPS)


@pytest.mark.parametrize(
    "compressor", [None, pytest.param("poweriter(rank=4, feedback=true)", marks=pytest.mark.faults)]
)
def test_killed_workers_change_nothing(compressor: str | None, tmp_path: Path) -> None:
    """One is killed between steps, one within a step, one twice; one hangs. Codecs with a memory go on, too."""
    expected = undisturbed(compressor=compressor)
    snapshots = fxsplit.Snapshots(tmp_path / "snapshots", every=3)
    with fxsplit.compile(
        small_model(), CHAIN, snapshots=snapshots, timeout_s=3.0, compressor=compressor, **OPTIONS
    ) as pipe:

        def fault(step: int) -> None:
            pids = {worker.name: worker.pid for worker in pipe.workers}
            if step in (2, 8):
                os.kill(pids["one"], signal.SIGKILL)
            if step == 5 and compressor is not None:
                os.kill(pids["two"], signal.SIGSTOP)

        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="all workers are started again, from step"):
            found = train(pipe, STEPS, fault)
        assert pipe.committed_steps == STEPS
    assert_same(found, expected)
    assert worker_processes() == []


def test_without_snapshots_it_says_so(tmp_path: Path) -> None:
    with fxsplit.compile(small_model(), CHAIN, **OPTIONS) as pipe, pytest.raises(WorkerLost, match="snapshots="):
        train(pipe, 3, lambda step: os.kill(pipe.workers[1].pid, signal.SIGKILL) if step == 1 else None)


SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
import fxsplit, torch
from tests.faults.scripts import *

directory, moment_s, out = sys.argv[1], float(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
snapshots = fxsplit.Snapshots(directory, every=2)
with fxsplit.compile(small_model(), CHAIN, cuts=CUTS, chunks=2, verify=False, snapshots=snapshots) as pipe:
    torch.manual_seed(1)
    def at(step):
        if step == int(moment_s):
            await_true(lambda: any(Path(directory).glob("*/manifest.json")), 30.0, "no snapshot is written")
            threading.Timer(moment_s % 1 / 20, os.kill, (os.getpid(), signal.SIGKILL)).start()
    print("from", pipe.committed_steps, flush=True)
    torch.save(train(pipe, 12, at), out)
"""


@pytest.mark.parametrize("moment", ["4.1", pytest.param("7.5", marks=pytest.mark.faults)])
def test_a_killed_client_goes_on_where_it_was(moment: str, tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "state.pt"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}")
    first = start(script, str(tmp_path / "snapshots"), moment, str(out))
    assert "from 0" in said_by(first, 60.0)[0] and first.returncode == -signal.SIGKILL
    second = start(script, str(tmp_path / "snapshots"), "-1", str(out))
    said, errors = said_by(second, 60.0)
    assert second.returncode == 0, errors
    assert int(said.split()[1]) >= 2, "it begins with a snapshot"
    assert_same(torch.load(out), undisturbed())


def test_a_step_is_made_by_all_or_by_none(tmp_path: Path) -> None:
    """The optimizer of one worker fails in its second step, after the others have prepared theirs."""

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            steps = self.state.setdefault("steps", {"count": 0})  # type: ignore[call-overload]
            steps["count"] += 1
            if steps["count"] == 2 and len(self.param_groups[0]["params"]) == 6:
                raise RuntimeError("out of luck")
            return result

    with fxsplit.compile(small_model(0.0), CHAIN, **{**OPTIONS, "transport": "in_process"}) as pipe:
        x, y = batch(0)
        optimizer = pipe.optimizer(Failing, lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            pipe.step(x, target=y, loss_fn=torch.nn.functional.cross_entropy)
            before, committed = pipe.state_dict(), pipe.committed_steps
            if committed == 0:
                optimizer.step()
        with pytest.raises(fxsplit.FxsplitError, match="out of luck"):
            optimizer.step()
        assert pipe.committed_steps == 1
        for key, value in pipe.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_two_pipelines_do_not_share_a_directory(tmp_path: Path) -> None:
    options = {**OPTIONS, "transport": "in_process", "snapshots": fxsplit.Snapshots(tmp_path)}
    taken = pytest.raises(SnapshotError, match="another pipeline has this directory")
    with fxsplit.compile(small_model(), CHAIN, **options), taken:
        fxsplit.compile(small_model(), CHAIN, **options)
    fxsplit.compile(small_model(), CHAIN, **options).close()


@pytest.mark.faults
def test_time_to_recover(tmp_path: Path) -> None:
    snapshots = fxsplit.Snapshots(tmp_path, every=50)
    with fxsplit.compile(small_model(), CHAIN, snapshots=snapshots, **OPTIONS) as pipe:
        died_s: list[float] = []

        def fault(step: int) -> None:
            if step == 5:
                os.kill(pipe.workers[1].pid, signal.SIGKILL)
                died_s.append(time.monotonic())
            if step == 6:
                died_s.append(time.monotonic())

        with pytest.warns(UserWarning, match="5 steps are done again"):
            train(pipe, 8, fault)
        assert died_s[1] - died_s[0] < 15.0
        print(f"{died_s[1] - died_s[0]:.2f} s from death to the next committed step")


class Noise(nn.Module):
    """Draws from the generators of Python and numpy, wherever it is."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError("no number")
        return x * drawn() + drawn()


def drawn() -> float:
    return random.random() + random.gauss() + float(np.random.rand()) + float(np.random.standard_normal())


def noisy_training(on_step: Callable[[fxsplit.Pipeline, int], None], **options: Any) -> list[float]:
    """The losses of eight steps; the client draws, too."""
    torch.manual_seed(0)
    random.seed(1)
    np.random.seed(2)
    model = nn.Sequential(nn.Linear(4, 4), Noise(), nn.Linear(4, 4), Noise())
    losses: list[float] = []
    compiled = fxsplit.compile(model, ["cpu", "one/cpu"], cuts=["2"], chunks=2, verify=False, **options)
    with contextlib.suppress(KeyboardInterrupt), compiled as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.001)
        for number in pipe.remaining(range(8)):
            on_step(pipe, number)
            x = torch.full((2, 4), drawn())
            losses.append(float(pipe.step(x, target=x, loss_fn=F.mse_loss).loss))
            optimizer.step()
            optimizer.zero_grad()
    return losses


def test_random_numbers_of_python_and_numpy_go_on(tmp_path: Path) -> None:
    """A step fails and is undone, a worker is killed, the client ends and runs again: every draw is as without."""
    expected = noisy_training(lambda pipe, number: None)

    def faults(pipe: fxsplit.Pipeline, number: int) -> None:
        if number == 1:
            x = torch.zeros(2, 4)
            x[1] = float("nan")  # the second micro-batch: the first has drawn
            with pytest.raises(WorkerError, match="no number"):
                pipe.step(x, target=x, loss_fn=F.mse_loss)
        if number == 4:
            os.kill(pipe.workers[1].pid, signal.SIGKILL)
        if number == 6:
            raise KeyboardInterrupt

    snapshots = fxsplit.Snapshots(tmp_path, every=3)
    with pytest.warns(UserWarning, match="all workers are started again"):
        first = noisy_training(faults, snapshots=snapshots)
    assert first == expected[:6]
    rest = noisy_training(lambda pipe, number: None, snapshots=snapshots)
    assert 2 <= len(rest) < 8 and rest == expected[-len(rest) :]


def test_states_of_random_numbers_are_taken_up() -> None:
    for odd in (False, True):  # with and without a normal number that is kept for the next draw
        random.gauss(), np.random.standard_normal() if odd else None
        before = host_states()
        numbers = [drawn() for _ in range(700)]
        set_host_states([state.clone() for state in before])
        assert [drawn() for _ in range(700)] == numbers
        seeds = {host_seed(), host_seed(), (random.random(), host_seed())[1]}
        assert len(seeds) == 2, "it changes nothing, and depends on the state"


class Fragile(nn.Module):
    """Kills its process at one kind of moment, once: if there is a file, which it removes.

    Args:
        moment: "forward", "backward" or "snapshot".
        trigger: the file.
    """

    def __init__(self, moment: str, trigger: Path) -> None:
        super().__init__()
        self.moment, self.trigger = moment, str(trigger)

    def forward(self, x: Tensor) -> Tensor:
        die_at(self.trigger, self.moment == "forward")
        y = x * 1.0
        if y.requires_grad and self.moment == "backward":
            trigger = self.trigger
            y.register_hook(lambda gradient: die_at(trigger, True))
        return y

    def _save_to_state_dict(self, *arguments: Any) -> None:
        die_at(self.trigger, self.moment == "snapshot")
        super()._save_to_state_dict(*arguments)


class FragileSGD(torch.optim.SGD):
    """The same, when a step is prepared: its process has changed its weights, and others may have, too."""

    def __init__(self, parameters: Any, trigger: str = "", **options: Any) -> None:
        super().__init__(parameters, **options)
        for group in self.param_groups:
            group.setdefault("trigger", trigger)

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        group = self.param_groups[0]
        die_at(group["trigger"], len(group["params"]) == 4)  # the worker's part
        return result


def die_at(trigger: str, is_here: bool) -> None:
    if is_here and os.path.exists(trigger):
        os.remove(trigger)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "moment",
    [
        "optimizer",
        pytest.param("forward", marks=pytest.mark.faults),
        pytest.param("backward", marks=pytest.mark.faults),
        pytest.param("snapshot", marks=pytest.mark.faults),
    ],
)
def test_a_worker_killed_at(moment: str, tmp_path: Path) -> None:
    """Exactly there: the step that was prepared by some is made by all, and the end is as without the death."""
    trigger = tmp_path / "trigger"

    def run(transport: str, faults: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        fragile = Fragile(moment, trigger)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), fragile, nn.Dropout(0.2), nn.Linear(4, 4))
        options: dict[str, Any] = {"cuts": ["1"], "chunks": 2, "verify": False, "example_inputs": torch.ones(4, 4)}
        options |= {"snapshots": fxsplit.Snapshots(tmp_path / "s", every=2)} if faults else {}
        with fxsplit.compile(model, ["cpu", "one/cpu"], transport=transport, **options) as pipe:
            at_step = str(trigger) if moment == "optimizer" else ""
            optimizer = pipe.optimizer(FragileSGD, lr=0.1, momentum=0.9, trigger=at_step)
            for number in range(7):
                if faults and number == 3:
                    trigger.touch()
                x = torch.randn(4, 4, generator=torch.Generator().manual_seed(number))
                pipe.step(x, target=x, loss_fn=F.mse_loss)
                optimizer.step()
                optimizer.zero_grad()
            assert pipe.committed_steps == 7
            return dict(pipe.state_dict())

    expected = run("in_process", faults=False)
    with pytest.warns(UserWarning, match="all workers are started again"):
        found = run("rpc", faults=True)
    assert not trigger.exists(), "it died"
    assert_same(found, expected)
