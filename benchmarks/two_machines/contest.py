"""Contenders that train in turns: a step of one, a step of the next, so that all meet the same machine."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.two_machines.hosts import ADDRESSES, on_host, two_hosts

WARM_UP = 3
"""Steps of each that are not counted: the schedule is made anew after the first and the second."""

Row = dict[str, float]


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        codec: of activations and gradients; None is the peer.
        chunks: micro-batches.
        schedule: of fxsplit.
    """

    codec: str | None
    chunks: int
    schedule: str = "auto"

    @property
    def name(self) -> str:
        """For the table."""
        return "torch.distributed.pipelining" if self.codec is None else self.codec


@dataclass
class Running:
    """A contender's two processes."""

    contender: Contender
    client: subprocess.Popen[str]
    server: subprocess.Popen[str]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def start(cls, contender: Contender, steps: int, port: int) -> Running:
        """Starts both; they wait for the first step."""
        token = secrets.token_hex(8)
        environment = {**os.environ, "FXSPLIT_TOKEN": token, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        common = ["--chunks", str(contender.chunks), "--steps", str(steps), "--port", str(port)]
        python = sys.executable
        if contender.codec is None:
            commands = [[python, "-m", "benchmarks.two_machines.peer", str(rank), *common] for rank in (0, 1)]
        else:
            options = ["--codec", contender.codec, "--schedule", contender.schedule]
            join = ["worker", "--join", f"{ADDRESSES[0]}:{port}", "--name", "server", "--patience", "120"]
            commands = [
                [python, "-m", "benchmarks.two_machines.client", *common, *options],
                [python, "-m", "fxsplit", *join],
            ]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        quiet: dict[str, Any] = {"env": environment, "stderr": subprocess.DEVNULL}
        client = subprocess.Popen(on_host(0, *commands[0]), **pipes, **quiet)
        return cls(contender, client, subprocess.Popen(on_host(1, *commands[1]), text=True, **quiet))

    def step(self) -> Row:
        """One step, of which the others see nothing but an idle machine."""
        stdin, stdout = self.client.stdin, self.client.stdout
        assert stdin is not None and stdout is not None
        stdin.write("step\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self.contender} ended with status {self.client.wait()}")
        row: Row = json.loads(line)
        return row

    def end(self) -> None:
        """Ends both."""
        for process in (self.client, self.server):
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def contest(rate: str | None, contenders: Sequence[Contender], rounds: int) -> dict[Contender, list[Row]]:
    """The counted steps of each contender over a link of a rate."""
    with two_hosts(rate), ExitStack() as stack:
        running = []
        for number, contender in enumerate(contenders):
            one = Running.start(contender, WARM_UP + rounds, 29600 + number)
            stack.callback(one.end)
            for _ in range(WARM_UP):
                one.step()  # one after the other, while the rest starts, would disturb
            running.append(one)
        for _ in range(rounds):
            for one in running:
                one.rows.append(one.step())
    return {one.contender: one.rows for one in running}
