"""Signs of life: a worker says once a second, and at each action, what it is at; the client listens."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PERIOD_S = 1.0
"""Between two signs of life of a worker that has nothing else to say."""

_LISTEN_S = 0.5
_LIMIT_BYTES = 4096


class Place(NamedTuple):
    """What a worker is at.

    Attributes:
        work: "forward", "backward"..., or the name of a command; "idle" between commands.
        stage: if it is an action of a schedule.
        micro_batch: the same.
    """

    work: str
    stage: int | None = None
    micro_batch: int | None = None

    def __str__(self) -> str:
        if self.stage is None:
            return self.work
        return f"{self.work} of stage {self.stage}, micro-batch {self.micro_batch}"

    @classmethod
    def of_message(cls, message: Any) -> Place:
        """The place that a worker has named; "unknown" if this is none."""
        if isinstance(message, list) and len(message) == 3 and isinstance(message[0], str):
            numbers = [n if isinstance(n, int) and not isinstance(n, bool) else None for n in message[1:]]
            return cls(message[0][:200], *numbers)
        return cls("unknown")


IDLE = Place("idle")


class Pulse:
    """A worker's side.

    Args:
        send: gives a place to the client; raises OSError when there is none.
        at_once: whether sending never waits, so that each action can be said as it begins.
    """

    def __init__(self, send: Callable[[Place], None] = lambda place: None, at_once: bool = False) -> None:
        self._send = send
        self._at_once = at_once
        self._place = IDLE

    @classmethod
    def of_descriptor(cls, descriptor: int) -> Pulse:
        """Over the socket that the client has left to this process; without one, says nothing."""
        if descriptor < 0:
            return cls()
        connection = socket.socket(fileno=descriptor)
        os.set_inheritable(descriptor, False)
        connection.setblocking(False)
        return cls(lambda place: _send_datagram(connection, place), at_once=True)

    def start(self) -> None:
        """Begins to say that this process lives."""
        threading.Thread(target=self._beat, name="fxsplit pulse", daemon=True).start()

    def at(self, place: Place) -> None:
        """Notes what this worker is at."""
        self._place = place
        if self._at_once:
            self._send(place)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._send(self._place)
                time.sleep(PERIOD_S)


def _send_datagram(connection: socket.socket, place: Place) -> None:
    # A full buffer means that the client has not read for long: it misses nothing but old places.
    with contextlib.suppress(BlockingIOError, ConnectionError):
        connection.send(json.dumps(place).encode())


class Heartbeats:
    """The client's side: when each worker was heard of, and what it was at. Safe to use from several threads.

    Silence is measured by the clock of the thread that listens: while this process is stopped, or the machine
    asleep, nobody is silent; and a change of the system's time changes nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heard_s: dict[str, float] = {}
        self._places: dict[str, Place] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._now_s = time.monotonic()
        self._is_closed = threading.Event()

    def socket_for(self, name: str) -> socket.socket:
        """A socket that the process of this worker inherits; the caller closes its copy."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        self._sockets[name] = ours
        return theirs

    def begin(self, names: tuple[str, ...]) -> None:
        """Begins to listen: from now on these workers may not be silent."""
        with self._lock:
            self._now_s = time.monotonic()
            self._heard_s = dict.fromkeys(names, self._now_s)
        threading.Thread(target=self._listen, name="fxsplit heartbeats", daemon=True).start()

    def heard(self, name: str, place: Place) -> None:
        """A worker has said what it is at."""
        with self._lock:
            self._places[name] = place
            if name in self._heard_s:
                self._heard_s[name] = time.monotonic()

    def silent(self, timeout_s: float) -> tuple[str, float] | None:
        """The worker that has said nothing for longest, if that is longer than this, and for how many seconds."""
        with self._lock:
            if not self._heard_s:
                return None
            name = min(self._heard_s, key=lambda worker: self._heard_s[worker])
            silence_s = self._now_s - self._heard_s[name]
            return (name, silence_s) if silence_s > timeout_s else None

    def place(self, name: str) -> Place | None:
        """What a worker was at when it was last heard of."""
        if (connection := self._sockets.get(name)) is not None:
            self._read(name, connection)
        with self._lock:
            return self._places.get(name)

    def close(self) -> None:
        """Ends listening."""
        self._is_closed.set()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for name, connection in self._sockets.items():
                selector.register(connection, selectors.EVENT_READ, name)
            while not self._is_closed.is_set():
                started_s = time.monotonic()
                ready = selector.select(_LISTEN_S) if self._sockets else self._is_closed.wait(_LISTEN_S) and []
                for key, _ in ready or []:
                    self._read(key.data, self._sockets[key.data])
                self._tick(time.monotonic(), started_s)
        for connection in self._sockets.values():
            connection.close()

    def _tick(self, now_s: float, before_s: float) -> None:
        with self._lock:
            self._now_s = now_s
            if now_s - before_s > 4 * _LISTEN_S:  # this process did not run: nobody could be heard
                self._heard_s = dict.fromkeys(self._heard_s, now_s)

    def _read(self, name: str, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := connection.recv(_LIMIT_BYTES):
                self.heard(name, Place.of_message(json.loads(data)))
