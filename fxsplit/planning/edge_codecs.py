"""Which codec each edge gets, there and back, once the cuts are known.

All that one stage sends to another for a micro-batch goes through one encoder, one link and one decoder, so that
a choice of codecs for its values counts by four sums: seconds of the three, and bytes. These sums are listed value
by value, and a choice whose sums are no less than another's in all four is dropped. With orders that do not follow
times that loses nothing; where they do, list scheduling may by an anomaly make a shorter step of more work, which
is not looked for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fxsplit.compressors import Compressor, Lossless
from fxsplit.costs import Value
from fxsplit.planning.hops import IntArray, Pair
from fxsplit.planning.predict import hop_of
from fxsplit.planning.problem import Option, Problem
from fxsplit.planning.stages import Codecs, Stages
from fxsplit.schedules import Hop

FloatArray = NDArray[np.float64]

MOST_CHOICES = 1 << 16
"""Choices of codecs at one choice of cuts that are bounded one by one."""


class Sums(NamedTuple):
    """What one direction between two stages may take, a row for each choice of codecs.

    Attributes:
        seconds: [rows, 3]: encoder, link and decoder, for one micro-batch.
        wire_bytes: [rows], of the batch.
        chosen: [rows, edges]: index of each edge's codec among those of the problem.
    """

    seconds: FloatArray
    wire_bytes: IntArray
    chosen: IntArray

    @classmethod
    def nothing(cls) -> Sums:
        """Of no edges."""
        return cls(np.zeros((1, 3)), np.zeros(1, np.int64), np.zeros((1, 0), np.int64))

    def plus(self, seconds: FloatArray, wire_bytes: IntArray, codecs: Sequence[int]) -> Sums:
        """With one more edge, with each of its codecs."""
        rows, count = len(self.wire_bytes), len(codecs)
        return Sums(
            (self.seconds[:, None, :] + seconds[None]).reshape(-1, 3),
            (self.wire_bytes[:, None] + wire_bytes[None]).ravel(),
            np.concatenate(
                [np.repeat(self.chosen, count, 0), np.tile(np.array(codecs, np.int64), rows)[:, None]], 1
            ),
        ).least()

    def least(self) -> Sums:
        """The rows that no other row is as low as in everything; of equal rows the one with the first codecs."""
        table = np.concatenate([self.seconds, self.wire_bytes[:, None]], 1)
        first = np.sort(np.unique(table, axis=0, return_index=True)[1])
        table = table[first]
        is_below = (table[:, None, :] <= table[None]).all(-1)
        return self._rows(first[is_below.sum(0) == 1])  # each is as low as itself

    def fastest(self, most: int) -> Sums:
        """So many of the rows that take the least time in all."""
        return self._rows(np.sort(np.argsort(self.seconds.sum(1), kind="stable")[:most]))

    def _rows(self, rows: NDArray[np.intp]) -> Sums:
        return Sums(self.seconds[rows], self.wire_bytes[rows], self.chosen[rows])


@dataclass
class Way:
    """What one stage sends to another, and gets back for it.

    Attributes:
        there: sums of the activations, with the model's inputs if the first stage sends.
        back: sums of their gradients.
        values: the values that have a codec, in the order of `Sums.chosen`.
        latency_s: of the activations' packet; 0 if there is none.
        back_latency_s: of the gradients' packet; 0 if there is none.
    """

    there: Sums
    back: Sums
    values: tuple[str, ...] = ()
    latency_s: float = 0.0
    back_latency_s: float = 0.0


@dataclass(frozen=True)
class EdgeChoices:
    """All choices of codecs at one choice of cuts.

    Attributes:
        ways: source stage and target stage -> what goes there and back.
        is_whole: whether nothing that may be the best was left out.
    """

    ways: dict[Pair, Way]
    is_whole: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of each way, there and back in turns."""
        return tuple(len(each.wire_bytes) for way in self.ways.values() for each in (way.there, way.back))

    def codecs(self, problem: Problem, option: Option, rows: Sequence[int], stages: Stages) -> Codecs:
        """The codecs of a row of each way; a cut has those of its largest edge."""
        found: dict[tuple[str, int], tuple[Compressor, Compressor]] = {}
        for index, ((_, target), way) in enumerate(self.ways.items()):
            there, back = way.there.chosen[rows[2 * index]], way.back.chosen[rows[2 * index + 1]]
            for value, first, second in zip(way.values, there, back, strict=True):
                found[value, target] = problem.codecs_there[first], problem.codecs_back[second]
        nbytes = {value.name: value.nbytes for value, _, _, _ in stages.crossings}
        forward, backward = list[Compressor](), list[Compressor]()
        for target, cut in enumerate(option.cuts, 1):
            edges = [key for key in found if key[1] == target]
            plain = problem.there[cut][0], problem.back[cut][0]
            first_codec, second_codec = found[max(edges, key=lambda key: nbytes[key[0]])] if edges else plain
            forward.append(first_codec)
            backward.append(second_codec)
        others = {
            (value, target): pair
            for (value, target), pair in found.items()
            if pair != (forward[target - 1], backward[target - 1])
        }
        return Codecs(tuple(forward), tuple(backward), others)


