"""Numbers of packets: each sender counts what it sends to each receiver, and that knows which have come."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

LATEST = 4096
"""By how many packets one may be overtaken; of what comes later it is not known any more whether it is new."""


class Departures:
    """Counts the packets of one sender. Safe to use from several threads.

    Args:
        name: of the sender.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._sent: Counter[str] = Counter()
        self._lock = threading.Lock()

    def origin(self, to: str) -> tuple[str, int]:
        """The sender's name, and the number of its next packet to a receiver."""
        with self._lock:
            self._sent[to] += 1
            return self._name, self._sent[to]


@dataclass
class Arrivals:
    """The numbers 1, 2, 3... of one sender's packets, each good once; memory is bounded.

    Several threads send and receive, so packets may overtake each other; as in the window against replays of
    IPsec (RFC 4303, section 3.4.3) a number is refused if it has come, or is too far back.

    Attributes:
        complete: all numbers up to this one have come, or come too late.
        ahead: those beyond that have come.
    """

    complete: int = 0
    ahead: set[int] = field(default_factory=set)

    def take(self, number: int) -> bool:
        """Notes a number; says whether it is the first time."""
        if number <= self.complete or number in self.ahead:
            return False
        self.ahead.add(number)
        if len(self.ahead) > LATEST:
            self.complete = min(self.ahead) - 1
        while self.complete + 1 in self.ahead:
            self.complete += 1
            self.ahead.remove(self.complete)
        return True
