"""The replay of fixed orders over many candidates at once, beside the simulation of each."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

import fxsplit
from fxsplit.planning import Budget, NodeSeconds, Profile
from fxsplit.planning.bounds import HopBound, Work
from fxsplit.planning.explain import timeline_of
from fxsplit.planning.replay import actions_of, step_bound
from fxsplit.schedules import Hop, StageTimes, Times, schedule, simulate
from tests.test_planner_exact import random_graph

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


def test_a_thousand_machines_that_are_not_there() -> None:
    """Profiles of one device, scaled to others; the simulation of their step, with no worker and no tensor."""
    count, draw = 1000, random.Random(0)
    costs = random_graph(draw, "chain")
    values = [
        costs.values[0],
        *(replace(costs.values[1], name=f"n{i}", producer=i, consumers=(i + 1,)) for i in range(count)),
    ]
    nodes = tuple(replace(costs.nodes[0], name=f"n{i}", module=f"m{i}") for i in range(count))
    long = replace(costs, nodes=nodes, values=tuple(values), cut_points={f"m{i}": i for i in range(count)})
    known = Profile({"cpu": {f"n{i}": NodeSeconds(0.01, 0.02) for i in range(count)}})
    devices = ["cpu", *(f"w{i}/cpu" for i in range(1, count))]
    profile = known
    for device in devices[1:3]:
        profile = profile.scaled(device, "cpu", 2.0)
    others = dict.fromkeys(devices[3:], profile.nodes[devices[1]])
    profile = replace(profile, nodes={**profile.nodes, **others})
    plan = fxsplit.plan(long, devices, chunks=4, profile=profile, budget=Budget(bandwidth=1e9, latency=0.0))
    assert len(plan.parts) == count and all(part.is_measured for part in plan.parts)
    timeline = timeline_of(plan)
    assert timeline.step_s == pytest.approx(plan.predicted_step_s, rel=1e-9)
    busy_s = 4 * (0.02 + 0.04) / 4
    assert timeline.step_s >= (count - 1) * busy_s / 4 and timeline.live == (4,) * count
    assert timeline.busy_s("w7") == pytest.approx(busy_s, rel=1e-6)
