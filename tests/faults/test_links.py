"""A link between two hosts that is slow, away for a while, or away for good. Needs root, `ip` and `tc`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fxsplit
from benchmarks.two_machines.hosts import ADDRESSES, INTERFACES, NAMESPACES, on_host, two_hosts
from tests.faults.scripts import ROOT, assert_same, await_true, small_model, train

STEPS = 30
PORT = 29531

SCRIPT = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import fxsplit, torch
from tests.faults.scripts import *

address, out, timeout_s, directory = sys.argv[1:]
torch.set_num_threads(1)
snapshots = fxsplit.Snapshots(directory, every=3) if directory else None
with fxsplit.compile(small_model(), ["cpu", "server/cpu"], cuts=["3"], chunks=2, verify=False, snapshots=snapshots,
                     timeout_s=float(timeout_s), listen=f"{{address}}:{PORT}", token="t",
                     example_inputs=batch(0)[0]) as pipe:
    torch.manual_seed(1)
    def slowly(step):
        print("step", step, flush=True)
        time.sleep(0.1)
    torch.save(train(pipe, {STEPS}, slowly), out)
"""


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    name = f"fxsplit-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made.returncode == 0


pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc"),
]


@pytest.fixture
def expected() -> Iterator[dict[str, torch.Tensor]]:
    options = {"cuts": ["3"], "chunks": 2, "verify": False, "transport": "in_process"}
    with fxsplit.compile(small_model(), ["cpu", "server/cpu"], **options) as pipe:  # type: ignore[arg-type]
        torch.manual_seed(1)
        yield train(pipe, STEPS)


@contextmanager
def training(
    folder: Path, timeout_s: float, directory: str = "", address: str = ADDRESSES[0]
) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[bytes]]]:
    """Client and worker, each on a host of its own, at step 3 of their training."""
    script, out = folder / "script.py", folder / "state.pt"
    script.write_text(SCRIPT)
    joins = [sys.executable, "-m", "fxsplit", "worker", "--join", f"{address}:{PORT}", "--name", "server"]
    trains = [sys.executable, str(script), address, str(out), str(timeout_s), directory]
    environment = {**os.environ, "FXSPLIT_TOKEN": "t", "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen(on_host(1, *joins), cwd=ROOT, env=environment)
    client = subprocess.Popen(
        on_host(0, *trains), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        read_until(client, "step 3")
        yield client, worker
    finally:
        client.kill()
        worker.kill()
        client.communicate()
        worker.wait()


def read_until(client: subprocess.Popen[str], words: str) -> None:
    """Reads what a process says up to a line with these words."""
    assert client.stdout is not None
    said: list[str] = []
    while words not in (line := client.stdout.readline()):
        assert line, "".join(said)
        said.append(line)


def set_link(state: str) -> None:
    """Takes the link down, or up again."""
    subprocess.run(["ip", "-n", NAMESPACES[0], "link", "set", INTERFACES[0], state], check=True)


@pytest.mark.parametrize("fault", ["1mbit", "down for 5 s"])
def test_training_over_a_bad_link(fault: str, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Nothing is lost, nothing is restarted: the processes are the same, the numbers too."""
    with two_hosts("1mbit" if fault == "1mbit" else None), training(tmp_path, 20.0) as (client, worker):
        if fault != "1mbit":
            set_link("down")
            time.sleep(5.0)
            assert client.poll() is None and worker.poll() is None
            set_link("up")
        said, _ = client.communicate(timeout=100)
        assert client.returncode == 0, said
        assert worker.wait(timeout=10) == 0
    assert_same(torch.load(tmp_path / "state.pt"), expected)


def test_a_link_that_stays_away_is_an_error_and_both_sides_end(tmp_path: Path) -> None:
    """The client says whom it has lost; the worker, to which nobody can say anything, ends by itself."""
    with two_hosts(None), training(tmp_path, 5.0) as (client, worker):
        set_link("down")
        said, _ = client.communicate(timeout=100)
        assert client.returncode == 1
        for words in ("WorkerLost: lost a worker: worker server", "has not been heard of for", "is cut off"):
            assert words in said, said
        assert "snapshots=" in said, "what to do"
        assert worker.wait(timeout=100) == 0
    assert not (tmp_path / "state.pt").exists()


def has_hung_up(client: subprocess.Popen[str]) -> bool:
    """Whether the client's end of the worker's connection is closed, and the worker cannot have been told so."""
    fin_wait = "04"
    rows = [line.split() for line in Path(f"/proc/{client.pid}/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{PORT:04X}") and row[3] == fin_wait for row in rows)


def test_a_link_away_for_longer_than_the_time_out_costs_the_steps_since_the_snapshot(
    expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The client gives the worker up and waits for one of its name; when the link is back, it is the same one."""
    with two_hosts(None), training(tmp_path, 5.0, str(tmp_path / "snapshots")) as (client, worker):
        set_link("down")
        read_until(client, "worker server")
        await_true(lambda: has_hung_up(client), 60.0, "the client does not let go of the worker")
        assert worker.poll() is None
        set_link("up")
        said, _ = client.communicate(timeout=150)
        assert client.returncode == 0, said
        assert worker.wait(timeout=30) == 0, "it was the same process to the end"
    assert_same(torch.load(tmp_path / "state.pt"), expected)
