"""What schedules are made of: pieces of work, and the order in which each worker does its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


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
