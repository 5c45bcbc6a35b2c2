"""Lower bounds and budgets of very many choices of cuts at once: one axis a cut, one cell a choice of cuts.

Every quantity of a plan depends on few cuts: the time of a stage on the two around it, the bytes from one stage
to another on the at most four around the two. Each is an array over the axes it depends on, with length 1 on the
others, and numpy broadcasts the rest. The bytes come from difference arrays: a use of a value makes an edge
between two stages exactly when each of those cuts lies in an interval, so that it is added at the corners of a
box and cumulative sums fill the box in. What a plan may find cheaper later is taken to be free: values that could
be computed again, and the layouts of values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, product

import numpy as np
from numpy.typing import NDArray

from fxsplit.costs import Value
from fxsplit.planning.bounds import FloatArray, HopBound, Work
from fxsplit.planning.devices import CLIENT
from fxsplit.planning.edge_codecs import EdgeChoices
from fxsplit.planning.hops import (
    BYTES,
    BYTES_BACK,
    FIXED,
    LEAST_RAW,
    IntArray,
    Number,
    Pair,
    add_hop,
    least_columns,
    least_hops,
)
from fxsplit.planning.limits import excess_of_count, excess_of_time, limits_by_position, link_limit
from fxsplit.planning.parts import is_local
from fxsplit.planning.predict import all_reduce_s
from fxsplit.planning.problem import Option, Problem
from fxsplit.planning.replay import actions_of, step_bound
from fxsplit.planning.stages import Stages
from fxsplit.schedules.replicas import share_of, single_workers

Intervals = dict[int, tuple[IntArray, IntArray]]
"""For each axis, per use of a value, the bounds of the cut's position: above the first, up to the second."""

_MOST_REPLAYED = 50_000
"""Candidates whose schedules are replayed: beyond, the bound in closed form has to do until few are left."""
_ANYWHERE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Scores:
    """What a lattice of candidates is worth at best.

    Attributes:
        bound: no more than the objective of any plan with these cuts; infinite where they are not ascending.
        excess: no more than the largest relative violation of the budget; at most 0 where it may be satisfied.
    """

    bound: FloatArray
    excess: FloatArray


@dataclass(frozen=True)
class Uses:
    """The uses of values by nodes (or by the output), a row each.

    Attributes:
        made: index of the node that makes the value; -1 for an input.
        after: index of the last node before that uses the same value, or `made`.
        used: index of the node that uses it.
        weights: what an edge for this use adds to the columns.
    """

    made: IntArray
    after: IntArray
    used: IntArray
    weights: IntArray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, ...]], columns: int) -> Uses:
        """From rows of made, after, used and the columns."""
        table = np.array(rows, np.int64).reshape(len(rows), -1) if rows else np.zeros((0, 3 + columns), np.int64)
        return cls(table[:, 0], table[:, 1], table[:, 2], table[:, 3:])

    def separable(self, positions: IntArray) -> Uses:
        """Those that some cut can separate from the use before; the others make no edge of their own."""
        rows = np.searchsorted(positions, self.after, "right") < np.searchsorted(positions, self.used, "right")
        return Uses(self.made[rows], self.after[rows], self.used[rows], self.weights[rows])


@dataclass(frozen=True)
class _Load:
    """By stage, each an array over the candidates: seconds of a micro-batch, and what the budget limits.

    Attributes:
        forward: seconds of forwards.
        backward: seconds of backwards.
        macs: of the batch.
        static: bytes of parameters, gradients and the optimizer's state.
        saved: bytes that are kept for the backward of the batch.
        weights: bytes of parameters.
    """

    forward: list[FloatArray]
    backward: list[FloatArray]
    macs: list[IntArray]
    static: list[IntArray]
    saved: list[IntArray]
    weights: list[IntArray]


@dataclass(frozen=True)
class _Found:
    """Between stages, each an array over the candidates.

    Attributes:
        received: bytes that each stage gets from other workers, uncompressed.
        wire_bytes: source and target -> bytes there and back.
        there: the hops of activations.
        back: the hops of their gradients, under the same keys.
    """

    received: list[IntArray]
    wire_bytes: dict[Pair, tuple[IntArray, IntArray]] = field(default_factory=dict)
    there: dict[Pair, HopBound] = field(default_factory=dict)
    back: dict[Pair, HopBound] = field(default_factory=dict)


