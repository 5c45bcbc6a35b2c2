"""What schedules are made of: pieces of work, and the order in which each worker does its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, TypeAlias

from fxsplit.errors import PlanError
from fxsplit.schedules.times import Times


class Work(StrEnum):
    """What is done with a micro-batch in a stage. A backward is whole, or in two parts."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    """The part of the backward that others wait for: the gradients of what came into the stage."""
    WEIGHT = "W"
    """The rest of it: the gradients of the parameters."""


_WORDS = {
    Work.FORWARD: "forward",
    Work.BACKWARD: "backward",
    Work.INPUT: "backward (input gradients)",
    Work.WEIGHT: "backward (weight gradients)",
}


@dataclass(frozen=True, order=True)
class Action:
    """One piece of work: a stage's forward, backward or part of a backward, of one micro-batch."""

    stage: int
    micro_batch: int
    work: Work = Work.FORWARD

    @property
    def kind(self) -> str:
        """For messages."""
        return _WORDS[self.work]

    @property
    def is_forward(self) -> bool:
        """Whether it is a forward."""
        return self.work is Work.FORWARD

    @property
    def sends_gradients(self) -> bool:
        """Whether its end is what the stage before waits for."""
        return self.work in (Work.BACKWARD, Work.INPUT)

    def __str__(self) -> str:
        return f"{self.work}{self.stage}.{self.micro_batch}"


Orders: TypeAlias = Mapping[str, Sequence[Action]]
"""The actions of each worker, in its order."""


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
            PlanError: the stages and micro-batches are not for this schedule.
        """

    def live_limit(self, stage: int, stage_count: int, chunks: int) -> int:
        """Micro-batches that a stage keeps activations of at one time, at most."""
        return chunks

    def check_chunks(self, stage_count: int, chunks: int) -> None:
        """Refuses a batch of too few micro-batches for this schedule: a pipeline of them would never be full.

        Raises:
            PlanError: always then.
        """
        if chunks < stage_count:
            raise PlanError(
                f"{self.name} has too few micro-batches to fill the pipeline",
                found=f"chunks={chunks}",
                allowed=f"at least {stage_count}, one for each stage",
                hint="more chunks, or schedule='gpipe' or 'auto', which take any number",
            )
