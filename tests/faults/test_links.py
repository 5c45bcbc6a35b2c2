"""A link between two hosts that is slow, or away for a while. Needs root, `ip` and `tc`; skipped elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxsplit
from benchmarks.two_machines.hosts import ADDRESSES, INTERFACES, NAMESPACES, on_host, two_hosts
from tests.faults.scripts import ROOT, assert_same, small_model, train

STEPS = 30

SCRIPT = """
import sys, time
import fxsplit, torch
from tests.faults.scripts import *

address, out = sys.argv[1:]
torch.set_num_threads(1)
with fxsplit.compile(small_model(), ["cpu", "server/cpu"], cuts=["3"], chunks=2, verify=False, timeout_s=20.0,
                     listen=address + ":29531", token="t", example_inputs=batch(0)[0]) as pipe:
    torch.manual_seed(1)
    print("joined", flush=True)
    def slowly(step):
        print("step", step, flush=True)
        time.sleep(0.1)
    torch.save(train(pipe, 30, slowly), out)
"""


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "fxsplit-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "fxsplit-probe"], capture_output=True, check=False)
    return made.returncode == 0


pytestmark = [pytest.mark.faults, pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc")]


@pytest.fixture
def expected() -> Iterator[dict[str, torch.Tensor]]:
    options = {"cuts": ["3"], "chunks": 2, "verify": False, "transport": "in_process"}
    with fxsplit.compile(small_model(), ["cpu", "server/cpu"], **options) as pipe:  # type: ignore[arg-type]
        torch.manual_seed(1)
        yield train(pipe, STEPS)


@pytest.mark.parametrize("fault", ["1mbit", "down for 5 s"])
def test_training_over_a_bad_link(fault: str, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Nothing is lost, nothing is restarted: the processes are the same, the numbers too."""
    script, out = tmp_path / "script.py", tmp_path / "state.pt"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}")
    address = ADDRESSES[0]
    joins = [sys.executable, "-m", "fxsplit", "worker", "--join", f"{address}:29531", "--name", "server"]
    with two_hosts("1mbit" if fault == "1mbit" else None):
        environment = {**os.environ, "FXSPLIT_TOKEN": "t", "OMP_NUM_THREADS": "1"}
        worker = subprocess.Popen(on_host(1, *joins), cwd=ROOT, env=environment)
        client = subprocess.Popen(
            on_host(0, sys.executable, str(script), address, str(out)), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert client.stdout is not None
            while not client.stdout.readline().startswith("step 3"):
                assert client.poll() is None
            if fault != "1mbit":
                link = ["ip", "-n", NAMESPACES[0], "link", "set", INTERFACES[0]]
                subprocess.run([*link, "down"], check=True)
                time.sleep(5.0)
                assert client.poll() is None and worker.poll() is None
                subprocess.run([*link, "up"], check=True)
            client.communicate(timeout=100)
            assert client.returncode == 0
            assert worker.wait(timeout=10) == 0
        finally:
            client.kill()
            worker.kill()
    assert_same(torch.load(out), expected)
