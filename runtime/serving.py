"""A worker process at work: serves the commands of a client until that ends, however it does."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NoReturn

import torch
from torch._C._distributed_c10d import Store

from fxsplit.allocator import keep_memory
from fxsplit.errors import WorkerError
from fxsplit.runtime.handshake import interface_of
from fxsplit.runtime.join import JoinedStore, end_with_client, join
from fxsplit.runtime.rpc import RpcEndpoint
from fxsplit.runtime.worker import Worker


def serve_joined(
    address: str, name: str, token: str, devices: Sequence[str] | None, patience_s: float
) -> NoReturn:
    """Joins a client and serves it; the process ends when the client does.

    Args:
        address: "HOST:PORT" at which the client listens.
        name: of this worker in the client's devices.
        token: the client's.
        devices: what this worker offers; all devices of this host if None.
        patience_s: how long to wait for the client to listen.

    Raises:
        FxsplitError: it cannot join.
    """
    member = join(address, name, token, devices, patience_s)
    torch.set_num_threads(member.threads)
    serving = Serving(name, member.session)
    store = JoinedStore(member.connection)
    serving.run(store, member.rank, member.world_size, interface_of(member.address), member.connection)


class Serving:
    """A worker and its queue of commands; the main thread computes: the number of threads holds for it alone."""

    def __init__(self, name: str, session: str) -> None:
        keep_memory()
        self._commands: queue.SimpleQueue[tuple[str, tuple[Any, ...], Future[Any]]] = queue.SimpleQueue()
        self._endpoint = RpcEndpoint(name, session, self._handle)
        self._worker = Worker(self._endpoint)

    def run(self, store: Store, rank: int, world_size: int, interface: str, client: Any = None) -> NoReturn:
        """Becomes a member of the group and serves for ever."""
        try:
            self._endpoint.join(store, rank, world_size, interface)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            raise WorkerError("the client ended before all workers were there", found=first_line) from error
        if client is not None:
            end_with_client(client)
        while True:
            command, arguments, result = self._commands.get()
            result.set_result(self._worker.execute(command, arguments))
            del command, arguments, result

    def _handle(self, command: str, arguments: tuple[Any, ...]) -> Future[Any]:
        result: Future[Any] = Future()
        if command == "abort":  # must get through while the main thread waits for a packet
            self._endpoint.mailbox.abort(*arguments)
            result.set_result(None)
        else:
            self._commands.put((command, arguments, result))
        return result