def edge_choices(problem: Problem, option: Option, stages: Stages) -> EdgeChoices:
    """The choices at given cuts.

    Args:
        problem: what may be chosen.
        option: the stages' devices and the number of micro-batches.
        stages: the model cut, with what each stage needs.
    """
    ways: dict[Pair, Way] = defaultdict(lambda: Way(Sums.nothing(), Sums.nothing()))
    count, is_whole = len(option.placements), True
    for value, source, target, is_sent in stages.crossings:
        pair = max(source, 0), target
        if is_sent and target < count and stages.workers[pair[0]] != stages.workers[target]:
            _add(problem, option, ways[pair], value, (source, target))
    most = max((len(s.chosen) for way in ways.values() for s in (way.there, way.back)), default=1)
    while math.prod(len(s.chosen) for way in ways.values() for s in (way.there, way.back)) > MOST_CHOICES:
        most, is_whole = most - 1, False
        for way in ways.values():
            way.there, way.back = way.there.fastest(most), way.back.fastest(most)
    return EdgeChoices(dict(ways), is_whole)


def _add(problem: Problem, option: Option, way: Way, value: Value, ends: Pair) -> None:
    """Adds an edge, there and, if it has a gradient, back."""
    source, target = ends
    cut, is_coded = option.cuts[target - 1], value.is_compressible and source >= 0
    here, other = option.placements[max(source, 0)], option.placements[target]
    there, back = problem.edges_of(value, (-1, 1) if source < 0 else (0, 1))
    first = [(problem.codecs_there[i], e.wire_bytes) for i, e in enumerate(there)]
    second = [(problem.codecs_back[i], e.gradient_wire_bytes) for i, e in enumerate(back)]
    if is_coded:
        way.values += (value.name,)
    has_gradient = any(count for _, count in second)
    for sums, rows, allowed, sender, receiver, is_sent in (
        ("there", first, problem.forward[cut], here, other, True),
        ("back", second, problem.backward[cut], other, here, has_gradient),
    ):
        if not is_coded or not is_sent:
            allowed = allowed[:1]
        hops = [
            hop_of(
                value.nbytes, rows[i][1], rows[i][0] if is_coded else Lossless(), sender, receiver,
                problem.links, problem.profile, option.chunks,
            )
            for i in allowed
        ] if is_sent else [Hop()]  # fmt: skip
        table = np.array([(hop.encode_s, hop.wire_s, hop.decode_s) for hop in hops])
        added = getattr(way, sums).plus(table, np.array([rows[i][1] for i in allowed], np.int64), allowed)
        setattr(way, sums, added if is_coded else added._replace(chosen=added.chosen[:, :-1]))
    way.latency_s = max(way.latency_s, problem.links.between(here.worker, other.worker).latency_s)
    if has_gradient:
        way.back_latency_s = max(way.back_latency_s, problem.links.between(other.worker, here.worker).latency_s)
