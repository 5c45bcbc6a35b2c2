"""When work was done: on the CPU by its clock, on a GPU by events, since the host only queues it there.

What an event has measured is known when the GPU has come to it, and no run waits for that: its times are settled
with a later run, or when somebody asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch

from fxsplit.runtime.streams import indexed

CPU = torch.device("cpu")


@dataclass(frozen=True)
class GpuMoment:
    """A place in a GPU's work.

    Attributes:
        device: the GPU.
        stream: that was current.
        event: with timing, on that stream.
    """

    device: torch.device
    stream: torch.cuda.Stream
    event: torch.cuda.Event


Moment: TypeAlias = float | GpuMoment
"""Seconds by `time.perf_counter`, or what will tell them."""


def moment(device: torch.device) -> Moment:
    """Now; on a GPU: as soon as the work is done that is queued on its current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event, stream = torch.cuda.Event(enable_timing=True), torch.cuda.current_stream(device)
    event.record(stream)
    return GpuMoment(indexed(device), stream, event)


Item = TypeVar("Item")
Timed: TypeAlias = tuple[Item, float, float]
Untimed: TypeAlias = tuple[Item, GpuMoment, GpuMoment]


class Stopwatch(Generic[Item]):
    """Tells the times of moments on GPUs, run by run, in seconds of `time.perf_counter`.

    A GPU's clock is compared with the host's once, when both stand at the same event; from then on each run is
    timed from the end of the one before: an event knows the milliseconds since another in 24 bits.
    """

    def __init__(self) -> None:
        self._runs: deque[list[Untimed[Item]]] = deque()
        self._origins: dict[torch.device, tuple[torch.cuda.Event, float]] = {}

    def settle(self, run: Iterable[Untimed[Item]]) -> list[Timed[Item]]:
        """Takes a run, all of which is queued; returns the times of the first that is left, if it is done."""
        if items := list(run):
            self._runs.append(items)
        if self._runs and all(event.query() for event in _last_events(self._runs[0])):
            return self._timed(self._runs.popleft())
        return []

    def finish(self) -> list[Timed[Item]]:
        """The times of all that is left; waits for the GPUs."""
        found: list[Timed[Item]] = []
        while self._runs:
            for event in _last_events(self._runs[0]):
                event.synchronize()
            found += self._timed(self._runs.popleft())
        return found

    def _timed(self, run: list[Untimed[Item]]) -> list[Timed[Item]]:
        found = [(item, self._seconds(start), self._seconds(end)) for item, start, end in run]
        for (_, _, end), (_, _, end_s) in zip(run, found, strict=True):
            if end_s > self._origins[end.device][1]:
                self._origins[end.device] = end.event, end_s
        return found

    def _seconds(self, at: GpuMoment) -> float:
        if at.device not in self._origins:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(at.device))
            event.synchronize()
            self._origins[at.device] = event, time.perf_counter()
        event, seconds = self._origins[at.device]
        return seconds + float(event.elapsed_time(at.event)) / 1e3


def _last_events(run: Iterable[Untimed[Item]]) -> Iterable[torch.cuda.Event]:
    """Of each stream the last one: when it is done, so are those before."""
    return {end.stream: end.event for _, _, end in run}.values()
