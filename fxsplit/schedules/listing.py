"""List scheduling: a worker that is free does what is most urgent of what can be done.

The method is Graham's (Bounds on multiprocessing timing anomalies, 1969). With the priorities of one-forward-
one-backward and a limit on what is kept it gives the schedules of the literature; with measured times and the
longest path as the priority it fits itself to slow links and uneven devices.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any

from fxsplit.schedules.action import Action, Work
from fxsplit.schedules.replicas import single_workers
from fxsplit.schedules.simulation import Clock
from fxsplit.schedules.times import Hop, Times

Priority = Callable[[Action], Any]
"""The least is the most urgent."""


def list_schedule(
    workers: Sequence[str],
    chunks: int,
    times: Times,
    priority: Priority,
    live_limit: Callable[[int], int] | None = None,
    is_split: bool = False,
) -> dict[str, list[Action]]:
    """The orders in which no worker is idle while it could work.

    Args:
        workers: the worker of each stage.
        chunks: micro-batches.
        times: what the work takes.
        priority: what comes first of what could begin at the same time.
        live_limit: micro-batches that a stage, or each of its replicas, may keep; all if None. With limits that do
            not grow from stage to stage there is no deadlock: the oldest micro-batch can always go on.
        is_split: whether backwards are done in two parts.
    """
    return listed(workers, chunks, times, priority, live_limit, is_split)[0]


def listed(
    workers: Sequence[str],
    chunks: int,
    times: Times,
    priority: Priority,
    live_limit: Callable[[int], int] | None = None,
    is_split: bool = False,
    most_s: float = inf,
) -> tuple[dict[str, list[Action]], Clock]:
    """The orders of `list_schedule`, and the simulation in which they were found; of a late one, the beginning."""
    clock, count = Clock(workers, times, chunks, most_s), len(workers)
    kinds = (Work.FORWARD, Work.INPUT, Work.WEIGHT) if is_split else (Work.FORWARD, Work.BACKWARD)
    queues = _queues(priority, count, chunks, kinds)
    limits = [chunks if live_limit is None else live_limit(stage) for stage in range(count)]
    next_of = dict.fromkeys(queues, 0)
    orders: dict[str, list[Action]] = {worker: [] for worker in single_workers(workers)}
    able: list[tuple[float, int, Action]] = []  # the times may be out of date: then they are too early
    offered: set[tuple[int, Work]] = set()

    def offer(stage: int) -> None:
        for work in kinds:
            head = next_of[stage, work]
            if head == chunks or (stage, work) in offered:
                continue
            place, action = queues[stage, work][head]
            is_full = work is Work.FORWARD and clock.live(action) >= limits[stage]
            if not is_full and clock.is_able(action):
                offered.add((stage, work))
                heapq.heappush(able, (clock.begin_s(action), place, action))

    for stage in range(count):
        offer(stage)
    while able and not clock.is_late:
        begin, place, action = able[0]
        if (now := clock.begin_s(action)) > begin:
            heapq.heapreplace(able, (now, place, action))
            continue
        heapq.heappop(able)
        offered.discard((action.stage, action.work))
        next_of[action.stage, action.work] += 1
        orders[clock.worker_of(action.stage, action.micro_batch)].append(action)
        for stage in clock.run(action):
            offer(stage)
    return orders, clock


@lru_cache(maxsize=64)  # a planner asks for the same again and again
def _queues(
    priority: Priority, count: int, chunks: int, kinds: tuple[Work, ...]
) -> Mapping[tuple[int, Work], Sequence[tuple[int, Action]]]:
    """For each stage and kind of work: its actions by micro-batch, each with its place among all actions."""
    actions = [Action(stage, m, work) for stage in range(count) for work in kinds for m in range(chunks)]
    actions.sort(key=lambda a: (priority(a), a.stage, a.micro_batch, a.work))
    queues: dict[tuple[int, Work], list[tuple[int, Action]]] = {(s, w): [] for s in range(count) for w in kinds}
    for place, action in enumerate(actions):
        queues[action.stage, action.work].append((place, action))
    for queue in queues.values():
        queue.sort(key=lambda entry: entry[1].micro_batch)
    return queues


def backward_first(action: Action) -> Any:
    """Backwards before forwards, of these the deepest; weight gradients when there is nothing else to do."""
    order = {Work.BACKWARD: 0, Work.INPUT: 0, Work.FORWARD: 1, Work.WEIGHT: 2}
    return order[action.work], action.micro_batch if action.sends_gradients else -action.stage, action.micro_batch


@dataclass(frozen=True)
class _LongestFirst:
    """A priority for each stage; equal for all times that rank the stages in the same way.

    Attributes:
        ahead: of the forwards: the place of the way from there to the end of the step, the longest first.
        back: the same of the backwards.
    """

    ahead: tuple[int, ...]
    back: tuple[int, ...]

    def __call__(self, action: Action) -> Any:
        if action.work is Work.WEIGHT:
            return 1, 0, action.micro_batch
        return 0, (self.ahead if action.is_forward else self.back)[action.stage], action.micro_batch


def longest_path_first(times: Times) -> Priority:
    """What has the longest way before it to the end of the step comes first."""
    count = len(times.stages)
    sources, targets = times.neighbours
    back = [0.0] * count
    for stage in range(count):
        hops = [(s, times.backward.get((s, stage), Hop())) for s in sources[stage]]
        after = max((_whole(hop) + back[s] for s, hop in hops), default=0.0)
        back[stage] = times.stages[stage].backward_s + after
    ahead = [0.0] * count
    for stage in reversed(range(count)):
        hops = [(t, times.forward.get((stage, t), Hop())) for t in targets[stage]]
        after = max((_whole(hop) + ahead[t] for t, hop in hops), default=back[stage])
        ahead[stage] = times.stages[stage].forward_s + after
    place = {way: index for index, way in enumerate(sorted({*ahead, *back}, reverse=True))}
    return _LongestFirst(tuple(place[way] for way in ahead), tuple(place[way] for way in back))


def _whole(hop: Hop) -> float:
    return hop.encode_s + hop.wire_s + hop.latency_s + hop.decode_s
