"""How packets and commands get from one worker to another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_any
from dataclasses import replace
from typing import Any, Protocol

from fxsplit.errors import PipelineError
from fxsplit.runtime.packet import Key, Packet
from fxsplit.runtime.streams import mark

CommandHandler = Callable[[str, tuple[Any, ...]], "Future[Any]"]

_REMEMBERED_RUNS = 256  # packets of a run that was given up may still be under way for a while

CLIENT_NAME = "client"
"""The worker that calls the pipeline."""


class Mailbox:
    """Packets that have arrived or are waited for, by key. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[Key, Future[Packet]] = {}
        self._aborted: dict[int, str] = {}

    def receive(self, key: Key) -> Future[Packet]:
        """The packet, now or when it comes."""
        with self._lock:
            slot = self._slots.setdefault(key, Future())
            if key.run in self._aborted and not slot.done():
                slot.set_exception(PipelineError(self._aborted[key.run]))
            return slot

    def deliver(self, key: Key, packet: Packet) -> None:
        """Puts a packet in its slot; a packet of a run that was given up is dropped.

        Whoever takes it can tell when what is queued on the current streams by now is done.
        """
        marks = mark(packet.payload)
        with self._lock:
            if key.run in self._aborted:
                return
            slot = self._slots.setdefault(key, Future())
        slot.set_result(replace(packet, marks=marks) if marks else packet)

    def forget(self, key: Key) -> None:
        """Drops a packet that has been used."""
        with self._lock:
            self._slots.pop(key, None)

    def abort(self, run: int, reason: str) -> None:
        """Whoever waits for a packet of this run gets an error at once."""
        with self._lock:
            self._aborted[run] = reason
            while len(self._aborted) > _REMEMBERED_RUNS:
                del self._aborted[next(iter(self._aborted))]
            waiting = [self._slots.pop(key) for key in list(self._slots) if key.run == run]
        for slot in waiting:
            if not slot.done():
                slot.set_exception(PipelineError(reason))


class Endpoint(Protocol):
    """One worker's end of the transport."""

    name: str
    mailbox: Mailbox
    is_immediate: bool
    """Whether sending takes the host no longer than queueing a copy."""

    def send(self, to: str, key: Key, packet: Packet) -> Future[None]:
        """Delivers a packet to a worker's mailbox, in the background."""

    def call(self, to: str, command: str, *arguments: Any) -> Future[Any]:
        """Runs a command on a worker and brings its result."""

    def close(self) -> None:
        """Ends this end. Never blocks for long; may be called twice."""


class Transport(Protocol):
    """Starts workers and connects them with the client."""

    name: str

    def start(self, workers: Sequence[str], handler: CommandHandler) -> Endpoint:
        """Starts these workers and returns the client's end.

        Args:
            workers: names of the workers beside the client.
            handler: runs the commands that reach the client itself.

        Raises:
            WorkerError: a worker did not start.
        """

    def describe(self) -> dict[str, tuple[str, int]]:
        """Host and process id of each worker."""

    def lost(self) -> str | None:
        """What happened to a worker that is gone, or None while all are there."""

    def close(self) -> None:
        """Ends all workers. Never hangs; may be called twice."""


def wait_done(future: Future[Any], check: Callable[[], None], poll_s: float = 0.2) -> None:
    """Returns when the future is done; until then, `check` may raise to end the wait."""
    while not wait_any([future], timeout=poll_s).done:
        check()


def wait(future: Future[Any], check: Callable[[], None]) -> Any:
    """The future's result, waited for as in `wait_done`."""
    wait_done(future, check)
    return future.result()
