"""Workers that join from elsewhere: another of the same name takes a dead one's place; others join again."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistStoreError

import fxsplit
from fxsplit.errors import WorkerError
from fxsplit.runtime import torchrun
from tests.faults.scripts import CHAIN, CUTS, ROOT, assert_same, batch, small_model, start, train
from tests.processes import SHARED_MEMORY, SOON_S, abandoned_shared_memory
from tests.test_joining import TOKEN, free_port, joining

STEPS = 12


@contextmanager
def replacement(port: int, name: str, after_s: float) -> Iterator[None]:
    """Another worker of a name, some time later."""
    with ExitStack() as stack:
        timer = threading.Timer(after_s, lambda: stack.enter_context(joining(port, name)))
        timer.start()
        yield
        timer.join()


@pytest.mark.faults
def test_a_worker_of_the_same_name_takes_the_place(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cuts": CUTS, "chunks": 2, "verify": False}
    with fxsplit.compile(small_model(), CHAIN, transport="in_process", **options) as pipe:
        torch.manual_seed(1)
        expected = train(pipe, STEPS)
    port = free_port()
    options |= {"listen": f"127.0.0.1:{port}", "token": TOKEN, "snapshots": fxsplit.Snapshots(tmp_path, every=4)}
    with joining(port, "one") as one, joining(port, "two") as two, ExitStack() as later:
        with fxsplit.compile(small_model(), CHAIN, **options) as pipe:

            def fault(step: int) -> None:
                if step == 6:
                    one.send_signal(signal.SIGKILL)
                    later.enter_context(replacement(port, "one", 0.5))

            torch.manual_seed(1)
            with pytest.warns(UserWarning, match="worker one.*started again"):
                found = train(pipe, STEPS, fault)
            pids = {worker.name: worker.pid for worker in pipe.workers}
            assert pids["two"] == two.pid, "it has joined again, as the same process"
            assert pids["one"] != one.pid
        assert two.wait(timeout=SOON_S) == 0
    assert_same(found, expected)


CLIENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import fxsplit
from tests.faults.scripts import *
from torch.nn import functional as F

with fxsplit.compile(small_model(), CHAIN, cuts=CUTS, example_inputs=batch(0)[0], verify=False,
                     listen=sys.argv[1], token=sys.argv[2]) as pipe:
    x, y = batch(0)
    pipe.step(x, target=y, loss_fn=F.cross_entropy)
    print("trains", flush=True)
    while True:
        pipe.step(x, target=y, loss_fn=F.cross_entropy)
"""


@pytest.mark.faults
def test_joined_workers_end_with_a_client_that_is_killed(tmp_path: Path) -> None:
    """They are on other machines: no kernel tells them, but the end of their connection."""
    script, port, shared = tmp_path / "script.py", free_port(), set(SHARED_MEMORY.glob("*"))
    script.write_text(CLIENT)
    with joining(port, "one") as one, joining(port, "two") as two:
        client = start(script, f"127.0.0.1:{port}", TOKEN)
        assert client.stdout is not None
        assert client.stdout.readline() == "trains\n", client.communicate()[1]
        client.kill()
        assert one.wait(timeout=SOON_S) == two.wait(timeout=SOON_S) == 0
        client.communicate()
    assert abandoned_shared_memory(shared) == []
    with socket.create_server(("127.0.0.1", port)):
        pass  # nobody listens there any more


TORCHRUN = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import fxsplit, torch
from pathlib import Path
from tests.faults.scripts import *

folder = Path(sys.argv[2])
torch.set_num_threads(1)
snapshots = fxsplit.Snapshots(folder / "snapshots", every=3)
with fxsplit.compile(small_model(), ["cpu", "rank1/cpu"], cuts=["3"], chunks=2, verify=False, listen="torchrun",
                     snapshots=snapshots) as pipe:
    print("from", pipe.committed_steps, flush=True)
    torch.manual_seed(1)
    def fault(step):
        if step == 7 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(pipe.workers[1].pid, signal.SIGKILL)
    torch.save(train(pipe, 12, fault), folder / "state.pt")
"""


@pytest.mark.faults
def test_elastic_restarts_of_torchrun_go_on_from_the_snapshots(tmp_path: Path) -> None:
    with fxsplit.compile(
        small_model(), ["cpu", "rank1/cpu"], cuts=["3"], chunks=2, verify=False, transport="in_process"
    ) as pipe:
        torch.manual_seed(1)
        expected = train(pipe, STEPS)
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += ["--master-port", str(free_port()), str(script), str(ROOT), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110, check=False)
    assert result.returncode == 0, result.stderr
    starts = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("from ")]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] in (3, 6), starts
    assert_same(torch.load(tmp_path / "state.pt"), expected)


class Greedy(nn.Module):
    """Wants more memory than there is, if it is told to."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x[0, 0] > 90.0):
            return torch.empty(2**50)
        return x


def test_a_worker_out_of_memory_says_so_and_goes_on() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Greedy())
    example = torch.zeros(4, 4)
    with fxsplit.compile(model, ["cpu", "server/cpu"], cuts=["1"], example_inputs=example, verify=False) as pipe:
        pipe.load_state_dict({"0.weight": torch.eye(4), "0.bias": torch.zeros(4)})
        with torch.no_grad(), pytest.raises(WorkerError, match=r"allocate memory[^$]*server[^$]*float32\[4, 4\]"):
            pipe(example + 99.0)
        with torch.no_grad():
            assert torch.equal(pipe(example), example)


def test_a_worker_that_is_slow_for_a_while_is_waited_for() -> None:
    """Stopped for two seconds, within the time-out: the same process goes on, and so does the step."""
    with fxsplit.compile(small_model(), CHAIN, cuts=CUTS, example_inputs=batch(0)[0], verify=False) as pipe:
        pids = {worker.name: worker.pid for worker in pipe.workers}
        os.kill(pids["two"], signal.SIGSTOP)
        start_s = time.monotonic()
        threading.Timer(2.0, os.kill, (pids["two"], signal.SIGCONT)).start()
        with torch.no_grad():
            pipe(batch(0)[0])
        assert time.monotonic() - start_s >= 2.0
        assert {worker.name: worker.pid for worker in pipe.workers} == pids


def test_an_address_of_before_a_restart_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun's store outlives its workers, so a worker must not go to a client that is gone."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(torchrun, "_WAIT", datetime.timedelta(seconds=0.5))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    torchrun.announce()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(DistStoreError):
        torchrun.serve(["cpu"])
