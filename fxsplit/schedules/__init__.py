"""Schedules: the order in which each worker does its work, as data, with no tensor in sight."""

from __future__ import annotations

from fxsplit.errors import PlanError
from fxsplit.schedules.action import Action, Orders, Work
from fxsplit.schedules.auto import Auto
from fxsplit.schedules.base import Schedule
from fxsplit.schedules.fixed import GPipe, Interleaved, OneForwardOneBackward, ZeroBubble
from fxsplit.schedules.simulation import Span, Timeline, check, simulate
from fxsplit.schedules.times import Hop, StageTimes, Times

__all__ = [
    "SCHEDULES",
    "Action",
    "Auto",
    "GPipe",
    "Hop",
    "Interleaved",
    "OneForwardOneBackward",
    "Orders",
    "Schedule",
    "Span",
    "StageTimes",
    "Timeline",
    "Times",
    "Work",
    "ZeroBubble",
    "check",
    "schedule",
    "simulate",
]

SCHEDULES: tuple[type[Schedule], ...] = (GPipe, OneForwardOneBackward, Interleaved, ZeroBubble, Auto)


def schedule(name: str) -> Schedule:
    """The schedule of a name.

    Raises:
        PlanError: there is none.
    """
    for kind in SCHEDULES:
        if kind.name == name:
            return kind()
    raise PlanError("unknown schedule", found=name, allowed=", ".join(kind.name for kind in SCHEDULES))
