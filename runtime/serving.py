"""A worker process at work: serves the commands of a client until that ends, however it does."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NoReturn

import torch
from torch._C._distributed_c10d import Store

from fxsplit.allocator import keep_memory
from fxsplit.errors import WorkerError
from fxsplit.runtime.handshake import interface_of
from fxsplit.runtime.join import JoinedStore, end_with_client, join
from fxsplit.runtime.place import PlacePage
from fxsplit.runtime.pulse import Pulse
from fxsplit.runtime.rpc import RpcEndpoint
from fxsplit.runtime.transport import hand_over
from fxsplit.runtime.worker import Worker


def serve_joined(
    address: str,
    name: str,
    token: str,
    devices: Sequence[str] | None,
    patience_s: float,
    again: Callable[[], None] = lambda: None,
    page: PlacePage | None = None,
) -> NoReturn:
    """Joins a client and serves it; the process ends when the client does.

    Args:
        address: "HOST:PORT" at which the client listens.
        name: of this worker in the client's devices.
        token: the client's.
        devices: what this worker offers; all devices of this host if None.
        patience_s: how long to wait for the client to listen.
        again: called when the client goes on without this process, and waits for a worker of this name; it may
            put another in its place, and need not return.
        page: where this worker notes what it is at, if it is on the client's host.

    Raises:
        FxsplitError: it cannot join.
    """
    member = join(address, name, token, devices, patience_s)
    torch.set_num_threads(member.threads)
    store = JoinedStore(member.connection)
    serving = Serving(name, member.session, Pulse(store.beat, page))
    watch = partial(end_with_client, member.connection, again)
    serving.run(store, member.rank, member.world_size, interface_of(member.address), watch)


class Serving:
    """A worker and its queue of commands; the main thread computes: the number of threads holds for it alone."""

    def __init__(self, name: str, session: str, pulse: Pulse) -> None:
        keep_memory()
        self._pulse = pulse
        self._commands: queue.SimpleQueue[tuple[str, tuple[Any, ...], Future[Any]]] = queue.SimpleQueue()
        self._endpoint = RpcEndpoint(name, session, self._handle)
        self._worker = Worker(self._endpoint, pulse=pulse)

    def run(
        self,
        store: Store,
        rank: int,
        world_size: int,
        interface: str,
        watch: Callable[[], None],
        folder: str | None = None,
    ) -> NoReturn:
        """Becomes a member of the group and serves for ever.

        Args:
            store: where the members meet.
            rank: of this one.
            world_size: their number.
            interface: on which it listens.
            watch: called when all are there.
            folder: where they meet if all are processes of this host.
        """
        try:
            self._endpoint.join(store, rank, world_size, interface, folder=folder)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            raise WorkerError("the client ended before all workers were there", found=first_line) from error
        watch()
        self._pulse.start()
        while True:
            command, arguments, result = self._commands.get()
            hand_over(self._worker.execute(command, arguments), result)
            del command, arguments, result

    def _handle(self, command: str, arguments: tuple[Any, ...]) -> Future[Any]:
        result: Future[Any] = Future()
        if command == "abort":  # must get through while the main thread waits for a packet
            self._endpoint.mailbox.abort(*arguments)
            result.set_result(None)
        else:
            self._commands.put((command, arguments, result))
        return result
