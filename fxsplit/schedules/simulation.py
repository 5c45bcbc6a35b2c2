"""Simulation of a step: who does what when, and how much is kept meanwhile. No tensor, no worker.

A worker has one thread that computes, one that encodes and sends, and one that receives and decodes; each
direction of a link carries one packet after the other. That is how `fxsplit.runtime` runs, so that a schedule
which gets to its end here gets to its end there.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, lcm

from fxsplit.errors import PlanError
from fxsplit.schedules.action import Action, Orders, Work
from fxsplit.schedules.replicas import replica_for, replicas_of, single_workers
from fxsplit.schedules.times import Hop, Times


@dataclass(frozen=True)
class Span:
    """One piece of work in a timeline.

    Attributes:
        resource: "worker", "worker encode", "worker decode" or "worker -> worker".
        action: the action, or the one whose results are on their way.
        start_s: seconds from the beginning of the step.
        end_s: the same, of its end.
    """

    resource: str
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes:
        spans: all pieces of work, in the order of the simulation.
        step_s: seconds of the step.
        live: micro-batches that each stage, or a replica of it, keeps activations of at one time, at most.
        live_bytes: worker -> bytes of activations that it keeps at one time, at most.
    """

    spans: tuple[Span, ...]
    step_s: float
    live: tuple[int, ...]
    live_bytes: Mapping[str, int]

    def busy_s(self, resource: str) -> float:
        """Seconds that a resource works."""
        return sum(span.end_s - span.start_s for span in self.spans if span.resource == resource)

    def bubble_share(self, worker: str) -> float:
        """The share of the step in which a worker computes nothing (the bubble of Huang et al., GPipe, 2019).

        >>> from fxsplit.schedules import Times, schedule
        >>> times = Times.unit(2)
        >>> simulate(schedule("gpipe").orders(["a", "b"], 3, times), ["a", "b"], times).bubble_share("a")
        0.25
        """
        return 1.0 - self.busy_s(worker) / self.step_s if self.step_s else 0.0


_Send = tuple[int, float, int, float, float, int, float]
"""Of a hop: encoder, its seconds, link, its seconds, latency, decoder, its seconds."""


