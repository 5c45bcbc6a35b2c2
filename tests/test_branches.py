"""The minimum cut between two devices, against every division there is."""

from __future__ import annotations

import copy
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.compressors import Lossless, compressor
from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.errors import PlanError
from fxsplit.opening import trace_for_planning
from fxsplit.planning import Budget, Guard, NodeSeconds, Plan, Profile, parse_devices
from fxsplit.planning.branches import MOST_NODES, Division, best_bipartition
from fxsplit.planning.explain import explain_plan
from fxsplit.planning.links import Link, Links
from fxsplit.spec import TensorSpec
from fxsplit.trace import Arguments
from fxsplit.trace.ordering import order_of_effects
from tests.test_planner_exact import random_graph, random_profile
from tests.test_planning_links import chain

DEVICES = ["cpu", "a/cuda"]


def division(seed: int) -> Division:
    """Branches, speeds and links by chance."""
    draw = random.Random(seed)
    costs = random_graph(draw, ("branches", "anything", "chain")[seed % 3])
    behind = [
        draw.sample([n.name for n in costs.nodes[:i]], int(draw.random() < 0.2)) if i else []
        for i in range(len(costs))
    ]
    nodes = zip(costs.nodes, behind, strict=True)
    costs = replace(costs, nodes=tuple(replace(n, layout_inputs=(), behind=tuple(b)) for n, b in nodes))
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
    ) and all(
        name in {found.costs.nodes[other].name for other in client}
        for node in client
        for name in found.costs.nodes[node].behind
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


def forest(draw: random.Random, count: int = 7) -> CostTable:
    """Nodes that use the input or any earlier nodes."""
    used: dict[int, set[int]] = {index: set() for index in range(-2, count)}
    for index in range(count):
        for maker in draw.sample(range(-2, index), draw.randint(1, min(2, index + 2))):
            used[maker].add(index)
    names = {-2: "x", -1: "y"} | {index: f"n{index}" for index in range(count)}
    values = tuple(
        Value(
            names[maker], max(maker, -1), tuple(sorted(users or {count})),
            TensorSpec((8, draw.choice([10, 1000, 100_000])), torch.float32), maker >= 0,
        )
        for maker, users in used.items()
    )  # fmt: skip
    macs = [draw.choice([10**5, 10**7, 10**9]) for _ in range(count)]
    nodes = tuple(NodeCost(f"n{i}", f"m{i}", "Linear", macs[i], values[i + 2].nbytes, 100) for i in range(count))
    return CostTable("Forest", "f00d", 8, nodes, values, {f"m{i}": i for i in range(count)})


def test_the_plan_of_a_division_is_the_minimum_cut() -> None:
    """By one micro-batch: no slower than any division, and never slower than any cut of the model's own order."""
    moved = 0
    for seed in range(100):
        costs, budget = forest(random.Random(seed)), Budget(bandwidth=10.0 ** (5 + seed % 4), latency=1e-4)
        options: dict[str, Any] = {"compressor": "auto", "guard": Guard(("uniform8",)), "budget": budget}
        auto = fxsplit.plan(costs, DEVICES, **options, placement="auto")
        made = fxsplit.plan(costs, DEVICES, **options, placement="branches")
        one, other = parse_devices(DEVICES)
        codecs = Lossless(), compressor("uniform8")
        given = Division(costs, (one, other), Links.of(budget, (one, other)), Profile(), codecs, codecs)
        nodes = range(len(costs))
        sides = (frozenset(s) for size in range(len(nodes) + 1) for s in itertools.combinations(nodes, size))
        best = min(given.step_s(side) for side in sides if allowed(given, side))
        assert made.predicted_step_s == pytest.approx(best, rel=1e-9) and made.is_optimal
        assert made.predicted_step_s <= auto.predicted_step_s * (1 + 1e-9)
        if made.moved:
            moved += 1
            assert made.predicted_step_s < auto.predicted_step_s
            assert Plan.from_json(made.to_json()) == made and "run before the cut" in str(made)
    assert moved >= 10


class Towers(nn.Module):
    """The heavy tower runs first; the light one makes little of a large image, by changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.heavy = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.3), nn.Linear(64, 64))
        self.light = nn.Sequential(nn.Linear(4096, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.both = nn.Linear(72, 4)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        heavy = self.heavy(x)
        return self.both(torch.cat([heavy, self.light(image)], 1))  # type: ignore[no-any-return]


def divided(tmp_path: Path) -> tuple[nn.Module, tuple[Tensor, Tensor], Path]:
    """The model, a batch, and a saved plan that has the light tower on the client."""
    torch.manual_seed(0)
    net, batch = Towers(), (torch.randn(8, 8), torch.randn(8, 4096))
    costs = fxsplit.analyze(trace_for_planning(net, Arguments.of(batch)), batch)
    seconds = {"cpu": 1.0, "a/cpu": 1e-6}
    nodes = {
        device: {
            n.name: NodeSeconds(1e-6, 1e-6) if n.module.startswith("light") else NodeSeconds(s, s)
            for n in costs.nodes
        }
        for device, s in seconds.items()
    }
    made = fxsplit.plan(
        costs, ["cpu", "a/cpu"], placement="branches", profile=Profile(nodes), budget=Budget(bandwidth="1MB/s")
    )
    assert made.moved and all(name.startswith("light") for name in made.moved) and made.is_optimal
    assert all(edge.value != "image" for edge in made.edges if edge.target == 1)
    made.save(tmp_path / "plan.json")
    return net, batch, tmp_path / "plan.json"


@pytest.mark.parametrize("transport", ["rpc", "in_process"])
def test_a_division_runs_with_the_models_numbers(tmp_path: Path, transport: str) -> None:
    net, batch, path = divided(tmp_path)
    whole = copy.deepcopy(net)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    with fxsplit.compile(net, ["cpu", "a/cpu"], plan=str(path), example_inputs=batch, transport=transport) as pipe:
        own = pipe.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(3):
            torch.manual_seed(5)
            expected = whole(*batch)
            expected.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.manual_seed(5)
            found = pipe(*batch)
            assert torch.equal(found, expected)
            found.square().mean().backward()
            own.step()
            own.zero_grad()
        state = pipe.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
        whole.eval()
        pipe.eval()
        larger = torch.randn(16, 8), torch.randn(16, 4096)
        assert torch.equal(pipe(*larger), whole(*larger))


class Conflicts(nn.Module):
    """Order that no value tells: random numbers, a change in place, a buffer, a sum of three gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = self.a(x)
        one = nn.functional.dropout(self.norm(h), 0.5, self.training)
        two = nn.functional.dropout(self.norm(self.b(z)), 0.5, self.training)
        view = h.view(-1)
        three = h * 2.0
        view.mul_(0.5)
        return one + two + three + h + view.view(8, 8)  # type: ignore[no-any-return]


def test_what_has_to_stay_behind_is_found() -> None:
    traced = fxsplit.trace(Conflicts(), (torch.randn(8, 8), torch.randn(8, 8)), cuts=["a", "norm", "b"])
    behind = order_of_effects(traced.graph(True).module)
    names = {node.name: {other.name for other in found} for node, found in behind.items()}
    order = [node.name for node in traced.graph(True).module.graph.nodes]
    draws = [name for name in order if name.startswith("dropout")]
    assert draws[0] in names[draws[1]]
    norms = [name for name in order if name.startswith("norm")]
    assert norms[0] in names[norms[1]]
    (doubled,) = (name for name in order if name == "mul")
    (changed,) = (name for name in order if name.startswith("mul_"))
    assert doubled in names[changed], "it reads what is changed later"
    assert all(order.index(other) < order.index(name) for name, found in names.items() for other in found)


def test_a_plan_that_moves_what_it_may_not_is_refused(tmp_path: Path) -> None:
    net, batch, path = divided(tmp_path)
    plan = Plan.load(path)
    options: dict[str, Any] = {"example_inputs": batch, "transport": "in_process"}
    for moved, says in ((("both",), "earlier than what it needs"), (("nothing",), "not in the")):
        with pytest.raises(PlanError, match=says):
            fxsplit.compile(net, ["cpu", "a/cpu"], plan=replace(plan, moved=moved), **options)
    with pytest.raises(PlanError, match="moved"):
        Plan.from_json(json.dumps({**json.loads(plan.to_json()), "moved": 3}))
    costs = fxsplit.analyze(trace_for_planning(net, Arguments.of(batch)), batch)
    for devices in (["cpu"], ["cpu", "cpu"], ["cpu", "a/cpu", "b/cpu"], ["cpu", "a/cpu+b/cpu"]):
        with pytest.raises(PlanError, match="divided between two workers"):
            fxsplit.plan(costs, devices, placement="branches")
