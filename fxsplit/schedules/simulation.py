"""Simulation of a step: who does what when, and how much is kept meanwhile. No tensor, no worker.

A worker has one thread that computes, one that encodes and sends, and one that receives and decodes; each
direction of a link carries one packet after the other. That is how `fxsplit.runtime` runs, so that a schedule
which gets to its end here gets to its end there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxsplit.errors import PlanError
from fxsplit.schedules.action import Action, Orders, Work
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
        live: micro-batches that each stage keeps activations of at one time, at most.
        live_bytes: worker -> bytes of activations that it keeps at one time, at most.
    """

    spans: tuple[Span, ...]
    step_s: float
    live: tuple[int, ...]
    live_bytes: Mapping[str, int]

    def busy_s(self, resource: str) -> float:
        """Seconds that a resource works."""
        return sum(span.end_s - span.start_s for span in self.spans if span.resource == resource)


class Clock:
    """The state of a simulation: what has been done, and when each resource is free again."""

    def __init__(self, workers: Sequence[str], times: Times) -> None:
        self.workers = tuple(workers)
        self.times = times
        self.spans: list[Span] = []
        self.live = [0] * len(self.workers)
        self.most_live = [0] * len(self.workers)
        self.most_bytes: dict[str, int] = dict.fromkeys(self.workers, 0)
        self._free: defaultdict[str, float] = defaultdict(float)
        self._done: dict[Action, float] = {}
        self._arrived: dict[tuple[int, int, int], float] = {}  # (from stage, to stage, micro-batch)

    def free_s(self, worker: str) -> float:
        """When a worker has done what it was given."""
        return self._free[worker]

    def missing(self, action: Action) -> str | None:
        """What has to be done before an action can be, if anything."""
        stage, m = action.stage, action.micro_batch
        if action.is_forward:
            needed = [(s, stage, m) for s in self.times.sources(stage)]
        elif action.work is Work.WEIGHT:
            before = Action(stage, m, Work.INPUT)
            return None if before in self._done else str(before)
        else:
            if Action(stage, m) not in self._done:
                return str(Action(stage, m))
            needed = [(t, stage, m) for t in self.times.targets(stage)]
        for source, target, _ in needed:
            if (source, target, m) not in self._arrived:
                return f"{'F' if action.is_forward else 'B'}{source}.{m}"
        return None

    def ready_s(self, action: Action) -> float:
        """When all that an action needs is there; nothing of it may be missing."""
        stage, m = action.stage, action.micro_batch
        if action.is_forward:
            return max((self._arrived[s, stage, m] for s in self.times.sources(stage)), default=0.0)
        if action.work is Work.WEIGHT:
            return self._done[Action(stage, m, Work.INPUT)]
        arrived = [self._arrived[t, stage, m] for t in self.times.targets(stage)]
        return max([self._done[Action(stage, m)], *arrived])

    def run(self, action: Action) -> None:
        """Does an action of which nothing is missing, as soon as its worker is free."""
        stage, m, worker = action.stage, action.micro_batch, self.workers[action.stage]
        begin = max(self._free[worker], self.ready_s(action))
        end = begin + self._seconds(action)
        self._free[worker] = self._done[action] = end
        self.spans.append(Span(worker, action, begin, end))
        if action.is_forward:
            self._keep(stage, 1)
            for target in self.times.targets(stage):
                hop = self.times.forward.get((stage, target), Hop())
                self._arrived[stage, target, m] = self._send(action, target, hop, end)
        elif action.sends_gradients:
            for source in self.times.sources(stage):
                hop = self.times.backward.get((source, stage), Hop())
                self._arrived[stage, source, m] = self._send(action, source, hop, end)
        if action.work in (Work.BACKWARD, Work.WEIGHT):
            self._keep(stage, -1)

    def timeline(self) -> Timeline:
        """What was simulated so far."""
        end = max((span.end_s for span in self.spans), default=0.0)
        return Timeline(tuple(self.spans), end, tuple(self.most_live), dict(self.most_bytes))

    def _seconds(self, action: Action) -> float:
        stage = self.times.stages[action.stage]
        return {
            Work.FORWARD: stage.forward_s,
            Work.BACKWARD: stage.backward_s,
            Work.INPUT: stage.input_s,
            Work.WEIGHT: stage.weight_s,
        }[action.work]

    def _send(self, action: Action, target: int, hop: Hop, made_s: float) -> float:
        """When the results of an action are where another stage can use them."""
        here, there = self.workers[action.stage], self.workers[target]
        if here == there:
            return made_s
        encoded = self._occupy(f"{here} encode", action, made_s, hop.encode_s)
        sent = self._occupy(f"{here} -> {there}", action, encoded, hop.wire_s)
        return self._occupy(f"{there} decode", action, sent + hop.latency_s, hop.decode_s)

    def _occupy(self, resource: str, action: Action, from_s: float, seconds: float) -> float:
        if not seconds:
            return from_s
        begin = max(from_s, self._free[resource])
        self._free[resource] = begin + seconds
        self.spans.append(Span(resource, action, begin, begin + seconds))
        return begin + seconds

    def _keep(self, stage: int, change: int) -> None:
        self.live[stage] += change
        self.most_live[stage] = max(self.most_live[stage], self.live[stage])
        worker = self.workers[stage]
        held = sum(
            live * self.times.stages[s].live_bytes for s, live in enumerate(self.live) if self.workers[s] == worker
        )
        self.most_bytes[worker] = max(self.most_bytes[worker], held)


