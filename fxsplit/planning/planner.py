"""The planner: from what a model costs and the devices there are to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from fxsplit.compressors import Compressor
from fxsplit.compressors.registry import Asked, spelling_of
from fxsplit.costs import CostTable
from fxsplit.errors import BudgetError, PlanError, nearest
from fxsplit.planning.alternatives import alternatives
from fxsplit.planning.branches import MOST_NODES, Division, best_bipartition
from fxsplit.planning.budget import Budget
from fxsplit.planning.devices import parse_devices
from fxsplit.planning.draft import Draft, outermost
from fxsplit.planning.forecast import PlannedLink, hops_of
from fxsplit.planning.guard import Guard
from fxsplit.planning.limits import check_budget, violations
from fxsplit.planning.links import Links
from fxsplit.planning.long_search import LongSearch
from fxsplit.planning.parts import Cut, edges_across
from fxsplit.planning.plan import SCHEDULES, Plan
from fxsplit.planning.predict import OBJECTIVES, Objective, link_bytes
from fxsplit.planning.problem import Problem
from fxsplit.planning.profile import MACS_PER_S, Profile
from fxsplit.planning.search import EXACT_CELLS, SAME, Choice, Search
from fxsplit.planning.stages import AUTO, Codecs
from fxsplit.planning.units import format_bytes, format_macs, format_seconds
from fxsplit.schedules.replicas import replicas_of

CHUNKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""The numbers of micro-batches that `chunks="auto"` chooses from, as far as there are samples."""

OPTIMIZERS: Mapping[str, int] = {"sgd": 0, "momentum": 1, "adam": 2}
"""Kinds of optimizers -> tensors that they keep for each parameter."""

GIVEN, BRANCHES = "given", "branches"
"""Placements: every device of the list gets a stage; of two, each may get any branches of the model."""


