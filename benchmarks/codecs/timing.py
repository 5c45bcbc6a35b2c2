"""Seconds of calls on a CPU or on a GPU, and the memory that they take their results from."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FRESH, RECYCLED = "fresh", "recycled"
"""Where results are: in memory that the system hands out anew, or in memory that was used before."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_SMALL, _NEVER, _MANY = 1 << 16, (1 << 31) - 1, 1 << 16


def regimes(device: torch.device) -> tuple[str, ...]:
    """Those that can be told apart: on a GPU torch recycles memory, and on a CPU it takes glibc to choose."""
    return (FRESH, RECYCLED) if device.type == "cpu" and _mallopt() is not None else (RECYCLED,)


@contextmanager
def regime(name: str, device: torch.device) -> Iterator[None]:
    """On a CPU, large allocations are fresh, or recycled, while this is open; fresh afterwards.

    The pages of fresh memory are made by the system when they are first written. malloc left alone does the
    one or the other, depending on what was freed before.
    """
    mallopt = _mallopt() if device.type == "cpu" else None
    if mallopt is None:
        yield
        return
    try:
        mallopt(_MMAP_MAX, _MANY if name == FRESH else 0)
        mallopt(_MMAP_THRESHOLD, _SMALL)
        mallopt(_TRIM_THRESHOLD, _SMALL if name == FRESH else _NEVER)
        yield
    finally:
        mallopt(_MMAP_MAX, _MANY)
        mallopt(_TRIM_THRESHOLD, _SMALL)
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> Callable[[int, int], int] | None:
    found: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return found


def on_one_core() -> None:
    """From here on this process, its threads and its children have one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def seconds(function: Callable[[Any], Any], inputs: Sequence[Any], device: torch.device) -> float:
    """Of one call, the mean over the inputs, which follow each other without a pause.

    The results are kept until all are done, so that no two calls read or write the same memory. On a GPU it is
    the time between two events in its stream, waiting for the host included.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        results = [function(x) for x in inputs]
        taken = time.perf_counter() - start
    else:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        results = [function(x) for x in inputs]
        end.record()
        torch.cuda.synchronize(device)
        taken = begin.elapsed_time(end) / 1000
    del results
    return taken / len(inputs)


def extra_bytes(function: Callable[[Any], Any], argument: Any, result_bytes: int, device: torch.device) -> int:
    """What a call took beyond its argument and its result at the moment that it took most.

    On a GPU by torch's own count. On a CPU resident memory, as the Linux kernel counts it, with large
    allocations fresh: exact to some hundred kilobytes.
    """
    if device.type == "cpu":
        return _extra_resident_bytes(function, argument, result_bytes)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function(argument)
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device)
    del result
    return max(0, most - before - result_bytes)


def _extra_resident_bytes(function: Callable[[Any], Any], argument: Any, result_bytes: int) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is still resident would hide the peak
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = _status_bytes("VmRSS")
    result = function(argument)
    most = _status_bytes("VmHWM")
    del result
    return max(0, most - before - result_bytes)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
