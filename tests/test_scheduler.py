"""The orders of a pipeline's steps, as it learns what its stages and links take."""

from __future__ import annotations

import pytest

import fxsplit
from fxsplit.planning import Budget, Plan
from fxsplit.runtime.report import Span
from fxsplit.runtime.scheduler import Scheduler
from fxsplit.schedules import simulate
from tests.test_planning_links import chain


def plan(schedule: str = "auto") -> Plan:
    """Two stages, four micro-batches."""
    return fxsplit.plan(chain(), ["cpu", "a/cpu"], chunks=4, schedule=schedule, budget=Budget(bandwidth=1e9))


def spans(seconds: dict[tuple[str, int, int], float]) -> list[Span]:
    """What a step with these seconds of each kind would report."""
    return [Span(kind, s, t, m, 0.0, each) for (kind, s, t), each in seconds.items() for m in range(4)]


def likely(made: Plan, factor: float = 1.0) -> dict[tuple[str, int, int], float]:
    """What was predicted, times a factor, with whole backwards."""
    return {
        (kind, stage, stage): factor * (times.forward_s if kind == "F" else times.backward_s)
        for stage, times in enumerate(made.times.stages)
        for kind in ("F", "B")
    }


def test_what_was_not_run_changes_as_what_was() -> None:
    made = plan("gpipe")
    before = made.times.stages[1]
    scheduler = Scheduler(made)
    scheduler.observe(spans({("F", 1, 1): 5.0, ("B", 1, 1): 3 * before.backward_s, ("loss", 1, 1): 0.0}))
    after = scheduler.times.stages[1]
    assert after.forward_s == 5.0 and after.backward_s == pytest.approx(3 * before.backward_s)
    assert (after.input_s, after.weight_s) == pytest.approx((3 * before.input_s, 3 * before.weight_s))
    parts = {("I", 1, 1): 0.5 * after.input_s, ("W", 1, 1): 0.5 * after.weight_s}
    scheduler.observe(spans(parts))
    halved = scheduler.times.stages[1]
    assert halved.backward_s == pytest.approx(0.5 * after.backward_s) and halved.forward_s == 5.0


def test_the_loss_counts_once_however_often_it_is_seen() -> None:
    made = plan("gpipe")
    scheduler, seconds = Scheduler(made), likely(made) | {("loss", 1, 1): 1.0}
    seen = []
    for _ in range(8):
        scheduler.observe(spans(seconds))
        seen.append(scheduler.times.stages[1])
    assert seen[-1].backward_s == pytest.approx(made.times.stages[1].backward_s + 1.0)
    assert seen[-1].input_s == pytest.approx(seen[0].input_s)


def test_orders_stay_unless_others_are_clearly_better() -> None:
    made = plan()
    scheduler = Scheduler(made)
    first = scheduler.orders()
    for factor in (1.02, 0.97, 1.01, 1.0):
        scheduler.observe(spans(likely(made, factor)))
        assert scheduler.orders() == first
    slow = {("send", 0, 1): 0.1 * made.predicted_step_s, ("send", 1, 0): 0.1 * made.predicted_step_s}
    for _ in range(4):
        scheduler.observe(spans(likely(made) | slow))
    changed = scheduler.orders()
    assert changed != first
    kept_s, changed_s = (simulate(each, made.workers, scheduler.times).step_s for each in (first, changed))
    assert changed_s < 0.95 * kept_s
