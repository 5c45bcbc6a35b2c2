"""The in-process transport: workers are threads. It is the reference that the others are tested against."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from fxsplit.runtime.packet import Key, Packet
from fxsplit.runtime.transport import (
    CLIENT_NAME,
    LOOPBACK,
    CommandHandler,
    Endpoint,
    LostWorker,
    Mailbox,
    hand_over,
)
from fxsplit.runtime.worker import Worker


class _InProcessEndpoint:
    is_immediate = True
    interface = LOOPBACK

    def __init__(self, name: str, peers: dict[str, _InProcessEndpoint], handler: CommandHandler | None) -> None:
        self.name = name
        self.mailbox = Mailbox()
        self.inbox: queue.SimpleQueue[tuple[str, tuple[Any, ...], Future[Any]] | None] = queue.SimpleQueue()
        self.worker: Worker | None = None  # the client has its own
        self.has_thread = True
        self._peers = peers
        self._handler = handler

    def send(self, to: str, key: Key, packet: Packet) -> Future[None]:
        """See `send_all`."""
        return self.send_all(to, [(key, packet)])

    def send_all(self, to: str, packets: Sequence[tuple[Key, Packet]]) -> Future[None]:
        """Copies the payload, as a link would: what one worker does in place must not reach the other.

        Of what is on a GPU the receiver makes the copy, most often onto another GPU.
        """
        for key, packet in packets:
            copies = tuple(
                t if t.is_cuda else t.clone(memory_format=torch.preserve_format) for t in packet.payload
            )
            is_lent = any(t.is_cuda for t in copies)
            self._peers[to].mailbox.deliver(key, replace(packet, payload=copies, is_lent=is_lent))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def call(self, to: str, command: str, *arguments: Any) -> Future[Any]:
        """Queues the command for the worker's thread."""
        peer = self._peers[to]
        if peer._handler is not None:
            return peer._handler(command, arguments)
        result: Future[Any] = Future()
        if command == "abort":  # must get through while the worker waits for a packet
            peer.mailbox.abort(*arguments)
            result.set_result(None)
        elif not peer.has_thread and peer.worker is not None:
            hand_over(peer.worker.execute(command, arguments), result)
        else:
            peer.inbox.put((command, arguments, result))
        return result

    def close(self) -> None:
        """Ends the worker's thread after what it is doing."""
        self.inbox.put(None)


class InProcess:
    """Workers as threads of this process; packets are copied from mailbox to mailbox."""

    name = "in_process"

    def __init__(self) -> None:
        self._endpoints: dict[str, _InProcessEndpoint] = {}
        self._threads: list[threading.Thread] = []

    def start(self, workers: Sequence[str], handler: CommandHandler) -> Endpoint:
        """Starts one thread a worker."""
        client = _InProcessEndpoint(CLIENT_NAME, self._endpoints, handler)
        self._endpoints[CLIENT_NAME] = client
        for name in workers:
            endpoint = self._endpoints[name] = _InProcessEndpoint(name, self._endpoints, None)
            endpoint.worker = Worker(endpoint)
            # The thread lives by its endpoint alone, so that a forgotten pipeline does not keep it.
            thread = threading.Thread(
                target=_serve,
                args=(endpoint, endpoint.worker, torch.get_num_threads()),
                name=f"fxsplit {name}",
                daemon=True,
            )
            thread.start()
            self._threads.append(thread)
        return client

    def describe(self) -> dict[str, tuple[str, int]]:
        """All are here."""
        return dict.fromkeys(self._endpoints, (socket.gethostname(), os.getpid()))

    def in_this_thread(self) -> dict[str, Worker]:
        """All workers, whose threads have nothing more to do."""
        found: dict[str, Worker] = {}
        for name, endpoint in self._endpoints.items():
            if endpoint.worker is not None:
                endpoint.has_thread = False
                found[name] = endpoint.worker
        return found

    def lost(self, timeout_s: float) -> LostWorker | None:
        """Threads do not get lost."""
        return None

    def restarted(self) -> InProcess:
        """Another one."""
        self.close()
        return InProcess()

    def close(self) -> None:
        """Ends the threads."""
        for endpoint in self._endpoints.values():
            endpoint.close()
        for thread in self._threads:
            thread.join(timeout=5.0)
        self._endpoints.clear()
        self._threads.clear()


def _serve(endpoint: _InProcessEndpoint, worker: Worker, threads: int) -> None:
    torch.set_num_threads(threads)  # holds for this thread; another number can change the last bits of results
    while (item := endpoint.inbox.get()) is not None:
        command, arguments, result = item
        hand_over(worker.execute(command, arguments), result)
        del item, arguments, result  # the queue may be idle for long: hold nothing
    worker.close()
