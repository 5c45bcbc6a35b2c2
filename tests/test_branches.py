"""The minimum cut between two devices, against every division there is."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

import fxsplit
from fxsplit.compressors import Lossless, compressor
from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.errors import PlanError
from fxsplit.planning import Budget, Profile, parse_devices
from fxsplit.planning.branches import MOST_NODES, Division, best_bipartition
from fxsplit.planning.explain import explain_plan
from fxsplit.planning.links import Link, Links
from fxsplit.spec import TensorSpec
from tests.test_planner_exact import random_graph, random_profile
from tests.test_planning_links import chain

DEVICES = ["cpu", "a/cuda"]


def division(seed: int) -> Division:
    """Branches, speeds and links by chance."""
    draw = random.Random(seed)
    costs = random_graph(draw, ("branches", "anything", "chain")[seed % 3])
    costs = replace(costs, nodes=tuple(replace(node, layout_inputs=()) for node in costs.nodes))
    codecs = (Lossless(), *(compressor(name) for name in ("uniform8", "uniform4")[: draw.randint(0, 2)]))
    links = Links(Link(10.0 ** draw.randint(6, 9), draw.choice([0.0, 1e-4, 1e-2])))
    profile = random_profile(draw, costs, DEVICES, ("uniform4", "uniform8"))
    one, other = parse_devices(DEVICES)
    return Division(costs, (one, other), links, profile, codecs, codecs)


def allowed(found: Division, client: frozenset[int]) -> bool:
    """Whether nothing goes forward from the server to the client."""
    return all(
        value.producer < 0 or value.producer in client
        for value in found.costs.values
        for node in value.consumers
        if node in client
    )


@pytest.mark.parametrize("seed", range(200))
def test_the_cut_is_that_of_brute_force(seed: int) -> None:
    given = division(seed)
    found = best_bipartition(given)
    nodes = range(len(given.costs))
    sides = (frozenset(s) for size in range(len(nodes) + 1) for s in itertools.combinations(nodes, size))
    best = min(given.step_s(side) for side in sides if allowed(given, side))
    assert found.step_s == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert sorted(found.client + found.server) == sorted(node.name for node in given.costs.nodes)


def test_it_is_the_planners_step_where_the_model_is_a_chain() -> None:
    for bandwidth in (1e5, 1e7, 1e9):
        budget = Budget(bandwidth=bandwidth, latency=1e-3)
        one, other = parse_devices(DEVICES)
        links = Links.of(budget, (one, other))
        found = best_bipartition(Division(chain(), (one, other), links, Profile()))
        plan = fxsplit.plan(chain(), DEVICES, budget=budget, placement="auto")
        assert found.is_run and plan.is_optimal
        assert found.step_s == pytest.approx(plan.predicted_step_s, rel=1e-9)


def test_branches_go_to_either_side() -> None:
    """Two towers: the one that runs first is heavy, the other makes little of a large input."""
    small, large = TensorSpec((8, 10), torch.float32), TensorSpec((8, 100_000), torch.float32)
    values = (
        Value("x", -1, (0,), small, False),
        Value("image", -1, (1,), large, False),
        Value("heavy", 0, (2,), small, True),
        Value("light", 1, (2,), small, True),
        Value("both", 2, (3,), small, True),
    )
    macs = {"heavy": 10**9, "light": 10**5, "both": 10**8}
    nodes = tuple(NodeCost(name, name, "Linear", count, 320, 100) for name, count in macs.items())
    costs = CostTable("Towers", "f00d", 8, nodes, values, {name: index for index, name in enumerate(macs)})
    one, other = parse_devices(DEVICES)
    budget = Budget(bandwidth="1MB/s")
    found = best_bipartition(Division(costs, (one, other), Links.of(budget, (one, other)), Profile()))
    assert (found.client, found.server, found.is_run) == (("light",), ("heavy", "both"), False)
    plan = fxsplit.plan(costs, DEVICES, budget=budget, placement="auto")
    assert found.step_s < plan.predicted_step_s / 2
    text = explain_plan(costs, plan, DEVICES, {"budget": budget, "placement": "auto"}).text()
    assert "with its branches on either side" in text


def test_what_it_is_not_for_is_refused() -> None:
    one, _ = parse_devices(DEVICES)
    with pytest.raises(PlanError, match="between two workers"):
        Division(chain(), (one, one), Links(), Profile())
    given = division(0)
    long = replace(given.costs, nodes=given.costs.nodes * (MOST_NODES // len(given.costs) + 1))
    with pytest.raises(PlanError, match="too large for a minimum cut"):
        best_bipartition(replace(given, costs=long))
