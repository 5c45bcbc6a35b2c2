"""Bandwidth and latency of the links between this process and another, from messages there and back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fxsplit.planning.links import MEASURED, Link

_MESSAGES, _REPEATS = 20, 3
_FIRST_BYTES, _MOST_BYTES, _ENOUGH_S = 1 << 20, 1 << 26, 0.25


def measured(exchange: Callable[[Tensor, int], None]) -> tuple[Link, Link]:
    """The link to another worker, and the one from there.

    Args:
        exchange: sends a tensor there, and returns when so many bytes have come back.
    """
    nothing = torch.empty(0, dtype=torch.uint8)
    small = torch.zeros(1 << 10, dtype=torch.uint8)  # so that it goes as tensors go
    exchange(small, 1 << 10)
    round_trip_s = statistics.median(_seconds(lambda: exchange(small, 1 << 10)) for _ in range(_MESSAGES))
    there = _bytes_per_s(lambda count: exchange(torch.zeros(count, dtype=torch.uint8), 0), round_trip_s)
    back = _bytes_per_s(lambda count: exchange(nothing, count), round_trip_s)
    return Link(there, round_trip_s / 2, MEASURED), Link(back, round_trip_s / 2, MEASURED)


def _bytes_per_s(send: Callable[[int], None], round_trip_s: float) -> float:
    count = _FIRST_BYTES
    while (seconds := _seconds(partial(send, count))) < _ENOUGH_S and count < _MOST_BYTES:
        count *= 2
    found = [seconds, *(_seconds(partial(send, count)) for _ in range(_REPEATS - 1))]
    return count / max(statistics.median(found) - round_trip_s, 1e-9)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
