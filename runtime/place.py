"""What a worker is at, in a page of memory that it shares with the client: known even of one that was killed."""

from __future__ import annotations

import mmap
import os
import struct
import sys
import tempfile
import zlib
from typing import Any, NamedTuple


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

_BODY = struct.Struct("<Qqq36s")  # number of the note, stage, micro-batch, work
_CHECKSUM = struct.Struct("<I")
_SLOT_BYTES = _CHECKSUM.size + _BODY.size
_NONE = -1


class PlacePage:
    """Notes of places, one writer's and one reader's, who are two processes with the same memory.

    There are two slots, written in turns, each with a number that grows and a checksum. Whoever dies while it
    writes one leaves the other whole, and what is read while it is written is told from what is whole. No system
    call is made.

    Args:
        descriptor: of memory or a file of at least `BYTES`; the caller closes it.
    """

    BYTES = 2 * _SLOT_BYTES

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, self.BYTES)
        self._number = 0

    def write(self, place: Place) -> None:
        """Notes a place."""
        self._number += 1
        work, stage, micro_batch = place
        body = _BODY.pack(
            self._number,
            _NONE if stage is None else stage,
            _NONE if micro_batch is None else micro_batch,
            work.encode(),
        )
        start = self._number % 2 * _SLOT_BYTES
        self._memory[start : start + _SLOT_BYTES] = _CHECKSUM.pack(zlib.crc32(body)) + body

    def read(self) -> Place | None:
        """The last place that was noted; None if none was."""
        data = self._memory[:]
        last, place = 0, None
        for start in (0, _SLOT_BYTES):
            body = data[start + _CHECKSUM.size : start + _SLOT_BYTES]
            number, stage, micro_batch, work = _BODY.unpack(body)
            if number > last and _CHECKSUM.unpack_from(data, start) == (zlib.crc32(body),):
                numbers = (None if n == _NONE else n for n in (stage, micro_batch))
                last, place = number, Place(work.rstrip(b"\0").decode(errors="replace"), *numbers)
        return place

    def close(self) -> None:
        """Lets go of the memory."""
        self._memory.close()


def new_memory() -> int:
    """A descriptor of memory for a page, without a name in any folder; the caller closes it."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("fxsplit-place")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, PlacePage.BYTES)
    return descriptor
