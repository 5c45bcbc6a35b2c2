"""Worker processes of this process, from the system's own table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Set
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")

SOON_S = 20.0
"""Longer than what is done at once takes on a busy machine; shorter than the time-out of 30 s that ends a wait."""


def abandoned_shared_memory(before: Set[Path]) -> list[str]:
    """Files of shared memory that were not there before, and that no living process has: somebody left them."""
    new, used = set(SHARED_MEMORY.glob("*")) - before, set[str]()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            maps = (folder / "maps").read_text().splitlines()
            used |= {line.split(maxsplit=5)[5] for line in maps if str(SHARED_MEMORY) in line}
            used |= {os.readlink(link) for link in (folder / "fd").iterdir()}
    return [str(path) for path in new if str(path) not in used and path.exists()]


def worker_processes() -> list[int]:
    """Process ids of the fxsplit workers that this process has started and that are not gone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"fxsplit.runtime.worker_main" in command and parent == os.getpid():
            found.append(int(folder.name))
    return found