class Lattice:
    """Scores candidates of one option: stages on given devices, with a given number of micro-batches."""

    def __init__(self, problem: Problem, option: Option, uses: tuple[Uses, Uses, Uses]) -> None:
        self._problem, self._option = problem, option
        self._workers = [placement.worker for placement in option.placements]
        nodes = problem.costs.nodes
        self._macs = prefix([node.forward_macs for node in nodes])
        self._weights = prefix([node.parameter_bytes for node in nodes])
        self._static = prefix([node.static_bytes(problem.kept_states) for node in nodes])
        self._saved = prefix([node.saved_bytes for node in nodes])
        prefixes = {p: problem.prefixes(p, option.chunks) for p in option.placements}
        self._forward = {p: both[0] for p, both in prefixes.items()}
        self._backward = {p: both[1] for p, both in prefixes.items()}
        self._between, self._inputs, self._outputs = uses
        self._cut_limits = limits_by_position(problem.costs, problem.budget)

    def score(self, axes: Sequence[IntArray]) -> Scores:
        """The scores of all choices of one position from each axis; the axes are ascending and not empty."""
        dims, option, stages = len(axes), self._option, len(self._workers)
        found = _Found([np.zeros((), np.int64)] * (stages + 1))
        for source, target, intervals, uses in self._flows():
            weights = least_columns(self._problem, option, uses.weights, source, target)
            sums = _sums(axes, intervals, weights)
            found.received[target] = found.received[target] + sums[LEAST_RAW]
            found.wire_bytes[source, target] = sums[BYTES], sums[BYTES_BACK]
            if target < stages:
                ends = self._workers[max(source, 0)], self._workers[target]
                hops = least_hops(self._problem, sums, ends)
                add_hop(found.there, (max(source, 0), target), hops[0])
                add_hop(found.back, (max(source, 0), target), hops[1])
        places, each = option.placements, self._between_cuts
        load = _Load(
            [each(self._forward[p], s, axes) for s, p in enumerate(places)],
            [each(self._backward[p], s, axes) for s, p in enumerate(places)],
            *(
                [each(sums, s, axes) for s in range(stages)]
                for sums in (self._macs, self._static, self._saved, self._weights)
            ),
        )
        limits = [
            _along(np.array([self._cut_limits.get(int(p), -1) for p in axis]), cut, dims)
            for cut, axis in enumerate(axes)
        ]
        scores = self._score(load, found, limits)
        shape = tuple(len(axis) for axis in axes)
        bound, excess = (np.broadcast_to(a, shape).astype(np.float64) for a in (scores.bound, scores.excess))
        for first, second in pairwise(range(dims)):
            unordered = _along(axes[first], first, dims) >= _along(axes[second], second, dims)
            bound, excess = np.where(unordered, np.inf, bound), np.where(unordered, np.inf, excess)
        return Scores(bound, excess)

    def score_codecs(self, stages: Stages, choices: EdgeChoices) -> Scores:
        """The scores of all choices of codecs at given cuts: an axis for each way, there and back in turns."""
        parts, chunks, shape = stages.parts((), self._option.chunks), self._option.chunks, choices.shape
        found = _Found([np.zeros((), np.int64)] * (len(parts) + 1))
        for value, source, target, is_whole in stages.crossings:
            if is_whole and not is_local(source, target, stages.workers):
                found.received[target] = found.received[target] + value.nbytes
                if target == len(parts):
                    edge, known = (
                        self._problem.edges_of(value, (1, 2))[0][0],
                        found.wire_bytes.get((source, target)),
                    )
                    counts = (np.asarray(edge.wire_bytes), np.asarray(edge.gradient_wire_bytes))
                    found.wire_bytes[source, target] = (
                        counts if known is None else (known[0] + counts[0], known[1] + counts[1])
                    )
        for index, (pair, way) in enumerate(choices.ways.items()):
            laid = [_along(s.wire_bytes, 2 * index + k, len(shape)) for k, s in enumerate((way.there, way.back))]
            found.wire_bytes[pair] = laid[0], laid[1]
            for hops, sums, latency_s, axis in (
                (found.there, way.there, way.latency_s, 2 * index),
                (found.back, way.back, way.back_latency_s, 2 * index + 1),
            ):
                pieces = [_along(column, axis, len(shape)) for column in (sums.seconds.sum(1), *sums.seconds.T)]
                hops[pair] = HopBound(pieces[0], np.asarray(latency_s), *pieces[1:])
        load = _Load(
            [np.asarray(part.forward_s / chunks) for part in parts],
            [np.asarray((part.step_s - part.forward_s) / chunks) for part in parts],
            [np.asarray(part.macs) for part in parts],
            [np.asarray(part.memory_bytes - part.kept_bytes) for part in parts],
            [np.asarray(part.kept_bytes) for part in parts],
            [np.asarray(part.parameter_bytes) for part in parts],
        )
        limits = [np.asarray(self._cut_limits.get(position, -1)) for position in stages.positions]
        scores = self._score(load, found, limits)
        return Scores(*(np.broadcast_to(a, shape).astype(np.float64) for a in (scores.bound, scores.excess)))

    def _score(self, load: _Load, found: _Found, limits: Sequence[IntArray]) -> Scores:
        work = Work(self._workers, load.forward, load.backward, found.there, found.back, self._reduces(load))
        seconds, budget = self._seconds(work), self._problem.budget
        excess = np.array(-1.0)
        for line in self._excesses(load, found, limits):
            excess = np.maximum(excess, line)
        if budget.step_time_s is not None:
            excess = np.maximum(excess, excess_of_time(seconds, budget.step_time_s))
        price_per_s = self._problem.objective.price_per_s(p.spelling for p in self._option.placements)
        return Scores(seconds * price_per_s, excess)

    def _reduces(self, load: _Load) -> list[FloatArray]:
        """Seconds of the all-reduce of each stage's gradients; nothing if there are no replicas."""
        if len(single_workers(self._workers)) == len(set(self._workers)):
            return []
        between = self._problem.links.between
        return [
            np.asarray(all_reduce_s(nbytes, worker, between))
            for nbytes, worker in zip(load.weights, self._workers, strict=True)
        ]

    def _seconds(self, work: Work) -> FloatArray:
        """The objective's time at least."""
        problem, chunks = self._problem, self._option.chunks
        bound = work.bound(chunks, problem.rules, problem.objective)
        if problem.objective.is_training and not problem.rules.has_phases and bound.size <= _MOST_REPLAYED:
            actions = actions_of(problem.schedule, tuple(self._workers), chunks)
            bound = np.maximum(bound, step_bound(actions, work))
        return bound

    def _excesses(self, load: _Load, found: _Found, limits: Sequence[IntArray]) -> Iterator[FloatArray]:
        """The relative violation of each line of the budget but the step time."""
        problem, placements = self._problem, self._option.placements
        budget, chunks, none = problem.budget, self._option.chunks, np.zeros((), np.int64)
        macs: dict[str, IntArray] = defaultdict(lambda: none)
        memory: dict[str, IntArray] = defaultdict(lambda: none)
        for stage, placement in enumerate(placements):
            device, kept = placement.spelling, load.saved[stage] + found.received[stage]
            is_all = problem.objective.is_training and problem.rules.has_phases
            # Else at least one micro-batch, in every stage.
            kept = kept * (share_of(chunks, len(placement.replicas)) if is_all else 1) // chunks
            macs[device] = macs[device] + load.macs[stage]
            memory[device] = memory[device] + load.static[stage] + kept
        sent: dict[tuple[str, str], IntArray] = defaultdict(lambda: none)
        ends = (*self._workers, CLIENT, CLIENT)  # the output is the stage after the last, the input is stage -1
        for (source, target), (there, back) in found.wire_bytes.items():
            sent[ends[source], ends[target]] = sent[ends[source], ends[target]] + there
            if problem.objective.is_training:
                sent[ends[target], ends[source]] = sent[ends[target], ends[source]] + back
        limited = [(macs[device], budget.macs_limit(device)) for device in macs]
        limited += [(memory[device], budget.memory_limit(device)) for device in macs]
        limited += [(count, link_limit(budget, placements, *pair)) for pair, count in sent.items()]
        for count, limit in limited:
            if limit is not None:
                yield excess_of_count(np.asarray(count, np.float64), limit)
        for cut, allowed in enumerate(limits, 1) if self._cut_limits else ():
            over = [both for pair, both in found.wire_bytes.items() if pair[0] < cut <= pair[1]]
            ways = (0, 1) if problem.objective.is_training else (0, 0)
            busier = np.maximum(*(sum((both[way] for both in over), none) for way in ways))
            yield np.where(allowed < 0, -1.0, (busier - allowed) / np.maximum(allowed, 1))

    def _flows(self) -> Iterator[tuple[int, int, Intervals, Uses]]:
        """Source, target and uses of each two stages that edges between workers may join."""
        workers, stages = self._workers, len(self._workers)
        for target in range(1, stages):
            if workers[target] != CLIENT:
                yield -1, target, _user_in(self._inputs, target, stages), self._inputs
        for source, target in combinations(range(stages), 2):
            if workers[source] != workers[target]:
                intervals = _both(
                    _maker_in(self._between, source, stages), _user_in(self._between, target, stages)
                )
                yield source, target, intervals, self._between
        for source in range(1, stages):
            if workers[source] != CLIENT:
                yield source, stages, _maker_in(self._outputs, source, stages), self._outputs

    def _between_cuts(self, sums: NDArray[Number], stage: int, axes: Sequence[IntArray]) -> NDArray[Number]:
        """The sum over the nodes of a stage, from sums over all nodes before each."""
        dims = len(axes)
        end = _along(sums[axes[stage]] if stage < dims else sums[-1:], stage, dims)
        start = _along(sums[axes[stage - 1]] if stage > 0 else sums[:1], stage - 1, dims)
        return end - start


