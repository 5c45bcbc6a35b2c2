"""A codec for every edge and direction: the planner's choice, in the plan, in the graph and in the workers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.compressors.nodes import Decode
from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.planning import Budget, Guard, NodeSeconds, Plan, Profile
from fxsplit.planning import planner as planner_module
from fxsplit.planning.explain import explain_plan
from fxsplit.planning.profile import CodecSpeed
from fxsplit.spec import TensorSpec
from tests.test_planner_exact import every_draft, problem_of

GUARD = Guard(("uniform4", "uniform8"), ("uniform8",))


def towers(draw: random.Random, count: int) -> CostTable:
    """Every node makes much or little, and most are used by several that come later."""
    values = [Value("x", -1, (0,), TensorSpec((8, 4), torch.float32), False)]
    for index in range(count):
        later = {n for n in range(index + 2, count) if draw.random() < 0.5}
        size = draw.choice([3, 40, 4000, 40_000])
        consumers = tuple(sorted({min(index + 1, count)} | later))
        values.append(Value(f"n{index}", index, consumers, TensorSpec((8, size), torch.float32), True))
    nodes = tuple(
        NodeCost(f"n{i}", f"m{i}", "Linear", draw.randint(1, 9) * 10**7, values[i + 1].nbytes, 1000)
        for i in range(count)
    )
    return CostTable("Towers", "f00d", 8, nodes, tuple(values), {f"m{i}": i for i in range(count)})


def speeds(call_s: float) -> Profile:
    """Codecs of which a call costs, so that what is small goes as it is."""
    names = ("uniform4", "uniform8")
    rates = dict(zip(names, (4e-10, 1e-10), strict=True))
    return Profile(
        codecs={(n, kind): CodecSpeed(rates[n], rates[n], call_s) for n in names for kind in ("cpu", "cuda")}
    )


def case(seed: int) -> tuple[CostTable, list[str], dict[str, Any], Budget]:
    """Two or three workers, with a link on which bytes or calls count."""
    draw = random.Random(seed)
    devices = draw.choice([["cpu", "a/cuda"], ["cpu", "a/cuda", "cpu"], ["cpu", "a/cuda", "b/cuda"]])
    options: dict[str, Any] = {
        "compressor": "auto",
        "gradient_compressor": draw.choice(["auto", "none"]),
        "guard": GUARD,
        "chunks": draw.choice([1, 3]),
        "schedule": draw.choice(["gpipe", "interleaved", "zero-bubble"]) if seed % 4 else "gpipe",
        "objective": draw.choice(["step", "step", "latency", "throughput"]),
        "profile": speeds(draw.choice([1e-4, 1e-3, 1e-2])),
        "placement": "given",
        "price": None,
        "optimizer": "sgd",
    }
    if options["schedule"] != "gpipe":
        options["chunks"] = 3
    budget = Budget(bandwidth=draw.choice([1e5, 1e6, 1e7]), latency=1e-3)
    return towers(draw, 3 if len(devices) == 3 else 4), devices, options, budget


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_every_edge_has_the_codec_of_brute_force(first: int) -> None:
    mixed = 0
    for seed in range(first, first + 20):
        costs, devices, options, budget = case(seed)
        drafts = list(every_draft(problem_of(costs, devices, options, budget)))
        plan = fxsplit.plan(costs, devices, **options, budget=budget)
        assert plan.predicted_step_s == pytest.approx(min(draft.value for draft in drafts), rel=1e-8), seed
        assert plan.is_optimal
        for names in {draft.names for draft in drafts}:
            given = fxsplit.plan(costs, devices, cuts=names, **options, budget=budget)
            best = min(draft.value for draft in drafts if draft.names == names)
            assert given.predicted_step_s == pytest.approx(best, rel=1e-8), (seed, names)
            mixed += bool(given.codecs.edges)
    assert mixed


class Skip(nn.Module):
    """A large activation, and a small one beside it, over whatever cut."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 4096), nn.Linear(16, 2)
        self.next, self.last = nn.Linear(4096, 8), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        small = self.narrow(x)
        return self.last(torch.cat([self.next(self.wide(x)), small], 1))  # type: ignore[no-any-return]


def planned(tmp_path: Path) -> tuple[nn.Module, Tensor, Path, Plan]:
    torch.manual_seed(0)
    net, x = Skip(), torch.randn(8, 16)
    costs = fxsplit.analyze(fxsplit.trace(net, x, cuts=["next"]), x)
    nodes = {d: {n.name: NodeSeconds(1e-5, 1e-5) for n in costs.nodes} for d in ("cpu", "a/cpu")}
    profile = Profile(nodes, speeds(1e-3).codecs)
    budget = Budget(bandwidth="1MB/s")
    plan = fxsplit.plan(
        costs, ["cpu", "a/cpu"], cuts=["next"], compressor="auto", guard=GUARD, profile=profile, budget=budget
    )
    plan.save(tmp_path / "plan.json")
    return net, x, tmp_path / "plan.json", plan


def test_the_plan_keeps_shows_and_explains_them(tmp_path: Path) -> None:
    net, x, path, plan = planned(tmp_path)
    by_size = sorted((e for e in plan.edges if e.source == 0 and e.target == 1), key=lambda e: e.raw_bytes)
    assert [(e.compressor, e.gradient_compressor) for e in by_size] == [("none", "none"), ("uniform4", "uniform8")]
    small = by_size[0].value
    assert plan.compressor == "uniform4" and list(plan.codecs.edges) == [(small, 1)]
    assert Plan.load(path) == plan
    assert f"{small} to stage 1 none" in str(plan) and f"{small} to stage 1 none" in plan._repr_html_()
    costs = fxsplit.analyze(fxsplit.trace(net, x, cuts=["next"]), x)
    text = explain_plan(costs, plan, ["cpu", "a/cpu"], {"budget": Budget(bandwidth="1MB/s")}).text()
    assert "one compressor for each cut" in text


@pytest.mark.parametrize("transport", ["rpc", "in_process"])
def test_the_workers_run_them(tmp_path: Path, transport: str) -> None:
    net, x, path, plan = planned(tmp_path)
    ((small, _),) = plan.codecs.edges
    options: dict[str, Any] = {"example_inputs": x, "transport": transport}
    with fxsplit.compile(net, ["cpu", "a/cpu"], plan=str(path), **options) as pipe:
        found = [str(m.compressor) for m in pipe.rewritten.primary.module.modules() if isinstance(m, Decode)]
        assert found == ["uniform4"]
        result = pipe.step(x, target=None, loss_fn=lambda y: y.square().mean(), reduction="mean")
        assert torch.equal(result.output, pipe.rewritten(x))
        assert (small, 1) in pipe.plan.codecs.edges


def test_long_models_choose_by_edge_too(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, _, options, budget = case(5)
    options |= {"schedule": "gpipe", "objective": "step", "chunks": 3, "gradient_compressor": "auto"}
    for seed in range(8):
        costs = towers(random.Random(seed), 4)
        best = fxsplit.plan(costs, ["cpu", "a/cuda", "b/cuda"], **options, budget=budget)
        with monkeypatch.context() as patch:
            patch.setattr(planner_module, "EXACT_CELLS", 0)
            found = fxsplit.plan(costs, ["cpu", "a/cuda", "b/cuda"], **options, budget=budget)
        assert found.lower_bound_s <= best.predicted_step_s * (1 + 1e-9) <= found.predicted_step_s * (1 + 2e-9)
        assert not found.is_optimal or found.predicted_step_s == pytest.approx(best.predicted_step_s, rel=1e-6)
