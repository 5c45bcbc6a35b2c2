"""Worker processes of this process, from the system's own table."""

from __future__ import annotations

import os
from pathlib import Path

SOON_S = 20.0
"""Longer than what is done at once takes on a busy machine; shorter than the time-out of 30 s that ends a wait."""


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
