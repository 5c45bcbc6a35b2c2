"""The choice: candidates in the order of their lower bounds, simulated until none can be better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fxsplit.errors import PlanError
from fxsplit.planning.bounds import FloatArray
from fxsplit.planning.draft import Draft
from fxsplit.planning.edge_codecs import EdgeChoices, edge_choices
from fxsplit.planning.hops import IntArray
from fxsplit.planning.lattice import Lattice, uses_of
from fxsplit.planning.limits import violations
from fxsplit.planning.problem import Option, Problem
from fxsplit.planning.stages import Codecs

EXACT_CELLS = 4_000_000
"""Choices of cuts for one option that are bounded one by one."""

MOST_DRAFTS = 2_000
"""Candidates that are simulated; those that are left make the gap."""

SAME = 1e-9
"""Relative difference up to which two times are the same: sums of floats differ by their order."""


@dataclass(frozen=True)
class Choice:
    """The best that was found.

    Attributes:
        draft: it; the one that comes nearest if none satisfies the budget.
        bound: no plan comes below this.
        is_optimal: whether it is proven to be the best.
        is_budget_proven: whether it is proven, if it breaks the budget, that nothing keeps it.
    """

    draft: Draft
    bound: float
    is_optimal: bool
    is_budget_proven: bool = True


@dataclass(frozen=True)
class _Cells:
    """The choices of cuts of one option that are ascending, in the order of their bounds."""

    option: Option
    lattice: Lattice
    axes: Sequence[IntArray]
    flat: IntArray
    bound: FloatArray
    excess: FloatArray

    def positions(self, row: int) -> tuple[int, ...]:
        """The cuts of a row."""
        if not self.axes:
            return ()
        cell = np.unravel_index(int(self.flat[row]), tuple(len(axis) for axis in self.axes))
        return tuple(int(axis[index]) for axis, index in zip(self.axes, cell, strict=True))


class Search:
    """Looks for the best plan of a problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._uses = uses_of(problem)
        self._best: Draft | None = None
        self._key = (float("inf"), float("inf"))  # violation of the budget, value
        self._drafts = 0
        self._left = float("inf")  # the least bound of what was not looked at

    def run(self) -> Choice:
        """The best plan; if nothing satisfies the budget, the one with the smallest largest violation.

        Raises:
            PlanError: no number of stages and micro-batches is for this schedule.
        """
        cells = [found for option in self._problem.options() if (found := self._cells(option)) is not None]
        for is_kept in (True, False):
            self._left = float("inf")
            self._go_through(cells, is_kept)
            if self._best is not None and (self._key[0] <= 0 or not is_kept):
                break
        if self._best is None:
            raise self._refused()
        bound = min(self._left, self._best.value)
        is_all = self._left == float("inf")
        return Choice(self._best, bound, bound >= self._best.value * (1.0 - SAME), is_budget_proven=is_all)

    def least_bound(self) -> float:
        """No choice of cuts comes below this, whatever the budget."""
        found = [c for option in self._problem.options() if (c := self._cells(option)) is not None]
        return min((float(cells.bound.min()) for cells in found if len(cells.bound)), default=0.0)

    def _refused(self) -> PlanError:
        """What the schedule says of the first option."""
        option = next(iter(self._problem.options()))
        positions = self._problem.positions[: len(option.cuts)]
        try:
            there, back = (
                (tuple(codecs[cut][0] for cut in option.cuts))
                for codecs in (self._problem.there, self._problem.back)
            )
            self._draft(option, positions, Codecs(there, back))
        except PlanError as error:
            return error
        return PlanError("no plan was found", found=self._problem.schedule)

    def _cells(self, option: Option) -> _Cells | None:
        lattice, axes = Lattice(self._problem, option, self._uses), self._axes(len(option.cuts))
        if axes is None:
            return None
        if not axes:
            scores = lattice.score_codecs(self._problem.stages(option.placements, ()), EdgeChoices({}, True))
            return _Cells(
                option, lattice, (), np.zeros(1, np.int64), *(a.reshape(1) for a in (scores.bound, scores.excess))
            )
        scores = lattice.score(axes)
        flat = np.flatnonzero(np.isfinite(scores.bound))
        return _Cells(option, lattice, axes, flat, scores.bound.ravel()[flat], scores.excess.ravel()[flat])

    def _axes(self, count: int) -> list[IntArray] | None:
        given = self._problem.given
        if given is None:
            return axes_of(self._problem.positions, count)
        return [np.array([position], np.int64) for position in given]

    def _go_through(self, cells: Sequence[_Cells], is_kept: bool) -> None:
        """Looks at all candidates that may keep the budget, or at those that may be nearest to it."""
        for found in sorted(cells, key=lambda c: float(c.bound.min()) if len(c.bound) else float("inf")):
            order: Iterator[int] = iter(_order(found, is_kept, self._key))
            for row in order:
                low = max(float(found.excess[row]), 0.0), float(found.bound[row])
                if not self._is_promising(*low):
                    break
                if self._drafts >= MOST_DRAFTS and self._best is not None:
                    self._left = min(self._left, low[1])
                    break
                self._codecs_of(found, row, is_kept)

    def _is_promising(self, excess: float, bound: float) -> bool:
        """Whether a candidate with these bounds can be better than the best so far."""
        if excess > self._key[0] + SAME:
            return False
        return excess < self._key[0] - SAME or bound < self._key[1] * (1.0 - SAME)

    def _codecs_of(self, cells: _Cells, row: int, is_kept: bool) -> None:
        """Looks at the codecs for one choice of cuts."""
        problem, option, positions = self._problem, cells.option, cells.positions(row)
        stages = problem.stages(option.placements, positions)
        choices = edge_choices(problem, option, stages)
        if not choices.is_whole:
            self._left = min(self._left, float(cells.bound[row]))
        scores = cells.lattice.score_codecs(stages, choices)
        bound, excess = scores.bound.ravel(), np.maximum(scores.excess.ravel(), 0.0)
        order = np.lexsort((bound, excess)) if not is_kept else np.argsort(np.where(excess > 0, np.inf, bound))
        for index in order:
            if (is_kept and excess[index] > 0) or not self._is_promising(
                float(excess[index]), float(bound[index])
            ):
                break
            if self._drafts >= MOST_DRAFTS and self._best is not None:
                self._left = min(self._left, float(bound[index]))
                break
            rows = [int(i) for i in np.unravel_index(int(index), choices.shape)] if choices.shape else []
            codecs = choices.codecs(problem, option, rows, stages)
            try:
                self._look_at(self._draft(option, positions, codecs))
            except PlanError:  # not for this schedule, with any cuts and codecs
                break

    def _draft(self, option: Option, positions: Sequence[int], codecs: Codecs) -> Draft:
        self._drafts += 1
        # While nothing keeps the budget, a slower plan may be the better one.
        most = self._key[1] * (1.0 - SAME / 2) if self._key[0] <= 0 else float("inf")
        return Draft.of(self._problem, option.placements, positions, codecs, option.chunks, most=most)

    def _look_at(self, draft: Draft) -> None:
        broken = violations(draft, self._problem.costs, self._problem.budget)
        key = max((violation.excess for violation in broken), default=0.0), draft.value
        if self._is_promising(*key):
            self._best, self._key = draft, key


def _order(cells: _Cells, is_kept: bool, best: tuple[float, float]) -> Iterator[int]:
    """Rows by their bounds, ascending; in parts, since few of them are ever asked for."""
    if is_kept:
        rows = np.flatnonzero((cells.excess <= 0) & (cells.bound < best[1]))
        first = cells.bound[rows]
        second = first
    else:
        rows = np.arange(len(cells.bound))
        first, second = np.maximum(cells.excess, 0.0), cells.bound
    if len(rows) > 1000:
        some = np.argpartition(first, 1000)[:1000]
        least = some[np.lexsort((second[some], first[some]))]
        yield from (int(row) for row in rows[least])
        rest = np.setdiff1d(np.arange(len(rows)), some)
        rows, first, second = rows[rest], first[rest], second[rest]
    yield from (int(row) for row in rows[np.lexsort((second, first))])


def axes_of(positions: Sequence[int], count: int) -> list[IntArray] | None:
    """The positions that each cut may have, with room for the others; None if there are too few."""
    spare = len(positions) - count
    if spare < 0:
        return None
    return [np.array(positions[cut : cut + spare + 1], np.int64) for cut in range(count)]
