"""Schedules: each action once, causal, free of deadlock, on every number of stages, workers and chunks."""

from __future__ import annotations

import itertools

import pytest

from fxsplit.errors import PlanError
from fxsplit.schedules import SCHEDULES, Action, Schedule, schedule

PLACES = [(0,), (0, 1), (0, 1, 0), (0, 1, 2), (0, 1, 0, 1), (0, 0, 1)]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("workers", "chunks"), list(itertools.product(PLACES, [1, 2, 5])))
def test_every_schedule_runs_to_its_end(kind: type[Schedule], workers: tuple[int, ...], chunks: int) -> None:
    queues = {
        worker: kind().actions([s for s, w in enumerate(workers) if w == worker], len(workers), chunks)
        for worker in set(workers)
    }
    everything = [action for queue in queues.values() for action in queue]
    assert len(everything) == len(set(everything)) == 2 * len(workers) * chunks
    done: set[Action] = set()
    while any(queues.values()):
        ready = [queue for queue in queues.values() if queue and _may_run(queue[0], len(workers), done)]
        assert ready, f"deadlock before {[str(queue[0]) for queue in queues.values() if queue]}"
        for queue in ready:
            done.add(queue.pop(0))


def _may_run(action: Action, stages: int, done: set[Action]) -> bool:
    needed = []
    if action.backward:
        needed.append(Action(action.stage, action.micro_batch))
        if action.stage + 1 < stages:
            needed.append(Action(action.stage + 1, action.micro_batch, backward=True))
    elif action.stage:
        needed.append(Action(action.stage - 1, action.micro_batch))
    return all(n in done for n in needed)


def test_gpipe_cell_by_cell() -> None:
    actions = schedule("gpipe").actions([0, 2], 3, 2)
    assert " ".join(map(str, actions)) == "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1"


def test_an_unknown_schedule() -> None:
    with pytest.raises(PlanError, match="gpipe"):
        schedule("zigzag")
