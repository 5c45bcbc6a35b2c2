"""The schedule that is made for the times of the stages, codecs and links there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from fxsplit.errors import PlanError
from fxsplit.schedules.action import Action, Schedule
from fxsplit.schedules.fixed import GPipe, Interleaved, OneForwardOneBackward, ZeroBubble
from fxsplit.schedules.listing import backward_first, listed, longest_path_first
from fxsplit.schedules.simulation import Clock, replayed
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
            for orders, clock in _candidates(workers, chunks, times, is_split):
                price = clock.step_s * (1.0 + (WORTH_A_SPLIT if is_split else 0.0))
                found.append((price, clock.most_bytes, len(found), orders))
        best = min(price for price, *_ in found)
        as_fast = [entry for entry in found if entry[0] <= best * (1.0 + _SAME_TIME)]
        return min(as_fast, key=lambda entry: entry[1:3])[-1]


def _candidates(
    workers: Sequence[str], chunks: int, times: Times, is_split: bool
) -> Iterator[tuple[dict[str, list[Action]], Clock]]:
    priorities = (backward_first, longest_path_first(times))
    for priority in priorities:
        orders, clock = listed(workers, chunks, times, priority, is_split=is_split)
        # From several senders packets may come to a decoder in another order than they were listed in.
        yield orders, clock if len(set(workers)) < 3 else replayed(orders, workers, times)
    fixed: tuple[Schedule, ...] = (
        (ZeroBubble(),) if is_split else (GPipe(), OneForwardOneBackward(), Interleaved())
    )
    for schedule in fixed:
        try:
            orders = schedule.orders(workers, chunks, times)
        except PlanError:  # not for these workers and micro-batches
            continue
        yield orders, replayed(orders, workers, times)
