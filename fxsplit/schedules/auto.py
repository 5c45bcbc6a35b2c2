"""The schedule that is made for the times of the stages, codecs and links there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from fxsplit.errors import PlanError
from fxsplit.schedules.action import Action, Schedule
from fxsplit.schedules.fixed import GPipe, Interleaved, OneForwardOneBackward, ZeroBubble
from fxsplit.schedules.listing import backward_first, list_schedule, longest_path_first
from fxsplit.schedules.simulation import simulate
from fxsplit.schedules.times import Times

WORTH_A_SPLIT = 0.1
"""A backward in two parts takes longer than a whole one: it has to save at least this share of the step."""

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
        found: list[tuple[float, int, int, dict[str, list[Action]]]] = []
        for is_split in (False, True):
            for orders in _candidates(workers, chunks, times, is_split):
                timeline = simulate(orders, workers, times)
                price = timeline.step_s * (1.0 + (WORTH_A_SPLIT if is_split else 0.0))
                found.append((price, sum(timeline.live_bytes.values()), len(found), orders))
        best = min(price for price, *_ in found)
        as_fast = [entry for entry in found if entry[0] <= best * (1.0 + _SAME_TIME)]
        return min(as_fast, key=lambda entry: entry[1:3])[-1]


def _candidates(
    workers: Sequence[str], chunks: int, times: Times, is_split: bool
) -> Iterator[dict[str, list[Action]]]:
    priorities = (backward_first, longest_path_first(times))
    for priority in priorities:
        yield list_schedule(workers, chunks, times, priority, is_split=is_split)
    fixed: tuple[Schedule, ...] = (
        (ZeroBubble(),) if is_split else (GPipe(), OneForwardOneBackward(), Interleaved())
    )
    for schedule in fixed:
        try:
            yield schedule.orders(workers, chunks, times)
        except PlanError:  # not for these workers and micro-batches
            continue
