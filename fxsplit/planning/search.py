"""The choice of the cuts: every candidate where that is feasible, else a bounded search that says so."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from fxsplit.planning.lattice import IntArray, Lattice, Problem
from fxsplit.planning.predict import seconds_per_mac

EXACT_CELLS = 4_000_000
"""Above this many candidates the search is bounded."""

BLOCK_CELLS = 250_000
"""Candidates scored at a time: large enough for numpy, small enough for the cache."""

ROUNDS = 50
"""Most rounds of improvement of the bounded search; few are ever needed."""

Key = tuple[float, float]
Found = tuple[Key, tuple[int, ...]]


def best_cuts(problem: Problem) -> tuple[tuple[int, ...], bool]:
    """Positions of the cuts with the least predicted step time, and whether that is proven.

    If nothing satisfies the budget, those with the smallest largest violation. There must be at least as many
    positions as cuts.
    """
    count, lattice = len(problem.placements) - 1, Lattice(problem)
    if count == 0:
        return (), True
    axes = _axes(problem.positions, count)
    if len(problem.positions) ** count <= EXACT_CELLS:
        return _exhaustive(lattice, axes)[1], True
    starts = {_balanced(problem), _evenly(problem)}
    return min(_improved(lattice, axes, start) for start in sorted(starts))[1], False


def _axes(positions: Sequence[int], count: int) -> list[IntArray]:
    """The positions that each cut may have, with room for the others before and behind it."""
    spare = len(positions) - count
    return [np.array(positions[cut : cut + spare + 1], np.int64) for cut in range(count)]


def _exhaustive(lattice: Lattice, axes: Sequence[IntArray]) -> Found:
    """The best of all ascending choices from the axes."""
    return min(_score(lattice, block) for block in _blocks(axes))


def _blocks(axes: Sequence[IntArray]) -> Iterator[list[IntArray]]:
    """The same choices in blocks along the first axis, without most of the choices that are not ascending."""
    others = int(np.prod([len(axis) for axis in axes[1:]], dtype=np.int64))
    size = max(1, BLOCK_CELLS // others)
    for start in range(0, len(axes[0]), size):
        block = [axes[0][start : start + size]]
        for axis in axes[1:]:
            block.append(axis[axis > block[-1][0]])
        if all(len(axis) for axis in block):
            yield block


def _score(lattice: Lattice, axes: Sequence[IntArray]) -> Found:
    """The best cell of one lattice, with its key."""
    scores = lattice.score(axes)
    cell = scores.best()
    return scores.key(cell), tuple(int(axis[index]) for axis, index in zip(axes, cell, strict=True))


def _improved(lattice: Lattice, axes: Sequence[IntArray], start: tuple[int, ...]) -> Found:
    """A choice that moving two neighbouring cuts, or one if two are too many, does not make better."""
    best = _score(lattice, [np.array([position]) for position in start])
    width = 2 if len(axes) > 1 and len(axes[0]) ** 2 <= BLOCK_CELLS else 1
    for _ in range(ROUNDS):
        before = best
        for first in range(len(axes) - width + 1):
            choice = [np.array([position]) for position in best[1]]
            low = best[1][first - 1] if first > 0 else -1
            high = best[1][first + width] if first + width < len(axes) else np.iinfo(np.int64).max
            for moved in range(first, first + width):
                choice[moved] = axes[moved][(axes[moved] > low) & (axes[moved] < high)]
            best = min(best, _exhaustive(lattice, choice))
        if best == before:
            break
    return best


def _balanced(problem: Problem) -> tuple[int, ...]:
    """A start: every stage has MACs in proportion to its device's rate."""
    rates = [1.0 / seconds_per_mac(placement) for placement in problem.placements]
    macs = [0, *accumulate(node.forward_macs for node in problem.costs.nodes)]
    shares = list(accumulate(rates))
    return _nearby(problem.positions, [bisect_left(macs, macs[-1] * share / shares[-1]) for share in shares[:-1]])


def _evenly(problem: Problem) -> tuple[int, ...]:
    """A start: as many places to cut in every stage."""
    positions, stages = problem.positions, len(problem.placements)
    return _nearby(positions, [positions[len(positions) * cut // stages] for cut in range(1, stages)])


def _nearby(positions: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Different ascending positions, each the first at or after the wanted one that the others leave free."""
    found, index = [], -1
    for cut, position in enumerate(wanted):
        last = len(positions) - len(wanted) + cut
        index = min(max(bisect_left(positions, position), index + 1), last)
        found.append(positions[index])
    return tuple(found)
