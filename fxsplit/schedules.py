"""Schedules: the order in which each worker does its work, as data, with no tensor in sight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fxsplit.errors import PlanError


@dataclass(frozen=True, order=True)
class Action:
    """One piece of work: a stage's forward or backward of one micro-batch."""

    stage: int
    micro_batch: int
    backward: bool = False

    @property
    def kind(self) -> str:
        """For messages."""
        return "backward" if self.backward else "forward"

    def __str__(self) -> str:
        return f"{'B' if self.backward else 'F'}{self.stage}.{self.micro_batch}"


class Schedule(ABC):
    """Orders the actions of a step."""

    name: ClassVar[str]

    @abstractmethod
    def actions(self, stages: Sequence[int], stage_count: int, chunks: int) -> list[Action]:
        """The actions of the worker that holds `stages`, in its order."""


class GPipe(Schedule):
    """All forwards, then all backwards (Huang et al., GPipe, 2019).

    A worker with several stages does all micro-batches of the first, then of the next. Backwards run in the
    order of the micro-batches, so that gradients are summed in the order of a plain accumulation loop, bit for
    bit.

    >>> [str(a) for a in GPipe().actions([0], 1, 2)]
    ['F0.0', 'F0.1', 'B0.0', 'B0.1']
    """

    name: ClassVar[str] = "gpipe"

    def actions(self, stages: Sequence[int], stage_count: int, chunks: int) -> list[Action]:
        """Forwards by stage, then backwards by stage from the last one back."""
        forwards = [Action(s, m) for s in sorted(stages) for m in range(chunks)]
        backwards = [Action(s, m, backward=True) for s in sorted(stages, reverse=True) for m in range(chunks)]
        return forwards + backwards


SCHEDULES: tuple[type[Schedule], ...] = (GPipe,)


def schedule(name: str) -> Schedule:
    """The schedule of a name.

    Raises:
        PlanError: there is none.
    """
    for kind in SCHEDULES:
        if kind.name == name:
            return kind()
    raise PlanError("unknown schedule", found=name, allowed=", ".join(kind.name for kind in SCHEDULES))