def simulate(orders: Orders, workers: Sequence[str], times: Times) -> Timeline:
    """Runs a step's orders through stages and links.

    Args:
        orders: the actions of each worker.
        workers: the worker of each stage.
        times: what they take.

    Raises:
        PlanError: the workers wait for each other for ever; the message says who waits for what.
    """
    clock = Clock(workers, times)
    left = {worker: list(reversed(actions)) for worker, actions in orders.items() if actions}
    while left:
        able = [worker for worker, actions in left.items() if clock.missing(actions[-1]) is None]
        if not able:
            waiting = [f"{w}: {a[-1]} waits for {clock.missing(a[-1])}" for w, a in left.items()]
            raise PlanError(
                "the schedule stands still: its workers wait for each other",
                found="; ".join(waiting),
                allowed="an order in which some worker can always go on",
            )
        worker = min(able, key=lambda w: max(clock.free_s(w), clock.ready_s(left[w][-1])))
        clock.run(left[worker].pop())
        if not left[worker]:
            del left[worker]
    return clock.timeline()


def check(orders: Orders, workers: Sequence[str], chunks: int, times: Times) -> Timeline:
    """Checks that orders are a whole training step that gets to its end; returns its simulation.

    Raises:
        PlanError: an action is missing, twice, or on a worker that has not its stage; the micro-batches of a
            stage are out of order; or the workers wait for each other.
    """
    for worker, actions in orders.items():
        for action in actions:
            if not 0 <= action.stage < len(workers) or workers[action.stage] != worker:
                raise PlanError("a worker was given an action of another's stage", where=worker, found=str(action))
    for stage, worker in enumerate(workers):
        own = [action for action in orders.get(worker, ()) if action.stage == stage]
        done: dict[Work, list[int]] = {work: [a.micro_batch for a in own if a.work is work] for work in Work}
        everything = list(range(chunks))
        back = done[Work.BACKWARD] or done[Work.INPUT]
        if done[Work.FORWARD] != everything or back != everything or done[Work.WEIGHT] != done[Work.INPUT]:
            raise PlanError(
                "the schedule does not do each micro-batch of a stage once, in their order",
                where=f"stage {stage} on {worker}",
                found=" ".join(map(str, own)),
                allowed=f"F and B, or F, I and W, of micro-batches 0 to {chunks - 1}",
            )
    return simulate(orders, workers, times)
