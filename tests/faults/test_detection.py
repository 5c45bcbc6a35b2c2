"""A worker that is dead, hung or fails: who it was, what it was at, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import WorkerError, WorkerLost
from fxsplit.runtime.place import Place, PlacePage, new_memory
from fxsplit.runtime.pulse import Heartbeats
from tests.faults.scripts import CHAIN, CUTS, ROOT, await_true, batch, is_alive, small_model, start
from tests.processes import SHARED_MEMORY, SOON_S, abandoned_shared_memory, worker_processes


def compiled(**options: Any) -> fxsplit.Pipeline:
    arguments: dict[str, Any] = {"cuts": CUTS, "chunks": 2, "example_inputs": batch(0)[0], "verify": False}
    return fxsplit.compile(small_model(), CHAIN, **arguments, **options)


def step(pipe: fxsplit.Pipeline, number: int = 0) -> Tensor:
    x, y = batch(number)
    return pipe.step(x, target=y, loss_fn=F.cross_entropy).loss


@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.faults)])
def test_a_lost_worker_is_named_and_the_others_go_idle(how: str) -> None:
    shared = set(SHARED_MEMORY.glob("*"))
    pipe = compiled(timeout_s=3.0)
    step(pipe)
    pids = {worker.name: worker.pid for worker in pipe.workers}
    os.kill(pids["two"], getattr(signal, how))
    start_s = time.monotonic()
    with pytest.raises(WorkerLost) as caught:
        step(pipe)
    assert time.monotonic() - start_s < SOON_S
    error = caught.value
    assert error.worker == "two" and str(pids["two"]) in error.cause
    assert ("SIGKILL" if how == "SIGKILL" else "not been heard of") in error.cause
    assert error.hint and "compile the model again" in error.hint and "snapshots=" in error.hint
    start_s = time.monotonic()
    pipe.close()
    assert time.monotonic() - start_s < SOON_S
    assert worker_processes() == [] and abandoned_shared_memory(shared) == []


class Bad(nn.Module):
    """Fails on the third micro-batch, or kills its process there."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x[0, 0] == 3.0):
            raise ValueError("the model's own")
        if bool(x[0, 0] == 4.0):
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def failing() -> fxsplit.Pipeline:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4), Bad())
    options: dict[str, Any] = {"cuts": ["2"], "chunks": 4, "example_inputs": torch.zeros(4, 4), "verify": False}
    return fxsplit.compile(model, ["cpu", "server/cpu"], **options)


def test_an_exception_says_where_with_shapes_and_the_remote_traceback() -> None:
    with failing() as pipe:
        identity = {"1.weight": torch.eye(4), "1.bias": torch.zeros(4)}
        pipe.load_state_dict(identity)
        x = torch.zeros(8, 4)
        x[4, 0] = 3.0
        with pytest.raises(WorkerError) as caught, torch.no_grad():
            pipe(x)
        text = str(caught.value)
        for part in ("server", "stage 1, micro-batch 2", "float32[2, 4]", "the model's own", "in forward"):
            assert part in text, text
        with torch.no_grad():
            assert torch.equal(pipe(torch.zeros(8, 4)), torch.zeros(8, 4)), "the pipeline goes on"


def test_the_place_of_a_death_is_known() -> None:
    with failing() as pipe:
        pipe.load_state_dict({"1.weight": torch.eye(4), "1.bias": torch.zeros(4)})
        x = torch.zeros(8, 4)
        x[4, 0] = 4.0
        with pytest.raises(WorkerLost, match="forward of stage 1, micro-batch 2") as caught, torch.no_grad():
            pipe(x)
        assert (caught.value.stage, caught.value.micro_batch) == (1, 2)


SCRIPT = """
import os, signal, sys, time
import fxsplit
from tests.faults.scripts import *
from torch.nn import functional as F

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
pipe = fxsplit.compile(small_model(), CHAIN, cuts=CUTS, example_inputs=batch(0)[0], verify=False)
pids = [w.pid for w in pipe.workers if w.name != "client"]
x, y = batch(0)
pipe.step(x, target=y, loss_fn=F.cross_entropy)
print(*pids, flush=True)
if sys.argv[1] == "an exception":
    raise ValueError("the user's own")
while True:
    pipe.step(x, target=y, loss_fn=F.cross_entropy)
"""


