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
from dataclasses import dataclass
from itertools import combinations, pairwise, product

import numpy as np
from numpy.typing import NDArray

from fxsplit.costs import Value
from fxsplit.errors import CompressorError
from fxsplit.planning.bounds import FloatArray, HopBound, Work
from fxsplit.planning.devices import CLIENT
from fxsplit.planning.hops import (
    EDGES,
    FIXED,
    GRADIENTS,
    RAW,
    CodecChoices,
    IntArray,
    Laid,
    Least,
    Number,
    Pair,
    add_hop,
    hop_seconds,
)
from fxsplit.planning.limits import excess_of_count, excess_of_time, limits_by_position
from fxsplit.planning.problem import Option, Problem
from fxsplit.planning.replay import actions_of, step_bound
from fxsplit.planning.stages import Codecs

Intervals = dict[int, tuple[IntArray, IntArray]]
"""For each axis, per use of a value, the bounds of the cut's position: above the first, up to the second."""

_TOO_MANY_BYTES = 2**50
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


class Lattice:
    """Scores candidates of one option: stages on given devices, with a given number of micro-batches."""

    def __init__(self, problem: Problem, option: Option, uses: tuple[Uses, Uses, Uses]) -> None:
        self._problem, self._option = problem, option
        self._workers = [placement.worker for placement in option.placements]
        nodes = problem.costs.nodes
        self._macs = prefix([node.forward_macs for node in nodes])
        self._static = prefix([node.static_bytes(problem.kept_states) for node in nodes])
        self._saved = prefix([node.saved_bytes for node in nodes])
        prefixes = {p: problem.prefixes(p, option.chunks) for p in option.placements}
        self._forward = {p: both[0] for p, both in prefixes.items()}
        self._backward = {p: both[1] for p, both in prefixes.items()}
        self._between, self._inputs, self._outputs = uses
        self._cut_limits = limits_by_position(problem.costs, problem.budget)

    def score(self, axes: Sequence[IntArray]) -> Scores:
        """The scores of all choices of one position from each axis; the axes are ascending and not empty."""
        dims = len(axes)
        flows = list(self._flows(axes))
        codecs = [
            (Least(self._problem.forward[cut]), Least(self._problem.backward[cut])) for cut in self._option.cuts
        ]
        scores = self._score(axes, flows, codecs)
        shape = tuple(len(axis) for axis in axes)
        bound, excess = (np.broadcast_to(a, shape).astype(np.float64) for a in (scores.bound, scores.excess))
        for first, second in pairwise(range(dims)):
            unordered = _along(axes[first], first, dims) >= _along(axes[second], second, dims)
            bound, excess = np.where(unordered, np.inf, bound), np.where(unordered, np.inf, excess)
        return Scores(bound, excess)

    def score_codecs(self, positions: Sequence[int]) -> Scores:
        """The scores of all choices of codecs at given cuts: an axis a cut there, then an axis a cut back."""
        dims = len(positions)
        axes = [np.array([position]) for position in positions]
        flows = [(s, t, sums.reshape(len(sums), *(1,) * (2 * dims))) for s, t, sums in self._flows(axes)]
        codecs = [
            (Laid(self._problem.forward[cut], axis), Laid(self._problem.backward[cut], dims + axis))
            for axis, cut in enumerate(self._option.cuts)
        ]
        wide = [axis.reshape((1,) * 2 * dims) for axis in axes]
        scores = self._score(wide, flows, codecs)
        cuts = self._option.cuts
        shape = [len(self._problem.forward[c]) for c in cuts] + [len(self._problem.backward[c]) for c in cuts]
        return Scores(*(np.broadcast_to(a, shape).astype(np.float64) for a in (scores.bound, scores.excess)))

    def _score(
        self, axes: Sequence[IntArray], flows: Sequence[tuple[int, int, IntArray]], codecs: CodecChoices
    ) -> Scores:
        problem, option = self._problem, self._option
        stages = len(option.placements)
        there, back = dict[Pair, HopBound](), dict[Pair, HopBound]()
        bytes_there, bytes_back = dict[Pair, IntArray](), dict[Pair, IntArray]()
        for source, target, sums in flows:
            wires = [sums[len(FIXED) + i] for i in range(len(problem.codecs_there))]
            grads = [sums[len(FIXED) + len(wires) + i] for i in range(len(problem.codecs_back))]
            if target == stages:  # the client gets outputs as they are
                bytes_there[source, target], bytes_back[source, target] = wires[0], grads[0]
                continue
            choose, choose_back = codecs[target - 1]
            pair = source, target
            bytes_there[pair], bytes_back[pair] = choose(wires), choose_back(grads)
            ends = option.placements[max(source, 0)], option.placements[target]
            hops = [
                hop_seconds(problem, option.chunks, sums, EDGES, w, c, *ends)
                for w, c in zip(wires, problem.codecs_there, strict=True)
            ]
            rows = [
                hop_seconds(problem, option.chunks, sums, GRADIENTS, w, c, ends[1], ends[0])
                for w, c in zip(grads, problem.codecs_back, strict=True)
            ]
            add_hop(there, (max(source, 0), target), hops, choose)
            add_hop(back, (max(source, 0), target), rows, choose_back)
        work = Work(
            self._workers,
            [self._between_cuts(self._forward[p], s, axes) for s, p in enumerate(option.placements)],
            [self._between_cuts(self._backward[p], s, axes) for s, p in enumerate(option.placements)],
            there,
            back,
        )
        seconds = self._seconds(work)
        excess = np.array(-1.0)
        received: dict[int, IntArray] = defaultdict(lambda: np.zeros((), np.int64))
        for _, target, sums in flows:
            received[target] = received[target] + sums[RAW]
        for line in self._excesses(axes, received, bytes_there, bytes_back):
            excess = np.maximum(excess, line)
        if problem.budget.step_time_s is not None:
            excess = np.maximum(excess, excess_of_time(seconds, problem.budget.step_time_s))
        return Scores(seconds * problem.objective.price_per_s(p.spelling for p in option.placements), excess)

    def _seconds(self, work: Work) -> FloatArray:
        """The objective's time at least."""
        problem, chunks = self._problem, self._option.chunks
        bound = work.bound(chunks, problem.rules, problem.objective)
        if problem.objective.is_training and not problem.rules.has_phases and bound.size <= _MOST_REPLAYED:
            actions = actions_of(problem.schedule, tuple(self._workers), chunks)
            bound = np.maximum(bound, step_bound(actions, work))
        return bound

    def _excesses(
        self,
        axes: Sequence[IntArray],
        received: dict[int, IntArray],
        there: dict[Pair, IntArray],
        back: dict[Pair, IntArray],
    ) -> Iterator[FloatArray]:
        """The relative violation of each line of the budget but the step time."""
        problem, placements = self._problem, self._option.placements
        budget, chunks, none = problem.budget, self._option.chunks, np.zeros((), np.int64)
        macs: dict[str, IntArray] = defaultdict(lambda: none)
        static: dict[str, IntArray] = defaultdict(lambda: none)
        live: dict[str, IntArray] = defaultdict(lambda: none)
        for stage, placement in enumerate(placements):
            device, kept = placement.spelling, self._between_cuts(self._saved, stage, axes) + received[stage]
            macs[device] = macs[device] + self._between_cuts(self._macs, stage, axes)
            static[device] = static[device] + self._between_cuts(self._static, stage, axes)
            if problem.objective.is_training and problem.rules.has_phases:
                live[device] = live[device] + kept
            else:  # at least one micro-batch, in every stage
                live[device] = live[device] + kept // chunks
        sent: dict[tuple[str, str], IntArray] = defaultdict(lambda: none)
        ends = (*self._workers, CLIENT, CLIENT)  # the output is the stage after the last, the input is stage -1
        for (source, target), count in there.items():
            sent[ends[source], ends[target]] = sent[ends[source], ends[target]] + count
            sent[ends[target], ends[source]] = sent[ends[target], ends[source]] + back[source, target]
        limited = [(macs[device], budget.macs_limit(device)) for device in macs]
        limited += [(static[device] + live[device], budget.memory_limit(device)) for device in macs]
        limited += [(count, budget.link_limit) for count in sent.values()]
        for count, limit in limited:
            if limit is not None:
                yield excess_of_count(np.asarray(count, np.float64), limit)
        for cut in range(1, len(placements)) if self._cut_limits else ():
            over = [pair for pair in there if pair[0] < cut <= pair[1]]
            forward: IntArray = sum((there[pair] for pair in over), none)
            backward: IntArray = sum((back[pair] for pair in over), none)
            limits = np.array([self._cut_limits.get(int(p), -1) for p in axes[cut - 1].ravel()])
            dims = axes[0].ndim if axes[0].ndim > 1 else len(axes)
            allowed = _along(limits, cut - 1, dims) if axes[0].ndim == 1 else limits.reshape((1,) * dims)
            busier = np.maximum(forward, backward)
            yield np.where(allowed < 0, -1.0, (busier - allowed) / np.maximum(allowed, 1))

    def _flows(self, axes: Sequence[IntArray]) -> Iterator[tuple[int, int, IntArray]]:
        """Source, target and the columns' sums for each two stages that edges between workers may join."""
        workers, stages = self._workers, len(self._workers)
        for target in range(1, stages):
            if workers[target] != CLIENT:
                yield -1, target, _sums(axes, _user_in(self._inputs, target, stages), self._inputs.weights)
        for source, target in combinations(range(stages), 2):
            if workers[source] != workers[target]:
                intervals = _both(
                    _maker_in(self._between, source, stages), _user_in(self._between, target, stages)
                )
                yield source, target, _sums(axes, intervals, self._between.weights)
        for source in range(1, stages):
            if workers[source] != CLIENT:
                intervals = _maker_in(self._outputs, source, stages)
                yield source, stages, _sums(axes, intervals, self._outputs.weights)

    def _between_cuts(self, sums: NDArray[Number], stage: int, axes: Sequence[IntArray]) -> NDArray[Number]:
        """The sum over the nodes of a stage, from sums over all nodes before each."""
        if axes and axes[0].ndim > 1:
            end = sums[axes[stage]] if stage < len(axes) else sums[-1]
            return end - (sums[axes[stage - 1]] if stage > 0 else sums[0])
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
    workers = ("one", "other")  # whichever: an edge between two workers costs the same between any two
    wires, gradients = list[int](), list[int]()
    is_coded = value.is_compressible and kind == (0, 1)
    first_there, first_back = problem.codecs_there[0], problem.codecs_back[0]
    for pairs, found in (
        ([(codec, first_back) for codec in problem.codecs_there], wires),
        ([(first_there, codec) for codec in problem.codecs_back], gradients),
    ):
        for pair in pairs:
            try:
                edge = Codecs((pair[0],), (pair[1],)).edge(value, *kind, workers)
                found.append(edge.wire_bytes if found is wires else edge.gradient_wire_bytes)
            except CompressorError:  # a cut that it would cross is taken last, and then refused by name
                found.append(_TOO_MANY_BYTES)
    coded = (int(is_coded), value.nbytes if is_coded else 0)
    return (1, int(value.is_compressible), value.nbytes, *coded, *wires, *gradients)


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
