"""What is planned: the model's costs, the devices, and all that may be chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from math import inf

import numpy as np

from fxsplit.compressors.base import Compressor
from fxsplit.costs import CostTable, Value
from fxsplit.errors import CompressorError, PlanError
from fxsplit.planning.bounds import FloatArray, Rules
from fxsplit.planning.budget import Budget
from fxsplit.planning.devices import Placement
from fxsplit.planning.links import Links
from fxsplit.planning.parts import Edge
from fxsplit.planning.predict import Objective, Outcome, outcome_of
from fxsplit.planning.profile import Profile
from fxsplit.planning.recompute import least_needs
from fxsplit.planning.stages import Codecs, Stages
from fxsplit.schedules import Times, schedule
from fxsplit.schedules.replicas import check_replicas

_KEPT_STAGES = 64
_TOO_MANY_BYTES = 2**50


@dataclass(frozen=True)
class Option:
    """Devices that get a stage each, and a number of micro-batches.

    Attributes:
        placements: one a stage.
        cuts: for each cut, which of the problem's cuts lends it its codecs.
        chunks: micro-batches.
    """

    placements: tuple[Placement, ...]
    cuts: tuple[int, ...]
    chunks: int


@dataclass(frozen=True)
class Problem:
    """All that a plan is chosen from and judged by.

    Attributes:
        costs: of the model.
        placements: the device list.
        there: for each cut, the codecs that may be chosen for activations.
        back: the same for gradients.
        links: what the links do.
        chunks: the numbers of micro-batches that may be chosen.
        budget: what has to be kept.
        schedule: name of the schedule.
        objective: what is minimised.
        profile: what is known of speeds.
        leaves_out: whether devices may be left out, and the first stage be empty: the input is sent as it is.
        given: the cuts, if they are not to be chosen.
        states: tensors that the optimizer keeps for each parameter.
    """

    costs: CostTable
    placements: tuple[Placement, ...]
    there: tuple[tuple[Compressor, ...], ...]
    back: tuple[tuple[Compressor, ...], ...]
    links: Links
    chunks: tuple[int, ...]
    budget: Budget
    schedule: str = "gpipe"
    objective: Objective = field(default_factory=Objective)
    profile: Profile = field(default_factory=Profile)
    leaves_out: bool = False
    given: tuple[int, ...] | None = None
    states: int = 0

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """The node indices at which a stage may begin, ascending."""
        least = -1 if self.leaves_out else 0
        return tuple(sorted({index for index in self.costs.cut_points.values() if index > least}))

    @cached_property
    def codecs_there(self) -> tuple[Compressor, ...]:
        """All codecs of activations, each once."""
        return tuple(dict.fromkeys(codec for cut in self.there for codec in cut))

    @cached_property
    def codecs_back(self) -> tuple[Compressor, ...]:
        """All codecs of gradients, each once."""
        return tuple(dict.fromkeys(codec for cut in self.back for codec in cut))

    @cached_property
    def forward(self) -> tuple[tuple[int, ...], ...]:
        """For each cut, its choices as indices into `codecs_there`."""
        return tuple(tuple(self.codecs_there.index(codec) for codec in cut) for cut in self.there)

    @cached_property
    def backward(self) -> tuple[tuple[int, ...], ...]:
        """For each cut, its choices as indices into `codecs_back`."""
        return tuple(tuple(self.codecs_back.index(codec) for codec in cut) for cut in self.back)

    def edges_of(self, value: Value, kind: tuple[int, int]) -> tuple[tuple[Edge, ...], tuple[Edge, ...]]:
        """The edge of a value with each of `codecs_there`, and with each of `codecs_back`.

        What a codec refuses has far too many bytes: a cut that it would cross is taken last, and refused by name.

        Args:
            value: it.
            kind: (0, 1) between two stages, (-1, 1) of an input, (1, 2) of an output; of different workers.
        """
        key = value.name, kind
        if key not in self._edges:
            first_there, first_back = self.codecs_there[0], self.codecs_back[0]
            self._edges[key] = (
                tuple(_edge(value, kind, codec, first_back) for codec in self.codecs_there),
                tuple(_edge(value, kind, first_there, codec) for codec in self.codecs_back),
            )
        return self._edges[key]

    @cached_property
    def _edges(self) -> dict[tuple[str, tuple[int, int]], tuple[tuple[Edge, ...], tuple[Edge, ...]]]:
        """By value and kind."""
        return {}

    def prefixes(self, placement: Placement, chunks: int) -> tuple[FloatArray, FloatArray]:
        """Seconds of a micro-batch of all nodes before each, on a device: forward and backward."""
        is_measured = self.profile.is_measured(placement)
        key = is_measured, placement.spelling if is_measured else placement.device_type
        if key not in self._seconds:
            rows = [self.profile.node(node, placement) for node in self.costs.nodes]
            columns = [(row.forward_s, row.backward_s, row.call_s, row.backward_call_s) for row in rows]
            table = np.array(columns).reshape(-1, 4)
            self._seconds[key] = np.concatenate([np.zeros((1, 4)), table.cumsum(0)]).T
        forward, backward, call, backward_call = self._seconds[key]
        return forward / chunks + call, backward / chunks + backward_call

    @cached_property
    def _seconds(self) -> dict[tuple[bool, str], FloatArray]:
        """[4, nodes + 1] by device, or by type of device if it was not measured."""
        return {}

    @property
    def kept_states(self) -> int | None:
        """Of the optimizer; None for inference, which has no gradients either."""
        return self.states if self.objective.is_training else None

    def stages(self, placements: tuple[Placement, ...], positions: tuple[int, ...]) -> Stages:
        """The model cut there, with what each stage gets and computes again: the same for all codecs."""
        key = placements, positions
        if key not in self._stages:
            if len(self._stages) >= _KEPT_STAGES:
                self._stages.clear()
            whole = Stages(self.costs, placements, positions)
            needs = least_needs(self.costs, placements, whole.stage_of(), self.links)
            self._stages[key] = replace(whole, needs=needs, profile=self.profile, states=self.kept_states)
        return self._stages[key]

    @cached_property
    def _stages(self) -> dict[tuple[tuple[Placement, ...], tuple[int, ...]], Stages]:
        """The latest."""
        return {}

    def outcome(self, times: Times, workers: tuple[str, ...], chunks: int, most_s: float = inf) -> Outcome:
        """What the simulation says; codecs of the same speed and bytes are simulated once.

        A step that is seen not to be below `most_s` is not simulated to its end: its seconds are infinite.

        Raises:
            PlanError: the schedule is not for these stages and micro-batches.
        """
        key = times.stages, tuple(times.forward.items()), tuple(times.backward.items()), workers, chunks
        if key not in self._outcomes:
            found = outcome_of(times, workers, chunks, schedule(self.schedule), self.objective, most_s)
            if found.seconds == inf:
                return found
            self._outcomes[key] = found
        return self._outcomes[key]

    @cached_property
    def _outcomes(self) -> dict[object, Outcome]:
        return {}

    @property
    def rules(self) -> Rules:
        """Of the schedule."""
        return Rules.of(self.schedule)

    def accepts(self, workers: Sequence[str], chunks: int) -> bool:
        """Whether the schedule is for these stages and micro-batches; forwards alone have none but replicas."""
        try:
            if self.objective.is_training:
                schedule(self.schedule).check(workers, chunks)
            else:
                check_replicas(workers, chunks)
        except PlanError:
            return False
        return True

    def options(self) -> Iterator[Option]:
        """The devices that may have stages, the client's first always among them, with each number of chunks."""
        rest = range(1, len(self.placements))
        kept = [range(1, len(self.placements))] if not self.leaves_out else [
            chosen for size in range(len(self.placements)) for chosen in combinations(rest, size)
        ]  # fmt: skip
        for stages in kept:
            for chunks in self.chunks:
                placements = tuple(self.placements[stage] for stage in (0, *stages))
                yield Option(placements, tuple(stage - 1 for stage in stages), chunks)

    def is_small(self, most: int) -> bool:
        """Whether there are at most so many choices of cuts."""
        return self.given is not None or sum(len(self.positions) ** len(o.cuts) for o in self.options()) <= most


def _edge(value: Value, kind: tuple[int, int], there: Compressor, back: Compressor) -> Edge:
    try:
        return Codecs((there,), (back,)).edge(value, *kind, ("one", "other"))
    except CompressorError:
        many = _TOO_MANY_BYTES
        return Edge(value.name, *kind, value.spec, value.nbytes, many, many, str(there), str(back))
