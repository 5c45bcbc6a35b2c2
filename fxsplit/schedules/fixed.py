"""The schedules of the literature: their orders follow from stages and micro-batches alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

from fxsplit.errors import PlanError
from fxsplit.schedules.action import Action, Work, dealt
from fxsplit.schedules.base import Schedule
from fxsplit.schedules.listing import backward_first, list_schedule
from fxsplit.schedules.replicas import replica_counts, replicas_of, share_of
from fxsplit.schedules.times import Times


class GPipe(Schedule):
    """All forwards, then all backwards (Huang et al., GPipe, 2019, arXiv:1811.06965).

    A worker with several stages does all micro-batches of the first, then of the next.

    >>> [str(a) for a in GPipe().orders(["client"], 2, Times.unit(1))["client"]]
    ['F0.0', 'F0.1', 'B0.0', 'B0.1']
    """

    name: ClassVar[str] = "gpipe"

    def orders(self, workers: Sequence[str], chunks: int, times: Times) -> dict[str, list[Action]]:
        """Forwards by stage, then backwards by stage from the last one back."""
        self.check(workers, chunks)
        orders: dict[str, list[Action]] = {worker: [] for worker in workers}
        for stage, worker in enumerate(workers):
            orders[worker] += [Action(stage, m) for m in range(chunks)]
        for stage, worker in reversed(list(enumerate(workers))):
            orders[worker] += [Action(stage, m, Work.BACKWARD) for m in range(chunks)]
        return dealt(orders)


class _Limited(Schedule):
    """The schedules that keep no more micro-batches than there are stages left to the end."""

    def live_limit(self, stage: int, workers: Sequence[str], chunks: int) -> int:
        """As many as there are stages from this one on; of replicas, all count, and share (PipeDream, 3.3)."""
        own = len(replicas_of(workers[stage]))
        return min(share_of(sum(replica_counts(workers[stage:])), own), share_of(chunks, own))

    def check(self, workers: Sequence[str], chunks: int) -> None:
        """Refuses too few micro-batches, too: a pipeline of them would never be full."""
        super().check(workers, chunks)
        needed = sum(replica_counts(workers))
        if chunks < needed:
            raise PlanError(
                f"{self.name} has too few micro-batches to fill the pipeline",
                found=f"chunks={chunks}",
                allowed=f"at least {needed}, one for each stage{' and replica' * (needed > len(workers))}",
                hint="more chunks, or schedule='gpipe' or 'auto', which take any number",
            )


class OneForwardOneBackward(_Limited):
    """1F1B: one forward, one backward, in turns (Narayanan et al., PipeDream, 2019, arXiv:1806.03377).

    GPipe's step time with the memory of as many micro-batches as stages. Each worker has one stage.

    >>> [str(a) for a in OneForwardOneBackward().orders(["client", "server"], 3, Times.unit(2))["client"]]
    ['F0.0', 'F0.1', 'B0.0', 'F0.2', 'B0.1', 'B0.2']
    """

    name: ClassVar[str] = "1f1b"

    def check(self, workers: Sequence[str], chunks: int) -> None:
        """Refuses workers with several stages, too."""
        if len(set(workers)) < len(workers):
            raise PlanError(
                "1f1b is for workers with one stage each",
                found=", ".join(workers),
                allowed="another worker for each stage",
                hint="schedule='interleaved', which is 1f1b for workers with several stages",
            )
        super().check(workers, chunks)

    def orders(self, workers: Sequence[str], chunks: int, times: Times) -> dict[str, list[Action]]:
        """Forwards until the stage is full, then backward and forward in turns, then the backwards left."""
        self.check(workers, chunks)
        orders = {}
        for stage, worker in enumerate(workers):
            ahead = min(self.live_limit(stage, workers, chunks) * len(replicas_of(worker)), chunks)
            order = [Action(stage, m) for m in range(ahead)]
            for m in range(chunks):
                order.append(Action(stage, m, Work.BACKWARD))
                if ahead + m < chunks:
                    order.append(Action(stage, ahead + m))
            orders[worker] = order
        return dealt(orders)


class Interleaved(_Limited):
    """1F1B for workers with several stages (Narayanan et al., Megatron-LM, 2021, arXiv:2104.04473).

    A sandwich is one. Where the paper has a formula for stages dealt out in turn, this lets every worker do a
    backward if it can, else the forward of its deepest stage that can, as if all stages took equally long: that
    holds for any placement.
    """

    name: ClassVar[str] = "interleaved"

    def orders(self, workers: Sequence[str], chunks: int, times: Times) -> dict[str, list[Action]]:
        """1F1B's rule, in unit times."""
        self.check(workers, chunks)
        return _one_forward_one_backward(self, tuple(workers), chunks, False)


class ZeroBubble(_Limited):
    """Backwards in two parts: input gradients at once, weight gradients where the worker would be idle.

    ZB-H1 of Qi et al., Zero Bubble Pipeline Parallelism, 2023 (arXiv:2401.10241): 1F1B's memory, a third of its
    bubble. The memory of a micro-batch is freed when its weight gradients are done.
    """

    name: ClassVar[str] = "zero-bubble"

    def orders(self, workers: Sequence[str], chunks: int, times: Times) -> dict[str, list[Action]]:
        """1F1B's rule for forwards and input gradients; weight gradients when there is nothing else."""
        self.check(workers, chunks)
        return _one_forward_one_backward(self, tuple(workers), chunks, True)


def _one_forward_one_backward(
    schedule: Schedule, workers: tuple[str, ...], chunks: int, is_split: bool
) -> dict[str, list[Action]]:
    """1F1B's rule for any placement: backward first, no more micro-batches than the schedule keeps."""
    limits = tuple(schedule.live_limit(stage, workers, chunks) for stage in range(len(workers)))
    orders = _in_unit_times(workers, chunks, limits, is_split)
    return {worker: list(actions) for worker, actions in orders.items()}


@lru_cache(maxsize=256)  # a planner and `auto` ask again and again
def _in_unit_times(
    workers: tuple[str, ...], chunks: int, limits: tuple[int, ...], is_split: bool
) -> dict[str, list[Action]]:
    times = Times.unit(len(workers))
    return list_schedule(workers, chunks, times, backward_first, limits.__getitem__, is_split)