def plan(
    costs: CostTable,
    devices: Sequence[str],
    *,
    cuts: Sequence[str] | None = None,
    compressor: Asked = None,
    gradient_compressor: Asked = AUTO,
    chunks: int | str = 1,
    schedule: str = "gpipe",
    budget: Budget | None = None,
    placement: str = GIVEN,
    objective: str = "step",
    price: dict[str, float] | None = None,
    guard: Guard | None = None,
    profile: Profile | None = None,
    optimizer: str = "adam",
) -> Plan:
    """Place the stages of a model on devices.

    Args:
        costs: what the model costs, for one batch.
        devices: the device of each stage, the client's first: 'cpu', 'cuda:0', 'worker/cuda:0'.
        cuts: names of the modules at whose first call a new stage begins, one fewer than devices, in any
            order; before the model's first module the client computes nothing; None chooses the best (see
            `fxsplit.planning.predict`).
        compressor: what compresses the activations between workers, one for all cuts or a list of one for each;
            None is none; 'auto' chooses for each cut what is fastest of what the guard allows.
        gradient_compressor: what compresses their gradients; 'auto' is what the activations' compressor wants
            for gradients, or is chosen if that is, 'same' is the same, None is none.
        chunks: micro-batches of a batch; 'auto' chooses.
        schedule: name of the pipeline schedule.
        budget: limits of the plan, and assumptions about the links.
        placement: 'given', every device of the list gets a stage; or 'auto', all but the client's may be left out,
            and the client may send the model's inputs as they are and compute nothing; or 'branches', for two
            devices: as 'auto', and the model's branches may go to either side (a minimum cut, exact for one
            micro-batch without a budget), where that is faster than any cut of its own order.
        objective: what is minimised: 'step', seconds of a training step; 'latency', of an inference batch;
            'throughput', of an inference batch in a steady stream of them; 'price', the price of a training step.
        price: device as written -> price of an hour, for the objective 'price'.
        guard: what `compressor='auto'` may choose from.
        profile: measured speeds; what is not in it is estimated.
        optimizer: kind of optimizer whose state counts as memory: 'sgd' keeps nothing for a parameter,
            'momentum' one tensor, 'adam' two.

    Returns:
        The plan. It is optimal if it says so; otherwise it states how far from optimal it can be.

    Raises:
        PlanError: cuts, devices, chunks and schedule do not fit the model or each other.
        BudgetError: no plan satisfies the budget, or the one with these cuts does not.
        DeviceError: an entry of `devices` is not a device.
        CompressorError: an unknown compressor.
    """
    placements = parse_devices(devices)
    check_choices(schedule, placement, objective, optimizer)
    budget = Budget() if budget is None else budget
    if not isinstance(budget, Budget):
        raise BudgetError("budget is not a Budget", found=repr(budget), allowed="fxsplit.Budget(...)")
    ends = [end for p in placements for r in (p, *p.replicas) for end in (r.worker, r.spelling)]
    budget.check_names(devices, list(dict.fromkeys(ends)), costs.cut_points)
    names = None if cuts is None else _ordered(costs, cuts, len(placements))
    there, back = _codecs(compressor, gradient_compressor, len(placements) - 1, guard or Guard())
    is_pair = len(placements) == 2 and not placements[1].is_client and len(placements[1].replicas) == 1
    if placement == BRANCHES and not (is_pair and names is None):
        found = f"{len(cuts)} cuts" if cuts is not None else ", ".join(devices)
        raise PlanError("branches are divided between two workers", found=found, allowed="two, and no cuts given")
    problem = Problem(
        costs,
        placements,
        there,
        back,
        Links.of(budget, placements, None if profile is None else profile.links),
        _chunks(chunks, costs.batch_size),
        budget,
        schedule,
        _objective(objective, price, devices),
        Profile() if profile is None else profile,
        placement in (AUTO, BRANCHES) and cuts is None,
        None if names is None else tuple(costs.cut_points[name] for name in names),
        OPTIMIZERS[optimizer],
    )
    _check_places(problem)
    choice = (Search(problem) if problem.is_small(EXACT_CELLS) else LongSearch(problem)).run()
    check_budget(choice.draft, costs, budget, searched=cuts is None, is_proven=choice.is_budget_proven)
    if names:  # how good the given cuts are beside all others
        free = replace(problem, given=None)
        bound = Search(free).least_bound() if free.is_small(EXACT_CELLS) else 0.0
        choice = Choice(choice.draft, min(bound, choice.draft.value), False)
    if placement == BRANCHES and problem.objective.is_training:
        return _with_branches(problem, choice, optimizer)
    return _built(problem, choice, names, optimizer)


def _with_branches(problem: Problem, choice: Choice, optimizer: str) -> Plan:
    """The plan of a choice, or of the minimum cut between two devices, if that is faster and keeps the budget."""
    costs, one_by_one = problem.costs, problem.chunks == (1,)
    if len(costs) > MOST_NODES:
        return _built(problem, choice, None, optimizer)
    client, server = problem.placements
    parts = Division(costs, (client, server), problem.links, problem.profile, problem.there[0], problem.back[0])
    best = best_bipartition(parts)
    moved = best.moved(costs)
    position = next((i for i, node in enumerate(costs.nodes) if node.name not in set(best.client)), len(costs))
    if moved and position in costs.cut_points.values():
        cut = outermost(costs, position)
        other = replace(problem, costs=costs.reordered(cut, moved), given=(len(best.client),), leaves_out=False)
        found = Search(other).run()
        is_kept = not violations(found.draft, other.costs, other.budget)
        if is_kept and found.draft.value < choice.draft.value:
            value, bound = found.draft.value, min(choice.bound, best.step_s if one_by_one else 0.0)
            is_best = problem.objective.name == "step" and one_by_one and value <= best.step_s * (1.0 + SAME)
            made = _built(other, Choice(found.draft, bound, is_best), None, optimizer)
            return replace(made, moved=moved)
    is_best = choice.is_optimal and one_by_one and best.step_s >= choice.draft.value * (1.0 - SAME)
    return _built(problem, replace(choice, is_optimal=is_best), None, optimizer)