def prefix(counts: Sequence[int]) -> IntArray:
    """Sums of all counts before each index."""
    return np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)


def _along(values: NDArray[Number], axis: int, dims: int) -> NDArray[Number]:
    """A row of values laid along one axis of a lattice; a single one fits anywhere."""
    return values.reshape([-1 if dim == axis else 1 for dim in range(dims)])


def uses_of(problem: Problem) -> tuple[Uses, Uses, Uses]:
    """The uses of nodes' values by nodes, of inputs by nodes, and of nodes' values by the output."""
    rows: dict[Pair, list[tuple[int, ...]]] = {(0, 1): [], (-1, 1): [], (1, 2): []}
    nodes, end = problem.costs.nodes, len(problem.costs)
    for value in problem.costs.values:
        after = value.producer
        is_free = after >= 0 and nodes[after].is_repeatable and not value.is_activation
        for used in value.consumers:
            kind = (1, 2) if used >= end else (-1, 1) if value.producer < 0 else (0, 1)
            if used < end and (is_free or value.name in nodes[used].layout_inputs):
                continue
            # An input that is an output needs no edge: both are the client's.
            if used < end or value.producer >= 0:
                rows[kind].append((value.producer, after, used, *columns_of(problem, value, kind)))
            after = used
    positions = np.array(problem.positions, np.int64)
    width = len(FIXED) + len(problem.codecs_there) + len(problem.codecs_back)
    between, inputs, outputs = (Uses.of(uses, width) for uses in rows.values())
    return between.separable(positions), inputs.separable(positions), outputs


