"""A worker process that the client has started: `python -m fxsplit.runtime.worker_main`.

Its settings come as JSON on standard input.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import threading

import torch
from torch._C._distributed_c10d import FileStore

from fxsplit.runtime.launch import WorkerSettings
from fxsplit.runtime.pulse import Pulse
from fxsplit.runtime.rpc import LOOPBACK, START_TIMEOUT_S
from fxsplit.runtime.serving import Serving, serve_joined


def main() -> None:
    """Serves the client that has started this process."""
    settings = WorkerSettings.from_json(sys.stdin.readline())
    folder = os.path.dirname(settings.store)
    threading.Thread(target=_end_with_client, args=(folder,), name="client watch", daemon=True).start()
    if settings.parent_pid:
        _die_with_parent(settings.parent_pid)
    if settings.join:
        serve_joined(settings.join, settings.name, settings.token, None, START_TIMEOUT_S)
    torch.set_num_threads(settings.threads)
    store = FileStore(settings.store, settings.world_size)
    serving = Serving(settings.name, settings.session, Pulse.of_descriptor(settings.pulse))
    store.set(f"ready/{settings.name}", "1")
    serving.run(store, settings.rank, settings.world_size, LOOPBACK, lambda: None)


def _end_with_client(folder: str) -> None:
    # The kernel closes the pipe when the client ends, by whatever cause. Nothing here is worth a tidy exit
    # (no files, no shared state), and a tidy one could wait for a peer that is gone.
    while sys.stdin.buffer.read(4096):
        pass
    if folder:
        shutil.rmtree(folder, ignore_errors=True)  # where we were to meet, if the client was killed before
    os._exit(0)


def _die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent ends: even one that is stopped leaves nothing behind."""
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1  # of linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(0)  # it ended before the kernel knew


if __name__ == "__main__":
    main()
