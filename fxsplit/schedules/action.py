"""What schedules are made of: pieces of work, and the order in which each worker does its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from fxsplit.schedules.replicas import replica_for, single_workers


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


def dealt(orders: Orders) -> dict[str, list[Action]]:
    """The orders of stages' workers with those of replicated stages dealt to their replicas.

    What can be done in the order of the stage's worker can be done in this one: each replica's is a part of it.

    >>> {w: [str(a) for a in found] for w, found in dealt({"a+b": [Action(1, m) for m in range(3)]}).items()}
    {'a': ['F1.0', 'F1.2'], 'b': ['F1.1']}
    """
    found: dict[str, list[Action]] = {worker: [] for worker in single_workers(orders)}
    for worker, actions in orders.items():
        for action in actions:
            found[replica_for(worker, action.micro_batch)].append(action)
    return found
