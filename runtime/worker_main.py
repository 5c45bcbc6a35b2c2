"""A worker process that the client has started: `python -m fxsplit.runtime.worker_main`.

Its settings come as JSON on standard input.
"""

from __future__ import annotations

import os
import sys
import threading

import torch
from torch._C._distributed_c10d import FileStore

from fxsplit.runtime.launch import WorkerSettings
from fxsplit.runtime.rpc import LOOPBACK, START_TIMEOUT_S
from fxsplit.runtime.serving import Serving, serve_joined


def main() -> None:
    """Serves the client that has started this process."""
    settings = WorkerSettings.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_client, name="client watch", daemon=True).start()
    if settings.join:
        serve_joined(settings.join, settings.name, settings.token, None, START_TIMEOUT_S)
    torch.set_num_threads(settings.threads)
    store = FileStore(settings.store, settings.world_size)
    serving = Serving(settings.name, settings.session)
    store.set(f"ready/{settings.name}", "1")
    serving.run(store, settings.rank, settings.world_size, LOOPBACK)


def _end_with_client() -> None:
    # The kernel closes the pipe when the client ends, by whatever cause. Nothing here is worth a tidy exit
    # (no files, no shared state), and a tidy one could wait for a peer that is gone.
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
