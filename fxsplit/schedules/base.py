"""What every schedule is: the orders of its workers, and what their simulation says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf
from typing import ClassVar

from fxsplit.schedules.action import Action
from fxsplit.schedules.replicas import check_replicas, replicas_of, share_of
from fxsplit.schedules.simulation import Clock, replayed
from fxsplit.schedules.times import Times


class Schedule(ABC):
    """Orders the actions of a training step.

    Every schedule does the forwards of a stage in the order of the micro-batches, and its backwards, and its
    weight gradients: so sums of gradients are rounded as in a plain accumulation loop, whatever the schedule.
    """

    name: ClassVar[str]
    follows_times: ClassVar[bool] = False
    """Whether the orders depend on `times`."""

    @abstractmethod
    def orders(self, workers: Sequence[str], chunks: int, times: Times) -> dict[str, list[Action]]:
        """What each worker does.

        Args:
            workers: the worker of each stage, in the order of the stages.
            chunks: micro-batches of the batch.
            times: what the work of a micro-batch takes.

        Raises:
            PlanError: the stages and micro-batches are not for this schedule, as `check` says.
        """

    def simulated(self, workers: Sequence[str], chunks: int, times: Times, most_s: float = inf) -> Clock | None:
        """The simulation of its orders, at its end; None if the step is seen not to be below `most_s`.

        Raises:
            PlanError: as `orders`.
        """
        clock = replayed(self.orders(workers, chunks, times), workers, times, chunks, most_s)
        return None if clock.is_late else clock

    def live_limit(self, stage: int, workers: Sequence[str], chunks: int) -> int:
        """Micro-batches that a stage, or each replica of it, keeps activations of at one time, at most."""
        return share_of(chunks, len(replicas_of(workers[stage])))

    def check(self, workers: Sequence[str], chunks: int) -> None:
        """Refuses stages and micro-batches that this schedule is not for, before any order is made.

        Raises:
            PlanError: always then.
        """
        check_replicas(workers, chunks)