def check_choices(schedule: str, placement: str, objective: str, optimizer: str = "adam") -> None:
    """Refuses names that are none.

    Raises:
        PlanError: always then, with those there are.
    """
    known = (("schedule", schedule, SCHEDULES), ("placement", placement, (GIVEN, AUTO, BRANCHES)))
    for what, found, allowed in (
        *known,
        ("objective", objective, OBJECTIVES),
        ("optimizer", optimizer, tuple(OPTIMIZERS)),
    ):
        if found not in allowed:
            raise PlanError(f"unknown {what}", found=repr(found), allowed=", ".join(allowed))


def _objective(name: str, price: dict[str, float] | None, devices: Sequence[str]) -> Objective:
    for device, per_h in (price or {}).items():
        if device not in devices:
            known = ", ".join(dict.fromkeys(devices))
            raise PlanError("price names an unknown device", found=device, allowed=known)
        if not isinstance(per_h, (int, float)) or isinstance(per_h, bool) or not 0 <= per_h < float("inf"):
            raise PlanError(
                "a price is not a number", where=device, found=repr(per_h), allowed="0 or more an hour"
            )
    if name == "price" and not any((price or {}).values()):
        raise PlanError("the objective 'price' needs prices", hint="price={'cuda': 2.5}, for an hour")
    return Objective(name, dict(price or {}))


def _chunks(chunks: int | str, samples: int) -> tuple[int, ...]:
    """The numbers of micro-batches to choose from."""
    if chunks == AUTO:
        return tuple(count for count in CHUNKS if count <= samples)
    check_chunks(chunks)
    assert isinstance(chunks, int)
    return (chunks,)


def check_chunks(chunks: object) -> None:
    """Refuses what is no number of micro-batches.

    Raises:
        PlanError: always then.
    """
    if not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1:
        raise PlanError(
            "chunks must count micro-batches", found=repr(chunks), allowed="an int, 1 or more, or 'auto'"
        )


Choices = tuple[tuple[Compressor, ...], ...]


def _codecs(forward: Asked, backward: Asked, cuts: int, guard: Guard) -> tuple[Choices, Choices]:
    """For each cut, the compressors to choose from, there and back."""
    if forward != AUTO:
        found = Codecs.of(forward, backward, cuts)
        return tuple((codec,) for codec in found.forward), tuple((codec,) for codec in found.backward)
    there = (guard.allowed(),) * max(cuts, 1)
    if backward == AUTO:
        return there, (guard.allowed_for_gradients(),) * max(cuts, 1)
    return there, tuple((codec,) for codec in Codecs.of(None, backward, cuts).backward)


def _built(problem: Problem, choice: Choice, names: Sequence[str] | None, optimizer: str) -> Plan:
    """The plan of a choice."""
    draft, costs = choice.draft, problem.costs
    cuts = tuple(
        Cut(name, stage, edges_across(stage, draft.edges, draft.workers))
        for stage, name in enumerate(draft.names if names is None else names, 1)
    )
    step_s = draft.outcome.seconds
    ratio = choice.bound / draft.value if draft.value > 0 else 1.0
    return Plan(
        model=costs.model,
        fingerprint=costs.fingerprint,
        batch_size=costs.batch_size,
        devices=tuple(placement.spelling for placement in draft.placements),
        cuts=cuts,
        parts=draft.parts,
        edges=draft.edges,
        chunks=draft.chunks,
        schedule=problem.schedule,
        compressor=spelling_of(draft.codecs.forward if cuts else problem.there[0][:1]),
        gradient_compressor=spelling_of(draft.codecs.backward if cuts else problem.back[0][:1]),
        recomputed=tuple(need.recomputed for need in draft.needs),
        predicted_step_s=step_s,
        lower_bound_s=step_s if choice.is_optimal else min(ratio, 1.0) * step_s,
        is_optimal=choice.is_optimal,
        note=_note(problem, draft, given=names is not None),
        links=_links(problem, draft),
        hops=hops_of(draft.times, len(draft.placements)),
        optimizer=optimizer,
        alternatives=alternatives(problem, draft),
    )


