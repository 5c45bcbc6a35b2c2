"""Signs of life: a worker says once a second what it is at, and notes it at each action; the client listens."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator

from fxsplit.runtime.place import IDLE, Place, PlacePage, new_memory

PERIOD_S = 1.0
"""Between two signs of life of a worker that has nothing else to say."""

_LISTEN_S = 0.5
_LIMIT_BYTES = 4096


class Pulse:
    """A worker's side.

    Args:
        send: gives a place to the client; raises OSError when there is none.
        page: where each action is noted as it begins, if the client sees that.
    """

    def __init__(self, send: Callable[[Place], None] = lambda place: None, page: PlacePage | None = None) -> None:
        self._send = send
        self._page = page
        self._place = IDLE

    @classmethod
    def of_descriptors(cls, line: int, page: int) -> Pulse:
        """Over the socket and the memory that the client has left to this process; without them, says nothing."""
        if line < 0:
            return cls()
        connection = socket.socket(fileno=line)
        os.set_inheritable(line, False)
        connection.setblocking(False)
        return cls(lambda place: _send_datagram(connection, place), page_of(page))

    def start(self) -> None:
        """Begins to say that this process lives."""
        threading.Thread(target=self._beat, name="fxsplit pulse", daemon=True).start()

    def at(self, place: Place) -> None:
        """Notes what this worker is at."""
        self._place = place
        if self._page is not None:
            self._page.write(place)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._send(self._place)
                time.sleep(PERIOD_S)


def page_of(descriptor: int) -> PlacePage | None:
    """The page whose memory the client has left to this process, if it has; the descriptor is closed."""
    if descriptor < 0:
        return None
    page = PlacePage(descriptor)
    os.close(descriptor)
    return page


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
        self._pages: dict[str, PlacePage] = {}
        self._now_s = time.monotonic()
        self._is_closed = threading.Event()

    @contextlib.contextmanager
    def line_to(self, name: str) -> Iterator[tuple[int, int]]:
        """Descriptors that the process of this worker inherits: a socket's, and that of the memory of a page."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        self._sockets[name] = ours
        with theirs, self.page_for(name) as page:
            yield theirs.fileno(), page

    @contextlib.contextmanager
    def page_for(self, name: str) -> Iterator[int]:
        """The descriptor of the memory of a page alone: for a worker that says that it lives in another way."""
        memory = new_memory()
        try:
            self._pages[name] = PlacePage(memory)
            yield memory
        finally:
            os.close(memory)

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
        """What a worker is at, or was when it died; of one on another host, when it was last heard of."""
        with self._lock:
            noted = self._pages[name].read() if name in self._pages else None
            return noted or self._places.get(name)

    def close(self) -> None:
        """Ends listening. Places that were heard of are still known."""
        self._is_closed.set()
        with self._lock:
            for name, page in self._pages.items():
                if (place := page.read()) is not None:
                    self._places[name] = place
                page.close()
            self._pages.clear()

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
