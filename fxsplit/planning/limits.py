"""What of a budget a plan breaks, and by how much."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fxsplit.costs import CostTable
from fxsplit.errors import BudgetError
from fxsplit.planning.budget import Budget
from fxsplit.planning.devices import Placement
from fxsplit.planning.draft import Draft
from fxsplit.planning.parts import edges_across
from fxsplit.planning.predict import link_bytes
from fxsplit.planning.units import format_bytes, format_macs, format_seconds

Amount = TypeVar("Amount", float, NDArray[np.float64])

STEP_TIME = "step_time"
"""The line of the budget that a plan's times break, and not its counts."""

TIME_SLACK = 1e-9
"""Relative excess of a time that still counts as none: sums of floats differ by their order."""


@dataclass(frozen=True)
class Violation:
    """One line of the budget that is broken.

    Attributes:
        line: the line and what it is about: 'memory of cuda'.
        found: what the plan takes.
        allowed: what the budget allows.
        excess: what is missing, relative to what is allowed: 0.1 is a tenth too much.
        show: turns an amount into text.
    """

    line: str
    found: float
    allowed: float
    excess: float
    show: Callable[[float], str]


def excess_of_count(found: Amount, allowed: int) -> Amount:
    """Excess of a count over its limit, relative to the limit (0 counts as 1); 0 or less where it is kept."""
    return (found - allowed) / max(allowed, 1)


def excess_of_time(found: Amount, allowed: float) -> Amount:
    """Excess of a time over its limit, relative to the limit; 0 or less where it is kept."""
    return found / allowed - (1.0 + TIME_SLACK)


def limits_by_position(costs: CostTable, budget: Budget) -> dict[int, int]:
    """The least limit of bytes over a cut, by its position: several modules may begin at one node."""
    limits: dict[int, int] = {}
    for name, limit in budget.cut_limits.items():
        position = costs.cut_points[name]
        limits[position] = min(limit, limits.get(position, limit))
    return limits


def link_limit(budget: Budget, placements: Sequence[Placement], sender: str, receiver: str) -> int | None:
    """Bytes of a batch allowed from one worker to another; None is no limit."""
    if not isinstance(budget.link_bytes, Mapping):
        return budget.link_limit
    names = (
        {
            name
            for p in placements
            if p.worker == worker
            for r in (p, *p.replicas)
            for name in (r.worker, r.spelling)
        }
        for worker in (sender, receiver)
    )
    return budget.limit_between(*names)


def violations(draft: Draft, costs: CostTable, budget: Budget) -> tuple[Violation, ...]:
    """The lines of the budget that a draft breaks, the worst first."""
    found: list[Violation] = []

    def check(line: str, amount: int, limit: int | None, show: Callable[[float], str]) -> None:
        if limit is not None and amount > limit:
            found.append(Violation(line, amount, limit, excess_of_count(float(amount), limit), show))

    macs: dict[str, int] = defaultdict(int)
    memory: dict[str, int] = defaultdict(int)
    for part in draft.parts:
        macs[part.device] += part.macs
        memory[part.device] += part.memory_bytes
    for device in macs:
        check(f"macs of {device}", macs[device], budget.macs_limit(device), format_macs)
        check(f"memory of {device}", memory[device], budget.memory_limit(device), format_bytes)
    sent = link_bytes(draft.edges, draft.workers, with_gradients=draft.is_training)
    for (sender, receiver), count in sent.items():
        limit = link_limit(budget, draft.placements, sender, receiver)
        check(f"link_bytes from {sender} to {receiver}", count, limit, format_bytes)
    cut_limits = limits_by_position(costs, budget) if budget.cut_limits else {}
    for stage, (name, position) in enumerate(zip(draft.names, draft.positions, strict=True), 1):
        if position in cut_limits:
            over = edges_across(stage, draft.edges, draft.workers)
            back = sum(e.gradient_wire_bytes for e in over) if draft.is_training else 0
            busier = max(sum(e.wire_bytes for e in over), back)
            check(f"link_bytes over the cut {name}", busier, cut_limits[position], format_bytes)
    allowed = budget.step_time_s
    if allowed is not None and (excess := excess_of_time(draft.outcome.seconds, allowed)) > 0:
        found.append(Violation(STEP_TIME, draft.outcome.seconds, allowed, excess, format_seconds))
    return tuple(sorted(found, key=lambda violation: -violation.excess))


def check_budget(
    draft: Draft, costs: CostTable, budget: Budget, *, searched: bool, is_proven: bool = True
) -> None:
    """Check a plan against the budget.

    Args:
        draft: the plan with the cuts that were given, or, if no plan satisfies, the one that comes nearest.
        costs: the table it was made from.
        budget: its limits.
        searched: whether the cuts were chosen here.
        is_proven: whether all that could satisfy it was looked at, then.

    Raises:
        BudgetError: naming the line that is missed by most, what was found and what is allowed.
    """
    broken = violations(draft, costs, budget)
    if not broken:
        return
    worst = broken[0]
    missed = f"{worst.show(worst.found - worst.allowed)} ({100 * worst.excess:.3g} %)"
    none = "no plan satisfies the budget" if is_proven else "no plan was found that satisfies the budget"
    subject = none if searched else "the plan breaks the budget"
    cuts = ", ".join(draft.names) or "none"
    codecs = dict.fromkeys(map(str, draft.codecs.all)) if draft.names else {}
    nearest_plan = f"on {', '.join(p.spelling for p in draft.placements)}, cuts: {cuts}, chunks: {draft.chunks}"
    nearest_plan += f", compressors: {', '.join(codecs)}" if codecs else ""
    others = f"; also broken: {', '.join(violation.line for violation in broken[1:])}" if broken[1:] else ""
    raise BudgetError(
        f"{subject}: {worst.line} is missed by {missed}{others}",
        where=f"nearest plan {nearest_plan}" if searched else f"cuts: {cuts}",
        found=worst.show(worst.found),
        allowed=worst.show(worst.allowed),
        hint="allow more there, compress more, use other devices, or other cuts",
    )
