"""Training while strangers connect to all its ports: the same numbers, in the same time."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .faults import listening_ports, pid_of
from .training import compiled, train, undisturbed

TURN = 16
"""Steps of a turn: nobody connects, then somebody to ports of his own, then to those of the pipeline."""

KINDS = ("quiet", "elsewhere", "here")
TOKEN = "of the benchmark"


def intruders(steps: int) -> dict[str, Any]:
    """Trains with workers that have joined, so that their client listens, too.

    Args:
        steps: how many.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        for name in ("one", "two"):
            stack.enter_context(_worker(address, name))
        pipe = stack.enter_context(compiled(None, listen=address, token=TOKEN))
        torch.manual_seed(1)
        ports: list[int] = []
        losses: list[float] = []
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        noise = contextlib.ExitStack()
        began_s = time.monotonic()

        def log(number: int, loss: float, at_s: float) -> None:
            nonlocal began_s
            losses.append(loss)
            if number == 0:
                ports.extend(port for pid in _processes(pipe) for port in listening_ports(pid))
            if (number + 1) % TURN:
                return
            turn = number // TURN
            if turn > 0:  # the first one warms up
                seconds[KINDS[turn % 3]].append((at_s - began_s) / TURN)
            noise.close()
            kind = KINDS[(turn + 1) % 3]
            if kind != "quiet":
                noise.enter_context(_strangers(len(ports), ports if kind == "here" else []))
            began_s = time.monotonic()

        found = train(pipe, steps, log, lambda: False)
        noise.close()
    expected, expected_losses = undisturbed(steps)
    return {
        "steps": steps,
        "ports": len(ports),
        "identical": found == expected and losses == expected_losses,
        **{f"{kind}_step_s": round(statistics.median(of), 4) for kind, of in seconds.items()},
        **{f"{kind}_quartiles_s": [round(q, 4) for q in statistics.quantiles(of)] for kind, of in seconds.items()},
    }


def _processes(pipe: Any) -> list[int]:
    return [os.getpid(), pid_of(pipe, "one"), pid_of(pipe, "two")]


@contextlib.contextmanager
def _worker(address: str, name: str) -> Iterator[None]:
    command = [sys.executable, "-m", "fxsplit", "worker", "--join", address, "--name", name]
    environment = {**os.environ, "FXSPLIT_TOKEN": TOKEN, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    process = subprocess.Popen(command, env=environment)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _strangers(count: int, ports: list[int]) -> Iterator[None]:
    """Connections from a process of their own."""
    program = str(Path(__file__).with_name("garbage.py"))
    command = [sys.executable, "-S", program, str(count), *map(str, ports)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()  # so that all of them came
        process.communicate()
