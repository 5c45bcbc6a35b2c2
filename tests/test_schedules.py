"""Schedules: each action once, causal, free of deadlock, within their memory, wherever the stages are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from fxsplit.errors import PlanError
from fxsplit.schedules import SCHEDULES, Action, Hop, Schedule, StageTimes, Times, Work, check, schedule, simulate

PLACES = ["a", "ab", "aba", "abc", "abab", "aab", "abcd"]


def takes(kind: type[Schedule], workers: Sequence[str], chunks: int) -> bool:
    """Whether a schedule is for these workers and micro-batches."""
    if kind.name in ("gpipe", "auto"):
        return True
    return chunks >= len(workers) and (kind.name != "1f1b" or len(set(workers)) == len(workers))


def uneven(stages: int) -> Times:
    """Stages and links of which no two are equal."""
    pairs = [(s, t) for s in range(stages) for t in range(s + 1, min(s + 3, stages))]  # skips of two, too
    hops = {(s, t): Hop(0.1 * s + 0.1, 0.7 + 0.3 * t, 0.05, 0.2) for s, t in pairs}
    return Times(tuple(StageTimes(1.0 + s, 1.5, 0.5 + s, 10 + s) for s in range(stages)), hops, hops)


@pytest.mark.parametrize("kind", SCHEDULES, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("workers", "chunks"), list(itertools.product(PLACES, [1, 2, 5])))
def test_every_schedule_is_a_whole_step_within_its_memory(kind: type[Schedule], workers: str, chunks: int) -> None:
    made = kind()
    for times in (Times.unit(len(workers)), uneven(len(workers))):
        if not takes(kind, workers, chunks):
            with pytest.raises(PlanError, match=kind.name):
                made.orders(workers, chunks, times)
            continue
        orders = made.orders(workers, chunks, times)
        timeline = check(orders, workers, chunks, times)
        everything = [action for actions in orders.values() for action in actions]
        assert len(everything) == len(set(everything))
        assert all(live <= made.live_limit(s, workers, chunks) for s, live in enumerate(timeline.live))
        for worker in set(workers):
            spans = sorted((s.start_s, s.end_s) for s in timeline.spans if s.resource == worker)
            assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans)), "one thing at a time"


GOLDEN = {
    ("gpipe", "aba"): (
        "F0.0 F0.1 F0.2 F2.0 F2.1 F2.2 B2.0 B2.1 B2.2 B0.0 B0.1 B0.2",
        "F1.0 F1.1 F1.2 B1.0 B1.1 B1.2",
    ),
    ("1f1b", "abc"): (
        "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3",
        "F1.0 F1.1 B1.0 F1.2 B1.1 F1.3 B1.2 B1.3",
        "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3",
    ),
    ("interleaved", "aba"): (
        "F0.0 F0.1 F2.0 B2.0 F2.1 B2.1 B0.0 B0.1 F0.2 F2.2 B2.2 B0.2",
        "F1.0 F1.1 B1.0 B1.1 F1.2 B1.2",
    ),
    ("zero-bubble", "ab"): (
        "F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2",
        "F1.0 I1.0 W1.0 F1.1 I1.1 W1.1 F1.2 I1.2 W1.2",
    ),
}


@pytest.mark.parametrize(("name", "workers"), GOLDEN)
def test_cell_by_cell(name: str, workers: str) -> None:
    expected = GOLDEN[name, workers]
    chunks = expected[0].count("F0")
    orders = schedule(name).orders(workers, chunks, Times.unit(len(workers)))
    assert tuple(" ".join(map(str, actions)) for actions in orders.values()) == expected


def test_one_forward_one_backward_keeps_as_many_micro_batches_as_stages() -> None:
    for stages, chunks in ((2, 8), (4, 16)):
        workers, times = "abcd"[:stages], Times.unit(stages)
        live = {
            name: check(schedule(name).orders(workers, chunks, times), workers, chunks, times)
            for name in ("1f1b", "gpipe")
        }
        assert live["1f1b"].live == tuple(range(stages, 0, -1))
        assert live["gpipe"].live == (chunks,) * stages
        assert live["1f1b"].step_s == live["gpipe"].step_s, "the same bubble with less memory"


def test_zero_bubble_has_a_smaller_bubble_in_the_same_memory() -> None:
    times = Times.unit(4)
    found = {
        name: check(schedule(name).orders("abcd", 8, times), "abcd", 8, times) for name in ("1f1b", "zero-bubble")
    }
    assert found["zero-bubble"].step_s < found["1f1b"].step_s
    assert found["zero-bubble"].live == found["1f1b"].live


SLOW = Hop(0.02, 0.3, 0.001, 0.02)
CASES = {
    "a slow link": (
        "ab",
        8,
        Times((StageTimes(0.05, 0.05, 0.05), StageTimes(0.1, 0.1, 0.1)), {(0, 1): SLOW}, {(0, 1): SLOW}),
    ),
    "uneven devices": (
        "aba",
        6,
        Times((StageTimes(1.0, 1.0, 1.0), StageTimes(0.1, 0.1, 0.1), StageTimes(0.5, 0.5, 0.5))),
    ),
    "uneven stages and links": ("abcd", 6, uneven(4)),
}


@pytest.mark.parametrize("case", CASES)
def test_auto_beats_the_fixed_schedules_where_they_do_not_fit(case: str) -> None:
    workers, chunks, times = CASES[case]
    steps = {}
    for kind in SCHEDULES:
        if takes(kind, workers, chunks):
            steps[kind.name] = check(kind().orders(workers, chunks, times), workers, chunks, times).step_s
    best = min(seconds for name, seconds in steps.items() if name != "auto")
    assert steps["auto"] < 0.95 * best if case == "a slow link" else steps["auto"] <= 1.01 * best, steps


def test_both_directions_of_a_link_carry_at_once() -> None:
    workers, chunks, times = CASES["a slow link"]
    timeline = check(schedule("auto").orders(workers, chunks, times), workers, chunks, times)
    assert timeline.busy_s("a -> b") == pytest.approx(timeline.busy_s("b -> a")) == pytest.approx(8 * 0.3)
    assert timeline.step_s < 1.4 * 8 * 0.3


_F, _B, _I, _W = Action(0, 0), Work.BACKWARD, Work.INPUT, Work.WEIGHT
WRONG = {
    "missing": ({"a": [_F, Action(0, 0, _B)], "b": [Action(1, 0)]}, "each micro-batch"),
    "twice": (
        {"a": [Action(0, 0), Action(0, 0), Action(0, 0, _B)], "b": [Action(1, 0), Action(1, 0, _B)]},
        "once",
    ),
    "another's": (
        {"a": [Action(1, 0), Action(0, 0, _B)], "b": [Action(1, 0), Action(1, 0, _B)]},
        "another's stage",
    ),
    "no weights": ({"a": [Action(0, 0), Action(0, 0, _I)], "b": [Action(1, 0), Action(1, 0, _B)]}, "W"),
    "deadlock": (
        {"a": [Action(0, 0, _B), Action(0, 0)], "b": [Action(1, 0), Action(1, 0, _B)]},
        "stands still[^$]*a: B0.0",
    ),
    "weights first": (
        {"a": [Action(0, 0), Action(0, 0, _W), Action(0, 0, _I)], "b": [Action(1, 0), Action(1, 0, _B)]},
        "W0.0 waits for I0.0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_step_is_refused(case: str) -> None:
    orders, message = WRONG[case]
    with pytest.raises(PlanError, match=message):
        check(orders, "ab", 1, Times.unit(2))


def test_simulated_times_by_hand() -> None:
    times = Times(
        (StageTimes(1.0, 1.0, 1.0, 7), StageTimes(2.0, 2.0, 2.0, 5)), {(0, 1): Hop(0.5, 3.0, 0.25, 0.5)}, {}
    )
    timeline = simulate(schedule("gpipe").orders("ab", 2, times), "ab", times)
    forwards = [span.start_s for span in timeline.spans if span.resource == "b" and span.action.is_forward]
    assert forwards == [1.0 + 0.5 + 3.0 + 0.25 + 0.5, 1.0 + 0.5 + 3.0 + 3.0 + 0.25 + 0.5]
    assert timeline.live_bytes == {"a": 14, "b": 10}


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 8), (8, 3)])
def test_the_bubble_is_that_of_the_paper(stages: int, chunks: int) -> None:
    """GPipe, section 2.3: (K - 1) / (M + K - 1) of the step, with K equal stages and M micro-batches."""
    workers, times = "abcdefgh"[:stages], Times.unit(stages)
    timeline = simulate(schedule("gpipe").orders(workers, chunks, times), workers, times)
    for worker in workers:
        assert timeline.bubble_share(worker) == pytest.approx((stages - 1) / (chunks + stages - 1))


def test_an_unknown_schedule() -> None:
    with pytest.raises(PlanError, match="gpipe"):
        schedule("zigzag")


@pytest.mark.parametrize("kind", SCHEDULES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("workers", ["ab", "aba", "abc", "abab"])
def test_only_a_step_that_is_not_below_the_limit_is_left_unfinished(kind: type[Schedule], workers: str) -> None:
    made, left = kind(), 0
    if not takes(kind, workers, 5):
        return
    for scale in (0.01, 1.0, 10.0):  # of the links
        hops = {pair: Hop(hop.encode_s, scale * hop.wire_s) for pair, hop in uneven(len(workers)).forward.items()}
        times = Times(uneven(len(workers)).stages, hops, hops)
        clock = made.simulated(workers, 5, times)
        assert clock is not None
        assert clock.step_s == simulate(made.orders(workers, 5, times), workers, times).step_s
        for share in (0.2, 0.6, 0.9, 0.99, 1.0, 1.01, 2.0):
            found = made.simulated(workers, 5, times, share * clock.step_s)
            assert found is not None or share <= 1.0
            assert found is None or found.step_s == clock.step_s
            left += found is None
    assert left >= 3
