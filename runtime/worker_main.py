"""A worker process: `python -m fxsplit.runtime.worker_main`, with its settings as JSON on standard input."""

from __future__ import annotations

import os
import queue
import sys
import threading
from concurrent.futures import Future
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from fxsplit.runtime.launch import WorkerSettings
from fxsplit.runtime.rpc import RpcEndpoint
from fxsplit.runtime.worker import Worker


def main() -> None:
    """Serves commands until the client hangs up, however that comes to pass."""
    settings = WorkerSettings.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_client, name="client watch", daemon=True).start()
    torch.set_num_threads(settings.threads)
    commands: queue.SimpleQueue[tuple[str, tuple[Any, ...], Future[Any]]] = queue.SimpleQueue()

    def handle(command: str, arguments: tuple[Any, ...]) -> Future[Any]:
        result: Future[Any] = Future()
        if command == "abort":  # must get through while the main thread waits for a packet
            endpoint.mailbox.abort(*arguments)
            result.set_result(None)
        else:
            commands.put((command, arguments, result))
        return result

    endpoint = RpcEndpoint(settings.name, settings.session, handle)
    worker = Worker(endpoint)
    store = FileStore(settings.store, settings.world_size)
    store.set(f"ready/{settings.name}", "1")
    endpoint.join(store, settings.rank, settings.world_size)
    while True:  # the main thread computes: the number of threads holds for the thread that set it
        command, arguments, result = commands.get()
        result.set_result(worker.execute(command, arguments))
        del command, arguments, result


def _end_with_client() -> None:
    # The kernel closes the pipe when the client ends, by whatever cause. Nothing here is worth a tidy exit
    # (no files, no shared state), and a tidy one could wait for a peer that is gone.
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