class Clock:
    """The state of a simulation: what has been done, and when each resource is free again.

    Args:
        workers: the worker of each stage.
        times: what the work takes.
        chunks: micro-batches of the step; needed for `most_s` only.
        most_s: a step that is not below is not worth its simulation.

    Attributes:
        is_late: whether some worker has been idle for so long that the step cannot be below `most_s`.
    """

    def __init__(self, workers: Sequence[str], times: Times, chunks: int = 0, most_s: float = inf) -> None:
        self.workers = tuple(workers)
        self.times = times
        self.step_s = 0.0
        count = self._count = len(self.workers)
        self.most_live = [0] * count
        self._names: dict[str, int] = {}
        self._free: list[float] = []
        self._homes = [[self._resource(name) for name in replicas_of(worker)] for worker in self.workers]
        self._live = [[0] * len(homes) for homes in self._homes]
        self._held, self._most_held = [0] * len(self._free), [0] * len(self._free)
        self._seconds: dict[Work, list[float]] = {
            Work.FORWARD: [stage.forward_s for stage in times.stages],
            Work.BACKWARD: [stage.backward_s for stage in times.stages],
            Work.INPUT: [stage.input_s for stage in times.stages],
            Work.WEIGHT: [stage.weight_s for stage in times.stages],
        }
        self._sources, self._targets = times.neighbours
        ways = range(count)
        self._out = [[(t, self._ways(s, t, times.forward.get((s, t)))) for t in self._targets[s]] for s in ways]
        self._back = [[(s, self._ways(t, s, times.backward.get((s, t)))) for s in self._sources[t]] for t in ways]
        # Of forwards, gradients and weight gradients: when all that came so far was there, and how much came.
        self._ready: tuple[dict[int, float], ...] = ({}, {}, {})
        self._came: tuple[dict[int, int], ...] = ({}, {}, {})
        self._needed = (
            [len(sources) for sources in self._sources],
            [len(targets) + 1 for targets in self._targets],
            [1] * count,
        )
        self._log: list[tuple[int, Action, float, float]] = []
        self._spare = [most_s] * len(self._free)  # seconds that each worker may still be idle
        for homes, stage in zip(self._homes, times.stages, strict=True):
            least_s = min(stage.backward_s, stage.input_s + stage.weight_s)
            for replica, home in enumerate(homes):
                self._spare[home] -= len(range(replica, chunks, len(homes))) * (stage.forward_s + least_s)
        self.is_late = min(self._spare) <= 0.0

    def worker_of(self, stage: int, micro_batch: int) -> str:
        """Who does a micro-batch of a stage."""
        return replica_for(self.workers[stage], micro_batch)

    def live(self, action: Action) -> int:
        """The micro-batches that whoever does an action keeps of its stage."""
        live = self._live[action.stage]
        return live[action.micro_batch % len(live)]

    def begin_s(self, action: Action) -> float:
        """When an action can begin; nothing of what it needs may be missing."""
        homes = self._homes[action.stage]
        ready = self._ready[_GROUP[action.work]].get(action.micro_batch * self._count + action.stage, 0.0)
        free = self._free[homes[action.micro_batch % len(homes)]]
        return ready if ready > free else free

    def is_able(self, action: Action) -> bool:
        """Whether nothing is missing of what an action needs."""
        group, stage = _GROUP[action.work], action.stage
        return self._came[group].get(action.micro_batch * self._count + stage, 0) >= self._needed[group][stage]

    def missing(self, action: Action) -> str | None:
        """What has to be done before an action can be, if anything."""
        stage, m = action.stage, action.micro_batch
        if action.is_forward:
            needed = [Action(source, m) for source in self._sources[stage]]
        elif action.work is Work.WEIGHT:
            needed = [Action(stage, m, Work.INPUT)]
        else:
            needed = [Action(stage, m), *(Action(target, m, Work.BACKWARD) for target in self._targets[stage])]
        done = {(a.stage, a.micro_batch, a.is_forward, a.work is Work.WEIGHT) for _, a, _, _ in self._log}
        for each in needed:
            if (each.stage, m, each.is_forward, False) not in done:
                return str(each)
        return None

    def run(self, action: Action) -> list[int]:
        """Does an action of which nothing is missing, as soon as its worker is free; returns who got something."""
        stage, m, work = action.stage, action.micro_batch, action.work
        first = m * self._count
        home = self._homes[stage][m % len(self._homes[stage])]
        begin = self.begin_s(action)
        end = begin + self._seconds[work][stage]
        if begin > self._free[home]:
            self._spare[home] -= begin - self._free[home]
            self.is_late = self.is_late or self._spare[home] <= 0.0
        self._free[home] = end
        self._note(home, action, begin, end)
        touched = [stage]
        if work is Work.FORWARD:
            self._keep(stage, m, 1)
            self._arrive(1, first + stage, end)
            for target, ways in self._out[stage]:
                way = ways[m % len(ways)]
                self._arrive(0, first + target, end if way is None else self._send(action, way, end))
                touched.append(target)
        elif work is not Work.WEIGHT:
            self._arrive(2, first + stage, end)
            for source, ways in self._back[stage]:
                way = ways[m % len(ways)]
                self._arrive(1, first + source, end if way is None else self._send(action, way, end))
                touched.append(source)
        if work is Work.BACKWARD or work is Work.WEIGHT:
            self._keep(stage, m, -1)
            # The replicas' gradients are summed when the last of them is done.
            self.step_s = max(self.step_s, end + self.times.stages[stage].reduce_s)
        return touched

    def timeline(self) -> Timeline:
        """What was simulated so far."""
        names = list(self._names)
        spans = tuple(Span(names[resource], action, begin, end) for resource, action, begin, end in self._log)
        held = {worker: self._most_held[self._names[worker]] for worker in single_workers(self.workers)}
        return Timeline(spans, self.step_s, tuple(self.most_live), held)

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions in the order in which they were run."""
        homes = {home for homes in self._homes for home in homes}
        return tuple(action for resource, action, _, _ in self._log if resource in homes)

    @property
    def most_bytes(self) -> int:
        """Bytes of activations that all workers keep, each at its most."""
        return sum(self._most_held)

    def _resource(self, name: str) -> int:
        index = self._names.setdefault(name, len(self._names))
        if index == len(self._free):
            self._free.append(0.0)
        return index

    def _ways(self, sender: int, receiver: int, hop: Hop | None) -> list[_Send | None]:
        """What a packet passes from one stage to another, by its micro-batch modulo their number."""
        ends = self.workers[sender], self.workers[receiver]
        count = lcm(*(len(replicas_of(worker)) for worker in ends))
        return [self._way(replica_for(ends[0], m), replica_for(ends[1], m), hop) for m in range(count)]

    def _way(self, here: str, there: str, hop: Hop | None) -> _Send | None:
        """What a packet passes from one worker to another; None if it is there at once."""
        if here == there or hop is None:
            return None
        names = (f"{here} encode", f"{here} -> {there}", f"{there} decode")
        encoder, link, decoder = (self._resource(name) for name in names)
        return encoder, hop.encode_s, link, hop.wire_s, hop.latency_s, decoder, hop.decode_s

    def _send(self, action: Action, way: _Send, made_s: float) -> float:
        """When the results of an action are where another stage can use them."""
        encoder, encode_s, link, wire_s, latency_s, decoder, decode_s = way
        encoded = self._occupy(encoder, action, made_s, encode_s)
        sent = self._occupy(link, action, encoded, wire_s)
        return self._occupy(decoder, action, sent + latency_s, decode_s)

    def _occupy(self, resource: int, action: Action, from_s: float, seconds: float) -> float:
        if not seconds:
            return from_s
        free = self._free[resource]
        begin = from_s if from_s > free else free
        end = self._free[resource] = begin + seconds
        self._note(resource, action, begin, end)
        return end

    def _note(self, resource: int, action: Action, begin: float, end: float) -> None:
        self._log.append((resource, action, begin, end))
        if end > self.step_s:
            self.step_s = end

    def _arrive(self, group: int, key: int, seconds: float) -> None:
        came, ready = self._came[group], self._ready[group]
        came[key] = came.get(key, 0) + 1
        if seconds > ready.get(key, 0.0):
            ready[key] = seconds

    def _keep(self, stage: int, micro_batch: int, change: int) -> None:
        replica = micro_batch % len(self._homes[stage])
        live = self._live[stage][replica] = self._live[stage][replica] + change
        home = self._homes[stage][replica]
        held = self._held[home] = self._held[home] + change * self.times.stages[stage].live_bytes
        if change > 0:
            self.most_live[stage] = max(self.most_live[stage], live)
            self._most_held[home] = max(self._most_held[home], held)


_GROUP = {Work.FORWARD: 0, Work.BACKWARD: 1, Work.INPUT: 1, Work.WEIGHT: 2}


def simulate(orders: Orders, workers: Sequence[str], times: Times) -> Timeline:
    """Runs a step's orders through stages and links.

    Args:
        orders: the actions of each worker.
        workers: the worker of each stage.
        times: what they take.

    Raises:
        PlanError: the workers wait for each other for ever; the message says who waits for what.
    """
    return replayed(orders, workers, times).timeline()


def replayed(orders: Orders, workers: Sequence[str], times: Times, chunks: int = 0, most_s: float = inf) -> Clock:
    """The simulation of orders at its end, or where it was late; as `simulate`, for those who need no spans."""
    clock = Clock(workers, times, chunks, most_s)
    left = {worker: iter(actions) for worker, actions in orders.items()}
    heads = {worker: head for worker, actions in left.items() if (head := next(actions, None)) is not None}
    rank = {worker: index for index, worker in enumerate(orders)}
    able = [(clock.begin_s(head), rank[w], w) for w, head in heads.items() if clock.is_able(head)]
    heapq.heapify(able)
    waiting = heads.keys() - {worker for _, _, worker in able}
    while able:
        if clock.is_late:
            return clock
        _, _, worker = heapq.heappop(able)
        action = heads.pop(worker)
        touched = clock.run(action)
        if (head := next(left[worker], None)) is not None:
            heads[worker] = head
            waiting.add(worker)
        for stage in touched:
            other = clock.worker_of(stage, action.micro_batch)
            if other in waiting and clock.is_able(heads[other]):
                waiting.discard(other)
                heapq.heappush(able, (clock.begin_s(heads[other]), rank[other], other))
    if heads:
        raise PlanError(
            "the schedule stands still: its workers wait for each other",
            found="; ".join(f"{w}: {head} waits for {clock.missing(head)}" for w, head in heads.items()),
            allowed="an order in which some worker can always go on",
        )
    return clock


def check(orders: Orders, workers: Sequence[str], chunks: int, times: Times) -> Timeline:
    """Checks that orders are a whole training step that gets to its end; returns its simulation.

    Raises:
        PlanError: an action is missing, twice, or on a worker that has not its stage; the micro-batches of a
            stage are out of order; or the workers wait for each other.
    """
    for worker, actions in orders.items():
        for action in actions:
            is_stage = 0 <= action.stage < len(workers)
            if not is_stage or replica_for(workers[action.stage], action.micro_batch) != worker:
                raise PlanError("a worker was given an action of another's stage", where=worker, found=str(action))
    teams = [replicas_of(worker) for worker in workers]
    for stage, replica, worker in [(s, r, name) for s, team in enumerate(teams) for r, name in enumerate(team)]:
        own = [action for action in orders.get(worker, ()) if action.stage == stage]
        done: dict[Work, list[int]] = {work: [a.micro_batch for a in own if a.work is work] for work in Work}
        count = len(teams[stage])
        everything = list(range(replica, chunks, count))
        back = done[Work.BACKWARD] or done[Work.INPUT]
        if done[Work.FORWARD] != everything or back != everything or done[Work.WEIGHT] != done[Work.INPUT]:
            raise PlanError(
                "the schedule does not do each micro-batch of a stage once, in their order",
                where=f"stage {stage} on {worker}",
                found=" ".join(map(str, own)),
                allowed=f"F and B, or F, I and W, of micro-batches {replica} to {chunks - 1}, every {count}.",
            )
    return simulate(orders, workers, times)
