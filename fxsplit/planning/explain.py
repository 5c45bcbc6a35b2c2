"""Why a plan is as it is: beside its neighbours, and what each line of the budget costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fxsplit.compressors import Lossless
from fxsplit.compressors.registry import compressors
from fxsplit.costs import CostTable
from fxsplit.planning.branches import MOST_NODES, Division, best_bipartition
from fxsplit.planning.budget import Budget
from fxsplit.planning.devices import parse_devices
from fxsplit.planning.links import Links
from fxsplit.planning.neighbours import LIMITS, Neighbour, neighbours
from fxsplit.planning.plan import Plan
from fxsplit.planning.planner import plan as make_plan
from fxsplit.planning.predict import Objective, forward_orders, moved_bytes
from fxsplit.planning.profile import Profile
from fxsplit.planning.render import Report
from fxsplit.planning.units import format_bytes, format_seconds
from fxsplit.schedules import schedule
from fxsplit.schedules.replicas import single_workers
from fxsplit.schedules.simulation import Timeline, simulate


def explain_plan(costs: CostTable, found: Plan, devices: Sequence[str], options: Mapping[str, Any]) -> Report:
    """Why a plan is as it is: a table of the plans next to it, and what each limit of its budget costs.

    Args:
        costs: of the model.
        found: the plan.
        devices: that it was asked for.
        options: of `fxsplit.plan`, by which it was made.
    """
    budget, profile = options.get("budget") or Budget(), options.get("profile")
    if found.moved:
        costs = costs.reordered(found.cut_names[0], found.moved)
    is_training = Objective(options.get("objective", "step")).is_training
    beside = neighbours(costs, found, budget=budget, profile=profile) if is_training else ()
    freed = {
        line: make_plan(costs, devices, **{**options, "budget": replace(budget, **{line: None})})
        for line in LIMITS
        if getattr(budget, line) is not None
    }
    made = explanation(found, beside, freed, is_training=is_training)
    is_free = is_training and not found.moved
    line = _branches(costs, found, devices, budget, profile) if is_free else ""
    return replace(made, footer="\n".join(filter(None, (made.footer, line))))


def _branches(
    costs: CostTable, found: Plan, devices: Sequence[str], budget: Budget, profile: Profile | None
) -> str:
    """What a division of the model's branches between two devices would take, if there are two."""
    placements = tuple(dict.fromkeys(parse_devices(devices)))
    if len(placements) != 2 or len(costs) > MOST_NODES or len(placements[1].replicas) > 1:
        return ""
    one, other = placements
    links = Links.of(budget, placements, None if profile is None else profile.links)
    cuts = max(len(found.cuts), 1)
    there, back = (
        tuple(dict.fromkeys((Lossless(), *compressors(spelling, cuts))))
        for spelling in (found.compressor, found.gradient_compressor)
    )
    best = best_bipartition(Division(costs, (one, other), links, profile or Profile(), there, back))
    if best.is_run:
        return ""
    step = format_seconds(best.step_s)
    return f"with its branches on either side (placement 'branches'), one micro-batch would take {step}"


def explanation(
    found: Plan, beside: Sequence[Neighbour], freed: Mapping[str, Plan], *, is_training: bool = True
) -> Report:
    """A table of a plan, its neighbours and its alternatives; below it, bubbles and what the budget's lines cost.

    Args:
        found: the plan.
        beside: its neighbours.
        freed: line of the budget -> the plan without it.
        is_training: whether the plan is for training; else its neighbours are none.
    """
    timeline = timeline_of(found, is_training=is_training)
    wire_bytes = moved_bytes(found.edges, is_training=is_training)
    rows = [_row("this plan", found, timeline, wire_bytes)]
    for each in beside:
        beside_it = timeline_of(each.plan)
        reasons = _change(each.plan.predicted_step_s, found), each.refusal or _because(beside_it, timeline)
        rows.append(_row(each.what, each.plan, beside_it, moved_bytes(each.plan.edges), *reasons))
    shown = {each.what for each in beside}
    for other in sorted(found.alternatives, key=lambda each: each.step_s):
        if other.what in shown:
            continue
        note = "" if other.keeps_budget else "breaks the budget"
        rows.append((other.what, format_seconds(other.step_s), _change(other.step_s, found), "", "", note))
    lines = [_bubbles(found, timeline), *(_cost(line, plan, found) for line, plan in freed.items())]
    what = "a step" if is_training else "a batch forward"
    title = f"why {', '.join(found.cut_names) or 'no cut'}: predicted seconds of {what}"
    return Report(
        title, ("plan", "step", "change", "busiest", "on wire", "because"), tuple(rows), "\n".join(lines)
    )


def timeline_of(found: Plan, *, is_training: bool = True) -> Timeline:
    """The predicted timeline of a training step, or of a batch forward; what the client gets back is not in it."""
    if is_training:
        orders = schedule(found.schedule).orders(found.workers, found.chunks, found.times)
    else:
        orders = forward_orders(found.workers, found.chunks)
    return simulate(orders, found.workers, found.times)


def busiest(timeline: Timeline) -> tuple[str, float]:
    """The resource that works longest in a timeline, and its share of it."""
    seconds = _loads(timeline)
    name = max(seconds, key=lambda resource: seconds[resource])
    return name, seconds[name] / timeline.step_s if timeline.step_s else 0.0


def _bubbles(found: Plan, timeline: Timeline, most: int = 8) -> str:
    """The share of the time in which each worker computes nothing; of many, those with the largest."""
    shares = {worker: timeline.bubble_share(worker) for worker in single_workers(found.workers)}
    named = [f"{worker} {share:.0%}" for worker, share in sorted(shares.items(), key=lambda each: -each[1])]
    return f"computes nothing for a share of that: {', '.join(named[:most])}{', ...' * (len(named) > most)}"


def _row(
    what: str, plan: Plan, timeline: Timeline, wire_bytes: int, change: str = "", because: str = ""
) -> tuple[str, ...]:
    resource, share = busiest(timeline)
    step = format_seconds(plan.predicted_step_s)
    return what, step, change, f"{resource} {share:.0%}", format_bytes(wire_bytes), because


def _because(timeline: Timeline, found: Timeline) -> str:
    """What changes most: a worker's computation or what a link carries."""
    before, after = _loads(found), _loads(timeline)
    changes = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**before, **after}}
    name = max(changes, key=lambda each: (abs(changes[each]), each))
    sign = "+" if changes[name] >= 0 else "-"
    return f"{name} {sign}{format_seconds(abs(changes[name]))}" if changes[name] else ""


def _loads(timeline: Timeline) -> dict[str, float]:
    """Seconds that each resource works."""
    return {span.resource: timeline.busy_s(span.resource) for span in timeline.spans}


def _change(step_s: float, found: Plan) -> str:
    if not found.predicted_step_s:
        return ""
    return f"{100 * (step_s / found.predicted_step_s - 1):+.0f} %"


def _cost(line: str, plan: Plan, found: Plan) -> str:
    saved = found.predicted_step_s - plan.predicted_step_s
    if saved <= 1e-9 * found.predicted_step_s:
        return f"budget line {line}: costs nothing"
    cuts = ", ".join(plan.cut_names) or f"all on {plan.devices[0]}"
    return (
        f"budget line {line}: costs {format_seconds(saved)} a step; without it {cuts}, {plan.chunks} micro-batches"
    )
