"""What is always looked at beside the plan that was asked for: one device, the raw input, no compression.

Who names devices, cuts or a compressor gets them: to leave a device out may be what a user wants least of all.
But the plan says what it would take without.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxsplit.compressors import Lossless
from fxsplit.errors import CompressorError, PlanError
from fxsplit.planning.devices import Placement
from fxsplit.planning.draft import Draft
from fxsplit.planning.forecast import Alternative
from fxsplit.planning.limits import violations
from fxsplit.planning.problem import Problem
from fxsplit.planning.stages import Codecs

_Choice = tuple[tuple[Placement, ...], tuple[int, ...], tuple[str, ...], Codecs]
_INPUT = "the input"


def alternatives(problem: Problem, draft: Draft) -> tuple[Alternative, ...]:
    """Those that differ from the draft, with its number of micro-batches or the least that may be chosen."""
    found: dict[str, Draft] = {}
    for what, each in _drafts(problem, draft):
        if what not in found or each.value < found[what].value:
            found[what] = each
    return tuple(
        Alternative(what, each.outcome.seconds, not violations(each, problem.costs, problem.budget))
        for what, each in found.items()
    )


def _drafts(problem: Problem, draft: Draft) -> Iterator[tuple[str, Draft]]:
    for chunks in sorted({draft.chunks, min(problem.chunks)}):
        for what, (placements, positions, names, codecs) in _choices(problem, draft):
            try:
                yield what, Draft.of(problem, placements, positions, codecs, chunks, names)
            except (PlanError, CompressorError):  # not for this schedule, or nothing that this codec can take
                continue


def _kinds(problem: Problem) -> list[Placement]:
    """The first device of each kind: of a thousand equal ones, one stands for all."""
    client, links, profile = problem.placements[0].worker, problem.links, problem.profile
    kinds: dict[object, Placement] = {}
    for each in problem.placements:
        speed = each.spelling if profile.is_measured(each) or profile.codecs else each.device_type
        price = problem.objective.price_per_h.get(each.spelling), problem.budget.memory_limit(each.spelling)
        kinds.setdefault((each.worker == client, speed, links.kind(client, each.worker), price), each)
    return list(kinds.values())


def _choices(problem: Problem, draft: Draft) -> Iterator[tuple[str, _Choice]]:
    client, none = problem.placements[0], Lossless()
    for placement in _kinds(problem):
        if placement == client and draft.positions:
            yield f"all on {client.spelling}", ((client,), (), (), Codecs((), ()))
        elif placement != client and draft.positions != (0,):
            yield f"all on {placement.spelling}", ((client, placement), (0,), (_INPUT,), Codecs((none,), (none,)))
    count = len(draft.positions)
    if count > 1 and draft.positions[0] > 0:
        names = (_INPUT, *draft.names[1:])
        yield "the raw input sent", (draft.placements, (0, *draft.positions[1:]), names, draft.codecs)
    if any(not isinstance(codec, Lossless) for codec in draft.codecs.all):
        plain = Codecs((none,) * count, (none,) * count)
        yield "no compression", (draft.placements, draft.positions, draft.names, plain)
