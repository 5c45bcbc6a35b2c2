"""Contenders as processes: started together, asked for some steps in turns, each with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """A contender cannot go on; says why."""


@dataclass
class Running:
    """The processes of one contender.

    Attributes:
        name: for messages.
        processes: one a rank.
        lines: what each said.
        errors: where each writes its standard error.
        seconds: of the steps that were counted.
        queued_s: of these, until the host had queued its work.
        facts: what it said of itself.
        last: what it said of its last block.
        reason: why it is out, if it is.
    """

    name: str
    processes: list[subprocess.Popen[str]]
    lines: list[queue.SimpleQueue[dict[str, Any] | None]]
    errors: list[Path]
    seconds: list[float] = field(default_factory=list)
    queued_s: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    @classmethod
    def start(cls, name: str, module: str, arguments: Sequence[str], ranks: int, flags: Sequence[str]) -> Running:
        """Starts them; each gets its rank and a port if there are several."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "PYTHONUNBUFFERED": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
        }
        running = cls(name, [], [], [])
        port = str(_free_port())
        for rank in range(ranks):
            file = tempfile.NamedTemporaryFile(prefix="contender-", suffix=".log", delete=False, mode="w")  # noqa: SIM115
            place = [str(rank), port] if ranks > 1 else []
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, *place, *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
            file.close()
            lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
            threading.Thread(target=_read, args=(process, lines), daemon=True).start()
            running.processes.append(process)
            running.lines.append(lines)
            running.errors.append(Path(file.name))
        return running

    def ask(self, line: str) -> None:
        """Writes a line to every rank."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended: `answer` says how
                process.stdin.write(line + "\n")
                process.stdin.flush()

    def answer(self, key: str, timeout_s: float) -> dict[str, Any]:
        """What the first rank says of `key`, once all ranks have said something of it.

        Raises:
            Failed: one has ended, says that it failed, or takes too long.
        """
        end = time.monotonic() + timeout_s
        answers = [self._answer(rank, key, end) for rank in range(len(self.processes))]
        return answers[0]

    def _answer(self, rank: int, key: str, end: float) -> dict[str, Any]:
        while True:
            try:
                said = self.lines[rank].get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise Failed(f"rank {rank} did not answer in time") from None
            if said is None:
                code = self.processes[rank].wait()
                raise Failed(f"rank {rank} ended with status {code}: {self._last_error(rank)}")
            if "error" in said:
                raise Failed(str(said["error"]))
            if key in said:
                return said
            self.facts.update(said)

    def _last_error(self, rank: int) -> str:
        lines = [line for line in self.errors[rank].read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "nothing said"

    def give_up(self, error: Exception) -> None:
        """Keeps the reason, shows what the processes said, and ends them."""
        self.reason = str(error)
        print(f"--- {self.name}: {error}", file=sys.stderr)
        for rank, path in enumerate(self.errors):
            tail = path.read_text(errors="replace")[-3000:]
            print(f"--- rank {rank}:\n{tail}", file=sys.stderr, flush=True)
        self.end()

    def end(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=0.0 if self.reason else 5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("RESULT "):
            lines.put(json.loads(line.removeprefix("RESULT ")))
    lines.put(None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def take_turns(
    running: Sequence[Running],
    rounds: int,
    steps: int,
    warm_up: int,
    deadline: float,
    limit_s: float = 60.0,
    is_new: bool = True,
) -> None:
    """Some steps of each, round by round; who fails is out.

    Args:
        running: the contenders, starting.
        rounds: blocks of each that count.
        steps: of a block.
        warm_up: steps before them.
        deadline: by `time.monotonic`: no round begins after it.
        limit_s: for the start of one, and for a block.
        is_new: whether they have not warmed up yet.
    """
    for round_number in range(-1 if is_new else 0, rounds):
        if round_number > 0 and time.monotonic() > deadline:
            return
        for one in running:
            if one.reason is not None:
                continue
            try:
                if round_number < 0:
                    one.answer("ready", limit_s)
                one.ask(str(steps if round_number >= 0 else warm_up))
                found = one.answer("seconds", limit_s)
            except (Failed, OSError) as error:
                one.give_up(error)
                continue
            if round_number >= 0:
                one.last = found
                one.seconds.append(found["seconds"] / found["steps"])
                one.queued_s.append(found["queued_s"] / found["steps"])


def throughput(batch: int, seconds: Sequence[float], base: Sequence[float]) -> tuple[str, str, str]:
    """Cells of a table: samples a second, their least and most, and what they are of another contender's.

    Args:
        batch: samples of a step.
        seconds: of a step, by round.
        base: the other's, of the same rounds; none for no ratio. The ratio is the median of the rounds' own.
    """
    rates = [batch / each for each in seconds]
    ratios = [other / each for other, each in zip(base, seconds, strict=False)]
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    return f"{statistics.median(rates):.0f}", f"{min(rates):.0f} - {max(rates):.0f}", ratio
