"""Worker processes: they start, die, and end with their client, and never leave it hanging."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fxsplit
from benchmarks.reliability.faults import listening_ports
from fxsplit.errors import PipelineError, WorkerError
from tests.models import images, mobilenet
from tests.processes import SOON_S, worker_processes

ROOT = Path(__file__).parent.parent
CUTS = ["features.5", "features.14"]
CHAIN = ["cpu", "one/cpu", "two/cpu"]


def test_workers_are_processes_of_this_host_and_end_with_close() -> None:
    with fxsplit.compile(mobilenet(), CHAIN, cuts=CUTS) as pipe:
        workers = {worker.name: worker for worker in pipe.workers}
        assert list(workers) == ["client", "one", "two"]
        assert workers["client"].pid == os.getpid()
        assert sorted(w.pid for w in pipe.workers[1:]) == sorted(worker_processes())
        with pytest.raises(PipelineError, match="one pipeline over RPC"):
            fxsplit.compile(mobilenet(), CHAIN, cuts=CUTS)
        pipe(images(4)).sum().backward()
    assert worker_processes() == []
    with fxsplit.compile(mobilenet(), CHAIN[:2], cuts=CUTS[:1]) as pipe:
        pipe(images(4))


@pytest.mark.parametrize("moment", ["idle", "computing"])
def test_a_killed_worker_is_named_within_seconds(moment: str) -> None:
    with fxsplit.compile(mobilenet(), CHAIN, cuts=CUTS, example_inputs=images(4)) as pipe:
        victim = next(worker for worker in pipe.workers if worker.name == "two")
        if moment == "idle":
            os.kill(victim.pid, signal.SIGKILL)
        else:
            os.kill(victim.pid, signal.SIGSTOP)
            subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({victim.pid}, 9)"])
        start = time.monotonic()
        with pytest.raises(WorkerError, match="two") as caught:
            pipe(images(4))
        assert time.monotonic() - start < SOON_S
        assert "SIGKILL" in str(caught.value) and "try" in str(caught.value)
        start = time.monotonic()
    assert time.monotonic() - start < SOON_S
    assert worker_processes() == []


SCRIPT = """
import sys, torch, fxsplit
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), Scale(3.0)
    def forward(self, x):
        return self.b(self.a(x))

class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
    def forward(self, x):
        return helper(x) * self.factor

def helper(x):
    return x + 1

pipe = fxsplit.compile(Mine(), ["cpu", "server/cpu"], cuts=["b"])
pipe(torch.ones(2, 4)).sum().backward()
print("pids", *(w.pid for w in pipe.workers if w.name != "client"), flush=True)
"""


ENDINGS = {
    "end of the script": "",
    "sys.exit": "sys.exit(3)",
    "exception": "raise ValueError('user')",
    "os._exit": "import os; os._exit(4)",
    "kill -9": "import os; os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_process_survives_its_client(ending: str, tmp_path: Path) -> None:
    """A script without a main guard, with modules and functions of its own, that ends in every way."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + ENDINGS[ending])
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert "pids" in result.stdout, result.stderr
    pid = int(result.stdout.split()[1])
    end = time.monotonic() + SOON_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the worker outlived its client"
        time.sleep(0.05)
    assert "tensorpipe" not in result.stderr


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_no_port_listens_once_all_are_connected_and_nobody_is_busy() -> None:
    with fxsplit.compile(mobilenet(), CHAIN, cuts=CUTS) as pipe:
        pids = [worker.pid for worker in pipe.workers]
        assert len(pids) == 3
        assert [port for pid in pids for port in listening_ports(pid)] == []
        before = sum(map(cpu_seconds, pids))
        time.sleep(2.0)
        assert sum(map(cpu_seconds, pids)) - before < 0.5, "a thread of an idle pipeline goes round and round"


def test_channels_last_and_views_cross_a_link_unchanged() -> None:
    model = mobilenet().eval()
    x = images(9).to(memory_format=torch.channels_last)[1:]
    with fxsplit.compile(model, CHAIN[:2], cuts=CUTS[:1], chunks=2) as pipe, torch.no_grad():
        assert torch.equal(pipe(x), torch.cat([model(c) for c in x.tensor_split(2)]))
