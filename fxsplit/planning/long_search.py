"""The choice for very long models and many devices, where not every choice of cuts can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations, pairwise
from math import inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxsplit.compressors import Compressor
from fxsplit.costs import Value
from fxsplit.errors import PlanError
from fxsplit.planning.bounds import FloatArray
from fxsplit.planning.chain import Chain, Path, best_path, chosen_codecs, has_path
from fxsplit.planning.devices import Placement
from fxsplit.planning.draft import Draft
from fxsplit.planning.edge_codecs import Sums, edge_choices
from fxsplit.planning.hops import CODED, EDGES, FIXED, GRADIENTS, IntArray, hop_seconds
from fxsplit.planning.lattice import columns_of, prefix
from fxsplit.planning.limits import (
    STEP_TIME,
    excess_of_time,
    limits_by_position,
    link_limit,
    violations,
)
from fxsplit.planning.problem import Option, Problem
from fxsplit.planning.search import Choice
from fxsplit.planning.stages import Codecs
from fxsplit.schedules.replicas import single_workers

SAME = 1e-6
"""Relative gap up to which a plan is called optimal."""

MOST_TIGHTENED = 6
"""Ways that are looked at where those of the chain break the budget."""

NO_LIMIT = float(np.iinfo(np.int64).max)
"""More bytes than there are; finite, for sums with it."""

MOST_PAIRS = 8
"""Devices that are looked at alone beside the client, for a price."""

MOST_STRETCHED = 1e18
"""Times its limits, where no budget can be missed by more."""


class LongSearch:
    """Dynamic programming over prefixes. Exact for GPipe's step on chains of different workers.

    For anything else the ways are those of the chain that the model would be if every value went from stage to
    stage, and the bound counts only the values that no two cuts can share. A price is minimised by its seconds,
    with all devices and with each one beside the client.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        costs = problem.costs
        self._places = np.array([0, *(p for p in problem.positions if p > 0), len(costs)], np.int64)
        self._spans = [self._span(value) for value in costs.values]
        workers = [placement.worker for placement in problem.placements]
        is_step = problem.schedule == "gpipe" and problem.objective.name == "step"
        self._is_replicated = len(single_workers(workers)) > len(set(workers))
        is_plain = len(set(workers)) == len(workers) and not self._is_replicated
        # All that crosses a place crosses no other and has to be sent, and nothing goes by its layout alone.
        has_layouts = any(node.layout_inputs for node in costs.nodes)
        self._is_chain = is_plain and is_step and not has_layouts and np.array_equal(*self._sums)
        if max(map(len, (*problem.there, *problem.back))) > 1:  # every value may have its own, ways have one a cut
            self._is_chain = self._is_chain and bool((self._sums[0][CODED] <= 1).all())
        # A price is a step's seconds times what the devices of the plan cost: at least the client's, always there.
        self._price = problem.objective.price_per_s([problem.placements[0].spelling])
        if not problem.leaves_out:
            self._price = problem.objective.price_per_s(p.spelling for p in problem.placements)

    def run(self) -> Choice:
        """The best plan; if nothing satisfies the budget, one that comes near it.

        Raises:
            PlanError: the schedule is not for these stages and micro-batches.
        """
        drafts, bounds, refused = list[Draft](), [inf], list[PlanError]()
        for chunks in self._problem.chunks:
            chain = self._chain(chunks)
            path, bound = best_path(chain)
            bounds.append(bound if self._is_chain else self._bound(chunks))
            try:
                drafts += self._candidates(chain, path, chunks)
            except PlanError as error:
                refused.append(error)
        if not drafts:
            raise refused[0]
        draft = min(drafts, key=lambda each: (self._excess(each), each.value))
        least_s, most_s = min(bounds), self._problem.budget.step_time_s
        is_proven = least_s == inf or (most_s is not None and excess_of_time(least_s, most_s) > 0)
        bound = min(self._price * least_s, draft.value) if isfinite(least_s) else draft.value
        is_optimal = self._excess(draft) <= 0 and bound >= draft.value * (1.0 - SAME)
        return Choice(draft, bound, is_optimal, is_proven)

    def _candidates(self, chain: Chain, path: Path, chunks: int) -> list[Draft]:
        """The client alone, if it may be, and the best way.

        What a chain does not know of a budget (the stages of one worker together, values that pass by) may break
        it all the same: then also the best ways with less and less room.
        """
        problem, room, made = self._problem, 0.0, list[Draft]()
        if problem.leaves_out:
            made.append(Draft.of(problem, problem.placements[:1], (), Codecs((), ()), chunks))
        if not isfinite(path.value):
            chain, path = self._nearest(chunks)
            return made + self._drafts(self._accepted(chain, path, chunks), chunks, chain)
        if problem.leaves_out and problem.objective.name == "price":
            for device in path.devices[1 : 1 + MOST_PAIRS]:
                if problem.accepts([problem.placements[each].worker for each in (0, device)], chunks):
                    made += self._drafts(_best_of(chain, (0, device)), chunks, chain)
        for _ in range(MOST_TIGHTENED):
            found = self._drafts(self._accepted(chain, path, chunks), chunks, chain)
            made += found
            missed = min((self._excess(draft, with_time=False) for draft in found), default=0.0)
            if missed <= 0:
                break
            room = (1.0 + room) / (1.0 + missed) - 1.0
            chain = self._chain(chunks, room)
            path = best_path(chain)[0]
            if not isfinite(path.value):
                break
        return made

    def _excess(self, draft: Draft, *, with_time: bool = True) -> float:
        broken = violations(draft, self._problem.costs, self._problem.budget)
        return max((each.excess for each in broken if with_time or each.line != STEP_TIME), default=0.0)

    def _accepted(self, chain: Chain, path: Path, chunks: int) -> Path:
        """The way, or if the schedule is not for its stages, the best of those devices that it is for.

        The client stays, and of the others as many as there may be, those with the most work on this way first.
        """
        problem = self._problem
        names = [placement.worker for placement in problem.placements]
        if not problem.leaves_out or problem.accepts([names[device] for device in path.devices], chunks):
            return path
        both = chain.forward + chain.backward
        ends = pairwise((0, *path.places, len(self._places) - 1))
        work = {d: both[d, end] - both[d, start] for d, (start, end) in zip(path.devices, ends, strict=True)}
        kept = [0]
        for device in sorted(path.devices[1:], key=lambda each: -work[each]):
            tried = sorted([*kept, device])
            if problem.accepts([names[each] for each in tried], chunks):
                kept = tried
        return _best_of(chain, kept)

    def _bound(self, chunks: int) -> float:
        """Seconds below which no plan comes that is no chain of different workers."""
        is_stream = self._problem.objective.name == "throughput"
        if is_stream and self._is_replicated:  # the pieces of a hop are shared, too
            return 0.0
        chain = self._chain(chunks, is_bound=True)
        has_phases = self._problem.schedule == "gpipe" or not self._problem.objective.is_training
        return best_path(chain if has_phases and not self._is_replicated else replace(chain, weight=0.0))[1]

    def _nearest(self, chunks: int) -> tuple[Chain, Path]:
        """A way with the limits of the budget stretched as little as they have to be."""
        low, high = 0.0, 1.0
        while not has_path(self._chain(chunks, high)) and high < MOST_STRETCHED:
            low, high = high, 4.0 * high
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if has_path(self._chain(chunks, middle)) else (middle, high)
        chain = self._chain(chunks, high)
        return chain, best_path(chain)[0]

    def _span(self, value: Value) -> tuple[int, int]:
        """The places that a value may cross whole: from the first index up to, without, the second."""
        nodes = self._problem.costs.nodes
        used = [c for c in value.consumers if c < len(nodes) and value.name not in nodes[c].layout_inputs]
        last = max(used, default=value.producer)
        low, high = np.searchsorted(self._places[:-1], (value.producer, last), "right")
        low = max(int(low), 0 if self._problem.leaves_out else 1)
        return low, max(int(high), low)

    @cached_property
    def _sums(self) -> tuple[IntArray, IntArray]:
        """[columns, places]: what crosses each place, with and without the values that may cross several.

        The last two columns are the least bytes there and back, each value with the codec that is least for it.
        """
        problem = self._problem
        first = len(FIXED) + len(problem.codecs_there)
        width = first + len(problem.codecs_back) + 2
        tables = [np.zeros((width, len(self._places) + 1), np.int64) for _ in range(2)]
        known: dict[object, IntArray] = {}
        for value, (low, high) in zip(problem.costs.values, self._spans, strict=True):
            maker = value.producer
            is_free = maker >= 0 and problem.costs.nodes[maker].is_repeatable and not value.is_activation
            if low == high:
                continue
            key = value.spec, value.is_activation, maker < 0
            if key not in known:
                columns = columns_of(problem, value, (-1, 1) if maker < 0 else (0, 1))
                least = min(columns[len(FIXED) : first]), min(columns[first:])
                known[key] = np.array((*columns, *least), np.int64)
            for table in tables if high - low == 1 and not is_free else tables[:1]:
                table[:, low] += known[key]
                table[:, high] -= known[key]
        return tables[0].cumsum(1)[:, :-1], tables[1].cumsum(1)[:, :-1]

    def _chain(self, chunks: int, room: float = 0.0, *, is_bound: bool = False) -> Chain:
        """The model as a chain, with some room beyond the limits of the budget, see `_limit`."""
        problem, places = self._problem, self._places
        placements, nodes = problem.placements, problem.costs.nodes
        # Replicas share the work: for the chain, as if each micro-batch took so much less.
        both = [tuple(s[places] / len(p.replicas) for s in problem.prefixes(p, chunks)) for p in placements]
        macs = prefix([node.forward_macs for node in nodes])[places]
        keeps_all = problem.schedule == "gpipe" and problem.objective.is_training and not self._is_replicated
        live = 1 if keeps_all else chunks  # at least one micro-batch is kept
        kept = [n.static_bytes(problem.kept_states) + n.saved_bytes // live for n in nodes]
        limits = [
            (problem.budget.macs_limit(p.spelling), problem.budget.memory_limit(p.spelling)) for p in placements
        ]
        hops, hops_back, pair = self._hops(chunks, room, 1 if is_bound else 0)
        forward, backward = (np.array(way) for way in zip(*both, strict=True))
        if not problem.objective.is_training:
            backward = np.zeros_like(backward)
        is_stream = problem.objective.name == "throughput"
        return Chain(
            forward, backward, np.array([macs, prefix(kept)[places]], np.float64),
            np.array([[inf if m is None else _limit(m, room) for m in row] for row in limits]),
            hops, hops_back, pair, problem.leaves_out,
            float(chunks if is_stream else chunks - 1), 0.0 if is_stream else 1.0,
        )  # fmt: skip

    def _hops(self, chunks: int, room: float, table: int) -> tuple[FloatArray, FloatArray, IntArray]:
        """Seconds by kind of hop, place, codec and piece, both ways; and the kind for each two devices."""
        problem, sums = self._problem, self._sums[table]
        first = len(FIXED) + len(problem.codecs_there)
        kinds: dict[object, int] = {}
        rows: list[tuple[FloatArray, FloatArray]] = []
        pair = np.zeros((len(problem.placements),) * 2, np.int64)
        count = len(problem.placements)
        for source, target in combinations(range(count), 2) if problem.leaves_out else pairwise(range(count)):
            ends = problem.placements[source], problem.placements[target]
            there, back = problem.forward[target - 1], problem.backward[target - 1]
            key = _kind(problem, *ends, there, back)
            if key not in kinds:
                kinds[key] = len(kinds)
                go = self._way(chunks, sums, EDGES, len(FIXED), problem.codecs_there, there, ends, room)
                come = (
                    self._way(chunks, sums, GRADIENTS, first, problem.codecs_back, back, (ends[1], ends[0]), room)
                    if problem.objective.is_training
                    else self._nothing(len(problem.codecs_back), back)
                )
                if table == 1:
                    go, come = (
                        _mixed(go, sums, -2, chunks, problem, ends),
                        _mixed(come, sums, -1, chunks, problem, ends),
                    )
                rows.append((go, come))
            pair[source, target] = kinds[key]
        if not rows:
            return np.zeros((1, len(self._places), 1, 4)), np.zeros((1, len(self._places), 1, 4)), pair
        return np.stack([there for there, _ in rows]), np.stack([back for _, back in rows]), pair

    def _way(
        self,
        chunks: int,
        sums: IntArray,
        count: int,
        first: int,
        codecs: Sequence[Compressor],
        allowed: Sequence[int],
        ends: tuple[Placement, Placement],
        room: float,
    ) -> FloatArray:
        """[places, codecs, 4]: total, encoder, link and decoder of a hop from one device to another."""
        if ends[0].worker == ends[1].worker:
            return self._nothing(len(codecs), allowed)
        made = []
        for index, codec in enumerate(codecs):
            wire_bytes = sums[first + index]
            hop = hop_seconds(self._problem, chunks, sums, count, wire_bytes, codec, *ends)
            is_refused = self._is_over(wire_bytes, ends, room) | (index not in allowed)
            made.append(np.stack([np.where(is_refused, np.inf, sum(hop)), *hop[:3]], -1))
        return np.stack(made, 1)

    def _nothing(self, codecs: int, allowed: Sequence[int]) -> FloatArray:
        """[places, codecs, 4]: as `_way` where nothing is sent; what is not allowed is not chosen even so."""
        made = np.zeros((len(self._places), codecs, 4))
        made[:, [index for index in range(codecs) if index not in allowed], 0] = inf
        return made

    def _is_over(self, wire: IntArray, ends: tuple[Placement, Placement], room: float) -> NDArray[np.bool_]:
        """Where bytes are more than the budget allows over a place, from one device to another."""
        budget = self._problem.budget
        between = link_limit(budget, ends, ends[0].worker, ends[1].worker)
        limits = np.full(len(self._places), NO_LIMIT if between is None else float(between))
        by_position = limits_by_position(self._problem.costs, budget) if budget.cut_limits else {}
        for position, limit in by_position.items():
            place = np.searchsorted(self._places, position)
            limits[place] = min(limits[place], limit)
        return np.asarray(wire > _limit(limits, room))

    def _drafts(self, path: Path, chunks: int, chain: Chain) -> list[Draft]:
        """With one codec for each cut, and with one for each value, as fast as the longest piece asks for."""
        problem = self._problem
        if not path.devices:
            return []
        placements = [problem.placements[device] for device in path.devices]
        pairs = [int(chain.pair[a, b]) for a, b in zip(path.devices, path.devices[1:], strict=False)]
        there = chosen_codecs(chain.there, pairs, path.places, path.longest[0])
        back = chosen_codecs(chain.back, pairs, path.places, path.longest[1])
        codecs = Codecs(
            tuple(problem.codecs_there[index] for index in there),
            tuple(problem.codecs_back[index] for index in back),
        )
        positions = [int(self._places[place]) for place in path.places]
        drafts = [Draft.of(problem, placements, positions, codecs, chunks)]
        option = Option(tuple(placements), tuple(device - 1 for device in path.devices[1:]), chunks)
        stages = problem.stages(option.placements, tuple(positions))
        choices = edge_choices(problem, option, stages)
        rows = [
            _fastest(sums, longest)
            for way in choices.ways.values()
            for sums, longest in zip((way.there, way.back), path.longest, strict=True)
        ]
        own = choices.codecs(problem, option, rows, stages)
        if own.edges:
            drafts.append(Draft.of(problem, placements, positions, own, chunks))
        return drafts


def _limit(allowed: Any, room: float) -> Any:
    """A limit, or an array of them, with room beyond: what is found there has this excess, as violations have."""
    return allowed + room * np.maximum(allowed, 1)


def _best_of(chain: Chain, kept: Sequence[int]) -> Path:
    """The best way with some of the devices alone."""
    found = best_path(chain.of(kept))[0]
    return found._replace(devices=tuple(kept[device] for device in found.devices))


def _mixed(
    ways: FloatArray, sums: IntArray, column: int, chunks: int, problem: Problem, ends: tuple[Placement, Placement]
) -> FloatArray:
    """The least of everything where several values cross, each of which may have its own codec."""
    sender, receiver = ends if column == -2 else ends[::-1]
    least = np.where(np.isfinite(ways[..., :1]), ways, np.inf).min(1)
    wire_s = sums[column] / chunks / problem.links.between(sender.worker, receiver.worker).bytes_per_s
    least[:, 2] = np.minimum(least[:, 2], wire_s)
    least[:, 0] = np.minimum(least[:, 0], least[:, 1:].sum(1))
    is_mixed = (sums[CODED] > 1)[:, None, None]
    return np.where(is_mixed, least[:, None, :], ways)


def _fastest(sums: Sums, longest: float) -> int:
    """The row that takes the least time in all, of those with no longer piece than this if there are any."""
    is_short = sums.seconds.max(1) <= longest * (1.0 + SAME)
    totals = sums.seconds.sum(1)
    return int(np.where(is_short, totals, np.inf).argmin() if is_short.any() else totals.argmin())


def _kind(problem: Problem, sender: Placement, receiver: Placement, *codecs: object) -> object:
    """What the times of a hop depend on: many pairs of devices have the same."""
    if sender.worker == receiver.worker:
        return None
    link = problem.links.kind(sender.worker, receiver.worker)
    ends = [p.spelling if problem.profile.codecs else p.device_type for p in (sender, receiver)]
    both = (sender, receiver)
    limits = [link_limit(problem.budget, both, one.worker, other.worker) for one, other in (both, both[::-1])]
    return *ends, link, *limits, codecs
