"""The schedule that is made for the times of the stages, codecs and links there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import ClassVar

from fxsplit.errors import PlanError
from fxsplit.schedules.action import Action
from fxsplit.schedules.base import Schedule
from fxsplit.schedules.fixed import GPipe, Interleaved, OneForwardOneBackward, ZeroBubble
from fxsplit.schedules.listing import backward_first, listed, longest_path_first
from fxsplit.schedules.replicas import single_workers
from fxsplit.schedules.simulation import Clock, replayed
from fxsplit.schedules.times import Times

_SAME_TIME = 0.01


class Auto(Schedule):
    """The best by simulation of list schedules with these times, and of all fixed schedules.

    So it is not slower than any of them as far as the times hold. Of those that are as fast, the one that keeps
    the least is taken. The numbers of a step do not depend on what is chosen.
    """

    name: ClassVar[str] = "auto"
    follows_times: ClassVar[bool] = True

    def orders(self, workers: Sequence[str], chunks: int, times: Times) -> dict[str, list[Action]]:
        """The orders with the shortest simulated step."""
        return self._best(workers, chunks, times)[0]

    def simulated(self, workers: Sequence[str], chunks: int, times: Times, most_s: float = inf) -> Clock | None:
        """The simulation of its orders, without a second one of those that are chosen."""
        if most_s < inf and all(clock.is_late for _, clock in _candidates(workers, chunks, times, most_s)):
            return None
        return self._best(workers, chunks, times)[1]

    def _best(self, workers: Sequence[str], chunks: int, times: Times) -> tuple[dict[str, list[Action]], Clock]:
        self.check(workers, chunks)
        found: list[tuple[float, int, int, dict[str, list[Action]], Clock]] = []
        for orders, clock in _candidates(workers, chunks, times):
            found.append((clock.step_s, clock.most_bytes, len(found), orders, clock))
        best = min(step_s for step_s, *_ in found)
        as_fast = [entry for entry in found if entry[0] <= best * (1.0 + _SAME_TIME)]
        return min(as_fast, key=lambda entry: entry[1:3])[-2:]


def _candidates(
    workers: Sequence[str], chunks: int, times: Times, most_s: float = inf
) -> Iterator[tuple[dict[str, list[Action]], Clock]]:
    """Orders, with whole backwards and with those in two parts, and their simulation."""
    priorities = (backward_first, longest_path_first(times))
    for is_split in (False, True):
        for priority in priorities:
            orders, clock = listed(workers, chunks, times, priority, is_split=is_split, most_s=most_s)
            if not clock.is_late and len(single_workers(workers)) > 2:
                # From several senders packets may come to a decoder in another order than they were listed in.
                clock = replayed(orders, workers, times, chunks, most_s)
            yield orders, clock
        fixed: tuple[Schedule, ...] = (
            (ZeroBubble(),) if is_split else (GPipe(), OneForwardOneBackward(), Interleaved())
        )
        for schedule in fixed:
            try:
                orders = schedule.orders(workers, chunks, times)
            except PlanError:  # not for these workers and micro-batches
                continue
            yield orders, replayed(orders, workers, times, chunks, most_s)
