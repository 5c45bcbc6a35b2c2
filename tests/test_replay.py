"""The replay of fixed orders over many candidates at once, beside the simulation of each."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fxsplit.planning.bounds import HopBound, Work
from fxsplit.planning.replay import actions_of, step_bound
from fxsplit.schedules import Hop, StageTimes, Times, schedule, simulate

NAMES = ("gpipe", "1f1b", "interleaved", "zero-bubble")


def random_times(draw: random.Random, stages: int) -> Times:
    """Some pieces of work take no time, some stages skip others."""

    def seconds() -> float:
        return draw.choice([0.0, 0.1, draw.random()])

    half = [seconds() for _ in range(stages)]
    pairs = [(s, t) for s in range(stages) for t in range(s + 1, stages) if t == s + 1 or draw.random() < 0.3]
    hops = [{pair: Hop(*(seconds() for _ in range(4))) for pair in pairs} for _ in range(2)]
    return Times(tuple(StageTimes(seconds(), each, each) for each in half), *hops)


def as_arrays(found: list[Times], workers: str) -> Work:
    """The same, an array over the candidates in place of each number; a hop that one has not takes no time."""

    def hops(name: str) -> dict[tuple[int, int], HopBound]:
        pairs = sorted({pair for times in found for pair in getattr(times, name)})
        rows = {pair: [getattr(times, name).get(pair, Hop()) for times in found] for pair in pairs}
        return {
            pair: HopBound(
                np.array([h.encode_s + h.wire_s + h.decode_s for h in row]),
                np.array([h.latency_s for h in row]),
                *(np.array([getattr(h, f"{piece}_s") for h in row]) for piece in ("encode", "wire", "decode")),
            )
            for pair, row in rows.items()
        }

    forward = [np.array([times.stages[stage].forward_s for times in found]) for stage in range(len(workers))]
    backward = [np.array([times.stages[stage].backward_s for times in found]) for stage in range(len(workers))]
    return Work(tuple(workers), forward, backward, hops("forward"), hops("backward"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", ["ab", "aba", "abab", "abc", "abca"])
def test_the_replay_is_the_simulation_for_two_workers_and_never_more(name: str, workers: str) -> None:
    if name == "1f1b" and len(set(workers)) < len(workers):
        assert actions_of(name, tuple(workers), 5) == ()
        return
    draw, chunks = random.Random(7), 5
    found = [random_times(draw, len(workers)) for _ in range(40)]
    replayed = step_bound(actions_of(name, tuple(workers), chunks), as_arrays(found, workers))
    orders = [schedule(name).orders(workers, chunks, times) for times in found]
    simulated = [simulate(o, workers, times).step_s for o, times in zip(orders, found, strict=True)]
    if len(set(workers)) == 2:
        np.testing.assert_allclose(replayed, simulated, rtol=1e-12)
    else:
        assert (replayed <= np.array(simulated) * (1 + 1e-12)).all()


def test_orders_that_follow_times_are_not_replayed() -> None:
    assert actions_of("auto", ("a", "b"), 4) == ()
    assert actions_of("interleaved", ("a", "b"), 1) == ()  # refused
