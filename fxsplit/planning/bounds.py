"""A proven lower bound of the simulated time of a step, for very many candidates at once.

One micro-batch passes all stages and hops one after another, forward and back: no step is shorter than this path.
And whatever does one thing at a time (the thread that computes, encodes or decodes of a worker; one direction of
a link) does its work of all micro-batches after the way to its first piece of work, and before the way on from its
last (the machine bound of flow shops, e.g. Lageweg, Lenstra, Rinnooy Kan 1978). With GPipe, no backward begins
before the last stage's forwards are done, so that both phases have their own bounds, which add up; on stages of
different workers in a chain that is exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import lcm
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fxsplit.planning.predict import Objective
from fxsplit.schedules.replicas import replica_counts, replicas_of

FloatArray = NDArray[np.float64]


class HopBound(NamedTuple):
    """At least so many seconds of a hop, for one micro-batch; each an array over the candidates.

    Attributes:
        total: of all of it, without the latency.
        latency: that comes to it.
        encode: of the sender's encoder.
        wire: of the link.
        decode: of the receiver's decoder.
    """

    total: FloatArray
    latency: FloatArray
    encode: FloatArray
    wire: FloatArray
    decode: FloatArray


class _Use(NamedTuple):
    """A piece of work that a resource does for every micro-batch, with the ways before it and after it.

    Of replicas, the load is the share that the busiest has at least.
    """

    resource: object
    load: FloatArray
    head: FloatArray
    tail: FloatArray


@dataclass(frozen=True)
class Rules:
    """What of a schedule matters for the bound.

    Attributes:
        has_phases: all forwards come before all backwards, as in GPipe.
        splits_backwards: the gradients of the weights may come later than those of the inputs.
    """

    has_phases: bool
    splits_backwards: bool

    @classmethod
    def of(cls, schedule: str) -> Rules:
        """Those of a schedule."""
        return cls(schedule == "gpipe", schedule in ("zero-bubble", "auto"))


@dataclass(frozen=True)
class Work:
    """The work of one micro-batch, each an array over the candidates.

    Attributes:
        workers: the worker of each stage.
        forward: seconds of the stages' forwards.
        backward: seconds of their backwards.
        there: (source stage, target stage) -> the hop of what is sent.
        back: the same of gradients, under the same keys.
        reduce: seconds of the all-reduce of the stages' gradients, once a step; empty: none.
    """

    workers: Sequence[str]
    forward: Sequence[FloatArray]
    backward: Sequence[FloatArray]
    there: Mapping[tuple[int, int], HopBound]
    back: Mapping[tuple[int, int], HopBound]
    reduce: Sequence[FloatArray] = ()

    def bound(self, chunks: int, rules: Rules, objective: Objective) -> FloatArray:
        """Seconds below which the objective's time does not come."""
        last = len(self.workers) - 1
        arrive = [np.zeros(())]
        for stage in range(last):
            hop = self.there.get((stage, stage + 1))
            arrive.append(arrive[-1] + self.forward[stage] + (0.0 if hop is None else hop.total + hop.latency))
        path = arrive[last] + self.forward[last]
        there = self._forward_uses(arrive, path)
        if objective.name == "throughput":
            return chunks * _largest(_loads(there).values())
        if objective.name == "latency":
            return _bound(there, path, chunks)
        needed = [b / 2 for b in self.backward] if rules.splits_backwards else list(self.backward)
        leave = [self.backward[0]]  # from the beginning of a stage's backward to the end of the step
        for stage in range(1, last + 1):
            hop = self.back.get((stage - 1, stage))
            leave.append(needed[stage] + (0.0 if hop is None else hop.total + hop.latency) + leave[-1])
        back = self._backward_uses(leave, needed, rules)
        whole = [_Use(u.resource, u.load, u.head, u.tail + leave[last]) for u in there]
        whole += [_Use(u.resource, u.load, u.head + path, u.tail) for u in back]
        found = _bound(whole, path + leave[last], chunks)
        if rules.has_phases and len(replicas_of(self.workers[last])) == 1:
            found = np.maximum(found, _bound(there, path, chunks) + _bound(back, leave[last], chunks))
        return found

    def _forward_uses(self, arrive: Sequence[FloatArray], path: FloatArray) -> list[_Use]:
        uses = [
            _Use(worker, seconds / len(replicas_of(worker)), arrive[stage], path - arrive[stage] - seconds)
            for stage, (worker, seconds) in enumerate(zip(self.workers, self.forward, strict=True))
        ]
        for (source, target), hop in self.there.items():
            after = path - arrive[target]
            uses += _hop_uses(
                self.workers[source], self.workers[target], hop, arrive[source] + self.forward[source], after
            )
        return uses

    def _backward_uses(
        self, leave: Sequence[FloatArray], needed: Sequence[FloatArray], rules: Rules
    ) -> list[_Use]:
        last, none = len(self.workers) - 1, np.zeros(())
        uses = [
            _Use(
                worker,
                seconds / len(replicas_of(worker)),
                leave[last] - leave[stage],
                np.maximum(
                    none if rules.splits_backwards else leave[stage] - seconds,
                    self.reduce[stage] if self.reduce else none,
                ),
            )
            for stage, (worker, seconds) in enumerate(zip(self.workers, self.backward, strict=True))
        ]
        for (source, target), hop in self.back.items():
            begun = leave[last] - leave[target] + needed[target]
            uses += _hop_uses(self.workers[target], self.workers[source], hop, begun, leave[source])
        return uses


def _hop_uses(sender: str, receiver: str, hop: HopBound, head: FloatArray, tail: FloatArray) -> list[_Use]:
    after = hop.latency + hop.decode + tail
    out, into = replica_counts((sender, receiver))
    return [
        _Use((sender, "encode"), hop.encode / out, head, hop.wire + after),
        _Use((sender, receiver), hop.wire / lcm(out, into), head + hop.encode, after),
        _Use((receiver, "decode"), hop.decode / into, head + hop.encode + hop.wire + hop.latency, tail),
    ]


def _bound(uses: Iterable[_Use], path: FloatArray, chunks: int) -> FloatArray:
    """The path, or the busiest resource with the least way before and after it, by all of its work or a part."""
    groups: dict[object, list[_Use]] = defaultdict(list)
    for use in uses:
        groups[use.resource].append(use)
    found = [path]
    for group in groups.values():
        found += [np.where(u.load > 0, u.head + chunks * u.load + u.tail, 0.0) for u in group]
        if len(group) == 1:
            continue
        # A resource that a candidate does not use must not lend its short ways to the others.
        heads = reduce(np.minimum, (np.where(u.load > 0, u.head, np.inf) for u in group))
        tails = reduce(np.minimum, (np.where(u.load > 0, u.tail, np.inf) for u in group))
        load: Any = sum(u.load for u in group)
        found.append(np.where(load > 0, heads + tails, 0.0) + chunks * load)
    return _largest(found)


def _loads(uses: Iterable[_Use]) -> dict[object, FloatArray]:
    loads: dict[object, FloatArray] = {}
    for use in uses:
        loads[use.resource] = loads.get(use.resource, np.zeros(())) + use.load
    return loads


def _largest(arrays: Iterable[FloatArray]) -> FloatArray:
    return reduce(np.maximum, arrays)