@pytest.mark.parametrize(
    "ending",
    [
        "SIGINT",
        pytest.param("SIGTERM", marks=pytest.mark.faults),
        pytest.param("SIGKILL", marks=pytest.mark.faults),
        "SIGKILL, a worker stopped",
        pytest.param("an exception", marks=pytest.mark.faults),
    ],
)
def test_nothing_is_left_of_a_client_that_is_ended(ending: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}")
    shared = set(SHARED_MEMORY.glob("*"))
    client = start(script, ending)
    assert client.stdout is not None
    pids = [int(pid) for pid in client.stdout.readline().split()]
    assert len(pids) == 2, client.communicate()[1]
    name, _, stopped = ending.partition(",")
    if stopped:
        os.kill(pids[1], signal.SIGSTOP)
    if name != "an exception":
        os.kill(client.pid, getattr(signal, name))
    await_true(
        lambda: not any(is_alive(pid) for pid in (client.pid, *pids)), SOON_S, "something outlives the client"
    )
    client.communicate()
    assert abandoned_shared_memory(shared) == []


def test_a_client_killed_while_it_starts_leaves_no_folder(tmp_path: Path) -> None:
    code = "import fxsplit; from tests.faults.scripts import *; fxsplit.compile(small_model(), CHAIN, cuts=CUTS)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    client = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    await_true(lambda: len(list(tmp_path.glob("fxsplit-*"))) == 1, 60.0, "the workers meet")
    time.sleep(0.3)  # the workers are being imported
    client.kill()
    client.wait()
    await_true(lambda: not list(tmp_path.glob("fxsplit-*")), SOON_S, "the folder stays")
    assert tempfile.gettempdir() != str(tmp_path)


def test_silence_is_measured_by_the_time_in_which_anybody_could_be_heard() -> None:
    beats = Heartbeats()
    beats.begin(("a", "b"))
    beats.heard("a", Place("forward", 1, 2))
    assert beats.silent(5.0) is None and beats.place("a") == ("forward", 1, 2)
    with beats._lock:
        beats._heard_s["b"] -= 100.0
    found = beats.silent(5.0)
    assert found is not None and found[0] == "b"
    now_s = time.monotonic()
    beats._tick(now_s, now_s - 60.0)  # the machine slept
    assert beats.silent(5.0) is None
    beats.close()
    junk: list[object] = [[], {}, "x", [1, 2, 3], ["a", "b", True], None]
    for message in junk:
        assert Place.of_message(message).stage is None


WRITER = """
import sys
from fxsplit.runtime.place import Place, PlacePage

page, number = PlacePage(int(sys.argv[1])), 0
while True:
    number += 1
    page.write(Place(f"work {number}", number, number))
"""


def test_the_place_of_a_process_that_is_killed_while_it_notes_one_is_whole() -> None:
    """Read at any moment, and after the death: never half of one place and half of another, and none older."""
    memory = new_memory()
    page = PlacePage(memory)
    assert page.read() is None
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(memory)], cwd=ROOT, pass_fds=[memory])
    try:
        await_true(lambda: page.read() is not None, 60.0, "nothing is noted")
        last = 0
        for _ in range(5000):
            if (place := page.read()) is not None:  # both slots were written while they were copied
                assert place.stage == place.micro_batch and place.work == f"work {place.stage}"
                assert place.stage is not None and place.stage >= last
                last = place.stage
    finally:
        writer.kill()
        writer.wait()
    place = page.read()
    assert place is not None and place.stage is not None and place.work == f"work {place.stage}"
    assert place.stage >= last
    page.close()
    os.close(memory)


def test_half_a_note_is_not_read() -> None:
    memory = new_memory()
    page, other = PlacePage(memory), PlacePage(memory)
    known = [
        Place("forward", 1, 2),
        Place("backward", 3, 4),
        Place("a command of a long name, longer than the slot"),
    ]
    for place in known:
        before = other.read()
        data = page._memory[:]
        page.write(place)
        after = page._memory[:]
        for cut in range(len(after)):  # a memory whose first bytes alone have been written
            page._memory[:] = after[:cut] + data[cut:]
            assert other.read() in (before, Place(place.work[:36], *place[1:]))
        page._memory[:] = after
        assert other.read() == Place(place.work[:36], *place[1:])
    os.close(memory)