def columns_of(problem: Problem, value: Value, kind: Pair) -> tuple[int, ...]:
    """What an edge for a use adds to the sums."""
    there, back = problem.edges_of(value, kind)
    coded_bytes = value.nbytes if value.is_compressible and kind == (0, 1) else 0
    return (
        *(1, int(value.is_compressible), value.nbytes, int(value.is_compressible and kind == (0, 1)), coded_bytes),
        *(edge.wire_bytes for edge in there),
        *(edge.gradient_wire_bytes for edge in back),
    )


def _maker_in(uses: Uses, stage: int, stages: int) -> Intervals:
    """Where the cuts must be for the value to be made in a stage."""
    intervals: Intervals = {}
    if stage > 0:
        intervals[stage - 1] = (np.full_like(uses.made, -1), uses.made)
    if stage < stages - 1:
        intervals[stage] = (uses.made, np.full_like(uses.made, _ANYWHERE))
    return intervals


def _user_in(uses: Uses, stage: int, stages: int) -> Intervals:
    """Where the cuts must be for this use to be the first of its value in a stage."""
    intervals: Intervals = {stage - 1: (uses.after, uses.used)}
    if stage < stages - 1:
        intervals[stage] = (uses.used, np.full_like(uses.used, _ANYWHERE))
    return intervals


def _both(first: Intervals, second: Intervals) -> Intervals:
    """Where the cuts must be for both."""
    merged = dict(first)
    for axis, (above, upto) in second.items():
        if axis in merged:
            above, upto = np.maximum(above, merged[axis][0]), np.minimum(upto, merged[axis][1])
        merged[axis] = (above, upto)
    return merged


def _sums(axes: Sequence[IntArray], intervals: Intervals, weights: IntArray) -> IntArray:
    """For each cell, the summed weights of the uses whose intervals hold its cuts: [columns, *lattice]."""
    low, high = {}, {}
    inside = np.ones(len(weights), np.bool_)
    for axis, (above, upto) in intervals.items():
        low[axis] = np.searchsorted(axes[axis], above, "right")
        high[axis] = np.searchsorted(axes[axis], upto, "right")
        inside &= low[axis] < high[axis]
    shape = [len(axis) + 1 if index in intervals else 1 for index, axis in enumerate(axes)]
    grid = np.zeros((math.prod(shape), weights.shape[1]), np.int64)
    for corner in product((False, True), repeat=len(intervals)):
        cell = np.zeros(np.count_nonzero(inside), np.int64)
        for axis, past in zip(intervals, corner, strict=True):
            cell += (high if past else low)[axis][inside] * math.prod(shape[axis + 1 :])
        np.add.at(grid, cell, (-1) ** sum(corner) * weights[inside])
    grid = grid.reshape(*shape, -1)
    for axis in intervals:
        grid = np.cumsum(grid, axis=axis).take(range(shape[axis] - 1), axis)
    return np.moveaxis(grid, -1, 0)
