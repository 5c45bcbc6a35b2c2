"""Starting and ending worker processes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path

BOOT = Path(__file__).with_name("boot.py")


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker process is told at its start, as JSON on its standard input.

    Attributes:
        name: the worker.
        session: the pipeline's random name.
        rank: its rank in the RPC group; the client's is 0.
        world_size: members of the group.
        store: path of the file by which the group meets.
        threads: threads for one operation; the client's number, since it can change the last bits of results.
        join: address at which it joins instead; the session and the two numbers are told there.
        token: for joining.
        pulse: descriptor of the socket for signs of life; -1: none.
        page: descriptor of the memory of a `PlacePage`; -1: none.
        parent_pid: of the client, if the worker may be killed with the thread that has started it; else 0.
    """

    name: str
    session: str
    rank: int
    world_size: int
    store: str
    threads: int
    join: str = ""
    token: str = field(default="", repr=False)
    pulse: int = -1
    page: int = -1
    parent_pid: int = field(default_factory=lambda: os.getpid() if _is_main_thread() else 0)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> WorkerSettings:
        """The settings from their line."""
        return cls(**json.loads(line))


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent ends: even one that is stopped leaves nothing behind.

    Args:
        parent_pid: of the parent; 0: it is not asked for.
    """
    if parent_pid and sys.platform.startswith("linux"):
        set_parent_death_signal = 1  # of linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(0)  # it ended before the kernel knew


class WorkerProcess:
    """One worker process. It holds our end of its standard input open: when that closes, the worker ends."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        # The worker must find what the client finds: this package in a checkout, the modules of the user.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(BOOT), "fxsplit.runtime.worker_main"],
            stdin=subprocess.PIPE,
            env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the client, which then ends its workers
            pass_fds=[descriptor for descriptor in (settings.pulse, settings.page) if descriptor >= 0],
        )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it died at once: `ending` says how
            self._stdin.write(settings.to_json().encode() + b"\n")
            self._stdin.flush()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ending(self) -> str | None:
        """How the process ended, or None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if code == -signal.SIGKILL:
            return "was killed by SIGKILL: by somebody, or by the kernel when memory ran out"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def hang_up(self) -> None:
        """Tells the worker to end."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def kill(self) -> None:
        """Ends the worker at once, whatever it does."""
        self._process.kill()

    def end(self, grace_s: float = 3.0) -> None:
        """Waits for the worker to end, and kills it if it does not."""
        try:
            self._process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
