"""How packets and commands get from one worker to another."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, Protocol

from fxsplit.errors import PipelineError
from fxsplit.runtime.arrivals import Arrivals
from fxsplit.runtime.packet import Key, Packet, marked
from fxsplit.runtime.place import Place

CommandHandler = Callable[[str, tuple[Any, ...]], "Future[Any]"]

_REMEMBERED_RUNS = 256  # packets of a run that was given up may still be under way for a while

LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"

CLIENT_NAME = "client"
"""The worker that calls the pipeline."""


@dataclass(frozen=True)
class LostWorker:
    """A worker that is gone, or silent.

    Attributes:
        name: the worker.
        cause: which process it was, and how it was lost.
        place: what it was at when it was last heard of, if it was.
    """

    name: str
    cause: str
    place: Place | None = None


Fetch = Callable[["Future[Any]", "float | None"], None]


class Arrival(Future[Any]):
    """A future that the thread which waits for it may bring about itself.

    Args:
        fetch: does what is to be done, until the future is done or a number of seconds is over; None: nothing is.
    """

    def __init__(self, fetch: Fetch | None = None) -> None:
        super().__init__()
        self._fetch = fetch

    def result(self, timeout: float | None = None) -> Any:
        """See `Future.result`."""
        return super().result(self._fetched(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `Future.exception`."""
        return super().exception(self._fetched(timeout))

    def _fetched(self, timeout: float | None) -> float | None:
        """Fetches; returns the time that is left to wait."""
        if self._fetch is None or self.done():
            return timeout
        self._fetch(self, timeout)
        return 0.0


class Mailbox:
    """Packets that have arrived or are waited for, by key. Safe to use from several threads.

    A key is good for one packet: one that comes twice, or after its run is over, is refused and counted; so is one
    whose number has come before, whatever key it has, or that thousands of others have overtaken. Up to that the
    order in which packets come does not matter, since each is taken by its key, as the schedule has it.

    Args:
        fetch: of an `Arrival`: takes packets that have come and were not delivered.

    Attributes:
        refused: packets that were not taken.
    """

    def __init__(self, fetch: Fetch | None = None) -> None:
        self.refused = 0
        self._fetch = fetch
        self._lock = threading.Lock()
        self._slots: dict[Key, Future[Packet]] = {}
        self._taken: dict[int, set[Key]] = {}
        self._aborted: dict[int, str] = {}
        self._over: dict[int, None] = {}
        self._arrivals: defaultdict[str, Arrivals] = defaultdict(Arrivals)

    def arrival(self) -> Future[Any]:
        """A future of something that is made of packets."""
        return Arrival(self._fetch)

    def receive(self, key: Key) -> Future[Packet]:
        """The packet, now or when it comes."""
        with self._lock:
            slot = self._slot(key)
            if key.run in self._aborted and not slot.done():
                slot.set_exception(PipelineError(self._aborted[key.run]))
            return slot

    def _slot(self, key: Key) -> Future[Any]:
        """Of a packet that came or will."""
        if (slot := self._slots.get(key)) is None:
            slot = self._slots[key] = Arrival(self._fetch)
        return slot

    def deliver(self, key: Key, packet: Packet) -> None:
        """Puts a packet in its slot, or refuses it.

        Whoever takes it can tell when what is queued on the current streams by now is done.
        """
        packet = marked(packet)
        with self._lock:
            if packet.origin is not None and not self._arrivals[packet.origin[0]].take(packet.origin[1]):
                self.refused += 1
                return
            if key.run in self._aborted:
                return  # it was under way when the run was given up
            slot = self._slot(key)
            if key.run in self._over or slot.done() or key in self._taken.get(key.run, ()):
                self.refused += 1
                if not slot.done():
                    del self._slots[key]
                return
        slot.set_result(packet)

    def refuse(self, key: Key, reason: str) -> None:
        """What came is not what was sent: whoever waits for it gets an error."""
        with self._lock:
            self.refused += 1
            slot = self._slot(key)
        if not slot.done():
            slot.set_exception(PipelineError(reason))

    def forget(self, key: Key) -> None:
        """Drops a packet that has been used."""
        with self._lock:
            self._slots.pop(key, None)
            if key.run not in self._aborted:
                self._taken.setdefault(key.run, set()).add(key)

    def put_back(self, key: Key, packet: Packet) -> None:
        """Puts a packet that was taken into its slot again, for somebody else in this process."""
        with self._lock:
            self._taken.get(key.run, set()).discard(key)
        self.deliver(key, packet)

    def finish(self, run: int) -> None:
        """Nothing of this run may come any more."""
        with self._lock:
            self._end(run)
            for key in [key for key in self._slots if key.run == run]:
                del self._slots[key]

    def _end(self, run: int) -> None:
        self._taken.pop(run, None)
        self._over[run] = None
        if len(self._over) > _REMEMBERED_RUNS:
            del self._over[next(iter(self._over))]

    def abort(self, run: int, reason: str) -> None:
        """Whoever waits for a packet of this run gets an error at once."""
        with self._lock:
            self._aborted[run] = reason
            self._end(run)
            while len(self._aborted) > _REMEMBERED_RUNS:
                oldest = next(iter(self._aborted))
                del self._aborted[oldest]
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
    interface: str
    """The network interface by which other workers reach this one."""

    def send(self, to: str, key: Key, packet: Packet) -> Future[None]:
        """Delivers a packet to a worker's mailbox, in the background."""

    def send_all(self, to: str, packets: Sequence[tuple[Key, Packet]]) -> Future[None]:
        """The same for several packets at once: what each costs beside its bytes is then paid once."""

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

    def in_this_thread(self) -> Mapping[str, Any]:
        """The workers, if they are objects of this process; the caller's thread then does what they are told.

        From now on; nothing may be under way. Empty if they are processes of their own.
        """

    def lost(self, timeout_s: float) -> LostWorker | None:
        """A worker that is gone, or has been silent for longer than the time-out; None while all are there."""

    def restarted(self) -> Transport:
        """Ends all workers at once, and gives a transport that can start them again."""

    def close(self) -> None:
        """Ends all workers. Never hangs; may be called twice."""


def hand_over(outcome: Any, result: Future[Any]) -> None:
    """Sets the result of a command: what it returned, or what comes of the future that it returned."""
    if not isinstance(outcome, Future):
        result.set_result(outcome)
        return

    def copy(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            result.set_result(done.result())
        else:
            result.set_exception(error)

    outcome.add_done_callback(copy)


def wait_done(future: Future[Any], check: Callable[[], None], poll_s: float = 0.2) -> None:
    """Returns when the future is done; until then, `check` may raise to end the wait."""
    while not future.done():
        try:
            future.exception(poll_s)
        except (TimeoutError, CancelledError):
            check()


def wait(future: Future[Any], check: Callable[[], None]) -> Any:
    """The future's result, waited for as in `wait_done`."""
    wait_done(future, check)
    return future.result()
