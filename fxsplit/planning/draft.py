"""A plan in the making: a choice of devices, cuts, codecs and chunks, with all that is predicted of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from fxsplit.costs import CostTable
from fxsplit.planning.devices import Placement
from fxsplit.planning.parts import Edge, Part
from fxsplit.planning.predict import Outcome, times_of
from fxsplit.planning.problem import Problem
from fxsplit.planning.recompute import Needs
from fxsplit.planning.stages import Codecs
from fxsplit.schedules import Times


@dataclass(frozen=True)
class Draft:
    """A choice, and what comes of it.

    Attributes:
        placements: one a stage.
        names: of the cuts.
        positions: of the cuts: indices of the nodes at which stages begin.
        codecs: one for each cut and direction.
        chunks: micro-batches.
        needs: what each stage gets and computes again.
        edges: between the stages.
        parts: one a stage.
        times: of a micro-batch.
        outcome: what is predicted.
        price_per_s: by which the seconds are weighed.
        is_training: whether gradients come back.
    """

    placements: tuple[Placement, ...]
    names: tuple[str, ...]
    positions: tuple[int, ...]
    codecs: Codecs
    chunks: int
    needs: tuple[Needs, ...]
    edges: tuple[Edge, ...]
    parts: tuple[Part, ...]
    times: Times
    outcome: Outcome
    price_per_s: float
    is_training: bool

    @property
    def workers(self) -> tuple[str, ...]:
        """The worker of each stage."""
        return tuple(placement.worker for placement in self.placements)

    @property
    def value(self) -> float:
        """What is minimised."""
        return self.outcome.seconds * self.price_per_s

    @classmethod
    def of(
        cls,
        problem: Problem,
        placements: Sequence[Placement],
        positions: Sequence[int],
        codecs: Codecs,
        chunks: int,
        names: Sequence[str] | None = None,
        most: float = inf,
    ) -> Draft:
        """All that follows from a choice; its value may be infinite if it is not below `most`.

        Raises:
            PlanError: the schedule is not for these stages and micro-batches.
            CompressorError: a learned compressor does not fit what crosses a cut.
        """
        costs, placements, positions = problem.costs, tuple(placements), tuple(positions)
        stages = problem.stages(placements, positions)
        edges = stages.edges(codecs)
        parts = stages.parts(edges, chunks)
        training = problem.objective.is_training
        times = times_of(
            parts, edges, placements, problem.links, problem.profile, chunks, with_outputs=not training
        )
        price_per_s = problem.objective.price_per_s(placement.spelling for placement in placements)
        most_s = most / price_per_s if price_per_s else inf
        workers = stages.workers if training else (*stages.workers, placements[0].worker)
        outcome = problem.outcome(times, workers, chunks, most_s)
        if outcome.live != (chunks,) * len(placements):
            parts = stages.parts(edges, chunks, outcome.live)
        return cls(
            placements,
            tuple(outermost(costs, position) for position in positions) if names is None else tuple(names),
            positions,
            codecs,
            chunks,
            stages.needs,
            edges,
            parts,
            times,
            outcome,
            price_per_s,
            training,
        )


def outermost(costs: CostTable, position: int) -> str:
    """The name for a place to cut: of the modules that begin there, the outermost."""
    names = [name for name, index in costs.cut_points.items() if index == position]
    return min(names, key=lambda name: name.count("."))
