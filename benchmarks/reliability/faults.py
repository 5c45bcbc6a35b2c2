"""What is done to a running pipeline, and when."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import fxsplit

MOMENTS = {
    "forward": ("forward",),
    "backward": ("backward",),
    "optimizer": ("prepare_step", "commit_step"),
    "snapshot": ("take_snapshot", "write_snapshot"),
    "idle": ("idle", "clear_gradients"),
}
"""What a worker is at, by the names of its actions and commands."""

PATIENCE_S = 20.0


@dataclass
class Killer:
    """Kills workers of a pipeline, at moments asked for, from a thread beside the training.

    Attributes:
        pipe: whose workers.
        moments: at which, one after the other.
        seed: of the waits between them.
        deaths: of each worker killed: the moment, what it was at, and the time (`time.monotonic`).
    """

    pipe: fxsplit.Pipeline
    moments: tuple[str, ...]
    seed: int
    deaths: list[tuple[str, str, float]] = field(default_factory=list)
    is_due: threading.Event = field(default_factory=threading.Event)

    def start(self) -> threading.Thread:
        """Begins."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        return thread

    def committed(self) -> None:
        """A step was committed: the next one may be disturbed."""
        self.is_due.set()

    def _run(self) -> None:
        numbers = random.Random(self.seed)
        for moment in self.moments:
            for _ in range(numbers.randint(2, 6)):
                self.is_due.clear()
                self.is_due.wait(60.0)
            victim = numbers.choice(["one", "two"])
            place = self._await(victim, MOMENTS[moment])
            os.kill(pid_of(self.pipe, victim), signal.SIGKILL)
            self.deaths.append((moment, place, time.monotonic()))

    def _await(self, worker: str, wanted: tuple[str, ...]) -> str:
        """Waits until a worker is at something; after some time, any moment will do."""
        end_s = time.monotonic() + PATIENCE_S
        heartbeats = self.pipe._engine._transport._heartbeats  # type: ignore[attr-defined]
        while True:
            place = str(heartbeats.place(worker) or "idle")
            if place.split(" ")[0] in wanted or time.monotonic() > end_s:
                return place
            time.sleep(0.0002)


def pid_of(pipe: fxsplit.Pipeline, worker: str) -> int:
    """The process of a worker."""
    return next(info.pid for info in pipe.workers if info.name == worker)


def stop(pipe: fxsplit.Pipeline, worker: str) -> None:
    """A worker that hangs: it is stopped, and never goes on by itself."""
    os.kill(pid_of(pipe, worker), signal.SIGSTOP)


def pause(pipe: fxsplit.Pipeline, worker: str) -> None:
    """A worker that is slow for a while: it is stopped for a second."""
    pid = pid_of(pipe, worker)
    os.kill(pid, signal.SIGSTOP)
    code = f"import os, time; time.sleep(1); os.kill({pid}, {int(signal.SIGCONT)})"
    with contextlib.suppress(OSError):
        subprocess.Popen([sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL)


def kill(pipe: fxsplit.Pipeline, worker: str) -> None:
    """A worker that dies."""
    os.kill(pid_of(pipe, worker), signal.SIGKILL)


def damage(pipe: fxsplit.Pipeline, worker: str) -> None:
    """A byte of an older snapshot is changed."""
    folders = sorted(Path(pipe._engine._directory).glob("step-*"))[:-1]  # type: ignore[attr-defined]
    for folder in folders[:1]:
        for path in folder.glob("part-*"):
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                file.seek(os.path.getsize(path) // 2)
                file.write(b"?")


SOAK: tuple[Callable[[fxsplit.Pipeline, str], None], ...] = (kill, stop, pause, damage)


def listening_ports(pid: int) -> list[int]:
    """The TCP ports at which a process listens."""
    inodes = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link))
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
            found.append(int(fields[1].rpartition(":")[2], 16))
    return found


def memory_bytes(pid: int) -> int:
    """The memory of a process that is in RAM."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def descriptors(pid: int) -> int:
    """How many files a process has open."""
    with contextlib.suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0