def _links(problem: Problem, draft: Draft) -> tuple[PlannedLink, ...]:
    """Each direction between two workers that something goes over, and the links between replicas."""
    used = [pair for pair, count in link_bytes(draft.edges, draft.workers).items() if count]
    used += [(worker, worker) for worker in dict.fromkeys(draft.workers) if len(replicas_of(worker)) > 1]
    return tuple(PlannedLink.of(*pair, problem.links.between(*pair)) for pair in used)


def _ordered(costs: CostTable, cuts: Sequence[str], stages: int) -> tuple[str, ...]:
    """The cuts that were given, checked, in the order of the model."""
    if isinstance(cuts, str) or not isinstance(cuts, Sequence):
        raise PlanError("cuts is not a list of module names", found=repr(cuts), allowed="['features.1', ...]")
    for name in cuts:
        if not isinstance(name, str) or name not in costs.cut_points:
            allowed = nearest(str(name), costs.cut_points)
            raise PlanError("there is no such module to cut at", found=repr(name), allowed=allowed)
    if len(cuts) != stages - 1:
        allowed = f"{stages - 1} for {stages} devices"
        raise PlanError("the number of cuts does not fit the devices", found=f"{len(cuts)}", allowed=allowed)
    ordered = sorted(cuts, key=lambda name: costs.cut_points[name])
    for first, second in pairwise(ordered):
        if costs.cut_points[first] == costs.cut_points[second]:
            what = "two cuts are at the same place: nothing runs between them"
            raise PlanError(what, found=f"{first} and {second}", hint="drop one of them, and its device")
    return tuple(ordered)


def _check_places(problem: Problem) -> None:
    """Check that there is a place for every cut."""
    places, stages = len(problem.positions), len(problem.placements)
    if places < stages - 1 and not problem.leaves_out:
        raise PlanError(
            f"{problem.costs.model} has fewer places to cut than {stages} stages need",
            found=f"{stages} devices",
            allowed=f"at most {places + 1}",
            hint="list fewer devices, or trace the model with more of its modules open",
        )


def _note(problem: Problem, draft: Draft, *, given: bool) -> str:
    """How the plan came about and what it assumes."""
    profile, placements = problem.profile, draft.placements
    nodes = problem.costs.nodes
    measured = dict.fromkeys(p.spelling for p in placements if profile.is_measured(p, nodes))
    types = dict.fromkeys(p.device_type for p in placements if not profile.is_measured(p, nodes))
    rates = [f"{device_type} {format_macs(MACS_PER_S[device_type])} MACs/s" for device_type in types]
    facts = ["cuts as given" if given else "cuts chosen"]
    facts += [f"measured: {', '.join(measured)}"] if measured else []
    facts += [f"estimated: {', '.join(rates)}"] if rates else []
    workers = list(dict.fromkeys(p.worker for p in placements))
    links = {problem.links.between(a, b): f"{a} -> {b}" for a in workers for b in workers if a != b}
    for link, pair in links.items() if len(workers) > 1 else ():
        name = "links" if len(links) == 1 else f"link {pair}"
        rate = f"{format_bytes(link.bytes_per_s)}/s, {format_seconds(link.latency_s)}"
        facts.append(f"{name} {rate} ({link.origin})")
    if problem.objective.name != "step":
        price = f", {draft.value:.3g} a step" if problem.objective.name == "price" else ""
        facts.append(f"objective: {problem.objective.name}{price}")
    return "; ".join(facts)
