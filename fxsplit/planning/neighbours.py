"""The plans next to a plan: one cut moved by a place, other micro-batches, another compressor."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxsplit.compressors.registry import Asked
from fxsplit.costs import CostTable
from fxsplit.errors import FxsplitError
from fxsplit.planning.budget import Budget
from fxsplit.planning.draft import outermost
from fxsplit.planning.plan import Plan
from fxsplit.planning.planner import plan as make_plan
from fxsplit.planning.profile import Profile

LIMITS = ("macs", "memory", "link_bytes", "step_time")
"""The lines of a budget that limit; the others are assumptions."""


@dataclass(frozen=True)
class Neighbour:
    """A plan that differs in one choice.

    Attributes:
        what: the difference.
        plan: it, whatever it breaks of the budget.
        refusal: what it breaks, or None.
    """

    what: str
    plan: Plan
    refusal: str | None


def neighbours(
    costs: CostTable, found: Plan, *, budget: Budget | None = None, profile: Profile | None = None
) -> tuple[Neighbour, ...]:
    """The plans next to one, those that are predicted to be faster first.

    Args:
        costs: that it was made from.
        found: a plan for the objective 'step'.
        budget: that it was made under.
        profile: that it was predicted with.
    """
    given = Budget() if budget is None else budget
    made = []
    for what, changed in _changes(costs, found):
        options: dict[str, Any] = {
            "cuts": found.cut_names,
            "compressor": found.compressor,
            "gradient_compressor": found.gradient_compressor,
            "chunks": found.chunks,
            "schedule": found.schedule,
            "optimizer": found.optimizer,
            "profile": profile,
            **changed,
        }
        free = replace(given, **dict.fromkeys(LIMITS))
        try:
            plan = make_plan(costs, found.devices, **options, budget=free)
        except FxsplitError:  # not for this schedule, or nothing that this compressor takes
            continue
        made.append(Neighbour(what, plan, _refusal(costs, plan, options, given)))
    return tuple(sorted(made, key=lambda each: each.plan.predicted_step_s))


def _refusal(costs: CostTable, plan: Plan, options: dict[str, Any], budget: Budget) -> str | None:
    if all(getattr(budget, line) is None for line in LIMITS):
        return None
    try:
        make_plan(costs, plan.devices, **options, budget=budget)
    except FxsplitError as error:
        return error.what
    return None


def _changes(costs: CostTable, found: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    places = sorted({position for position in costs.cut_points.values() if position > 0})
    positions = [costs.cut_points[name] for name in found.cut_names]
    for cut, position in enumerate(positions):
        for step, word in ((-1, "earlier"), (1, "later")):
            index = bisect_left(places, position) + step
            if not 0 <= index < len(places) or places[index] in positions or position == 0:
                continue
            names = _names(costs, [*positions[:cut], places[index], *positions[cut + 1 :]])
            yield f"cut {found.cut_names[cut]} {word}, at {names[cut]}", {"cuts": names}
    if not positions:
        return
    for chunks in (found.chunks // 2, found.chunks * 2):
        if 1 <= chunks <= costs.batch_size:
            yield f"{chunks} micro-batches", {"chunks": chunks}
    if found.codecs.edges:
        yield "one compressor for each cut", {}
    present = {found.compressor, found.gradient_compressor}
    others: dict[str, Asked] = {"no compression": "none", "uniform8": "uniform8", "sortquant8": "sortquant8"}
    for what, codec in others.items():
        if present != {codec}:
            yield what, {"compressor": codec, "gradient_compressor": "same"}


def _names(costs: CostTable, positions: Sequence[int]) -> list[str]:
    return [outermost(costs, position) for position in positions]
