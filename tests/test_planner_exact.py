"""The planner against brute force: every choice there is, simulated one at a time, on small random graphs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxsplit.compressors import compressor
from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.errors import BudgetError, PlanError
from fxsplit.planning import Budget
from fxsplit.planning.devices import parse_devices
from fxsplit.planning.draft import Draft
from fxsplit.planning.guard import Guard
from fxsplit.planning.limits import violations
from fxsplit.planning.links import Links
from fxsplit.planning.planner import OPTIMIZERS, _codecs, _objective, plan
from fxsplit.planning.predict import link_bytes
from fxsplit.planning.problem import Option, Problem
from fxsplit.planning.profile import CodecSpeed, NodeSeconds, Profile
from fxsplit.planning.stages import Codecs
from fxsplit.spec import TensorSpec

LISTS = [
    ["cpu", "a/cuda"],
    ["cpu", "server/cuda", "cpu"],
    ["cpu", "a/cpu", "b/cuda"],
    ["cpu", "a/cuda:0", "a/cuda:1"],
    ["cpu", "a/cuda", "b/cpu", "cpu"],
    ["cpu"],
]
REPLICATED = [
    ["cpu", "a/cpu+b/cpu"],
    ["cpu", "a/cpu+b/cpu", "cpu"],
    ["cpu", "cuda", "a/cpu+b/cpu+c/cpu"],
    ["cpu", "a/cpu+b/cpu", "c/cuda+d/cuda"],
    ["cpu", "a/cpu+b/cpu", "cpu", "a/cpu+b/cpu"],
]
KINDS = ("chain", "branches", "anything")
MOST_DRAFTS = 3_000  # of brute force, that the tests take seconds


def random_graph(draw: random.Random, kind: str) -> CostTable:
    """A chain; one with branches; or one with integers, masks, layouts and values that are no tensors."""
    count = draw.randint(2, 6)
    nodes, values = [], []
    for index in range(-1, count):
        later = {n for n in range(index + 1, count) if draw.random() < (0.0 if kind == "chain" else 0.25)}
        consumers = sorted({min(index + 1, count)} | later)
        is_mask = kind == "anything" and draw.random() < 0.3
        dtype = torch.int64 if is_mask and draw.random() < 0.5 else torch.float32
        spec = TensorSpec((8, draw.randint(1, 4000)), dtype)
        name = f"n{index}" if index >= 0 else "x"
        if is_mask and draw.random() < 0.2:
            values.append(Value(name, index, tuple(consumers), None, False))
        else:
            values.append(Value(name, index, tuple(consumers), spec, index >= 0 and not is_mask))
    for index in range(count):
        read = [v.name for v in values if index in v.consumers]
        layouts = tuple(read[:1]) if kind == "anything" and draw.random() < 0.2 else ()
        macs, made = draw.choice([0, 10**6, 10**7]) * draw.randint(1, 9), values[index + 1]
        is_again = not made.is_activation and draw.random() < 0.5
        weights = draw.randint(0, 10**5)
        row = (
            f"n{index}",
            f"m{index}",
            "Linear",
            macs,
            made.nbytes,
            weights,
            draw.randint(1, 5),
            is_again,
            layouts,
        )
        nodes.append(NodeCost(*row, draw.randint(0, 3) * macs, draw.randint(0, 10**5), weights // 2))
    return CostTable("Toy", "f00d", 8, tuple(nodes), tuple(values), {f"m{i}": i for i in range(count)})


def _seconds(draw: random.Random) -> float:
    return draw.choice([0.0, 1e-4, 1e-3]) * draw.randint(1, 9)


def random_profile(draw: random.Random, costs: CostTable, devices: list[str], codecs: tuple[str, ...]) -> Profile:
    """Estimates, or measured seconds of everything."""
    if draw.random() < 0.5:
        return Profile()
    nodes = {
        device: {
            node.name: NodeSeconds(_seconds(draw), _seconds(draw), _seconds(draw) / 10) for node in costs.nodes
        }
        for device in dict.fromkeys(devices)  # not a set, whose order no seed fixes
        if draw.random() < 0.7
    }
    speeds = {
        (str(compressor(codec)), kind): CodecSpeed(
            draw.random() * 1e-8, draw.random() * 1e-8, draw.random() * 1e-4
        )
        for codec in codecs
        for kind in ("cpu", "cuda")
    }
    return Profile(nodes, speeds)


def every_draft(problem: Problem) -> Iterator[Draft]:
    """All there is, without any bound."""
    for option in problem.options():
        for positions in itertools.combinations(problem.positions, len(option.cuts)):
            if 0 in positions[1:]:
                continue
            for codecs in every_codecs(problem, option, positions):
                try:
                    yield Draft.of(problem, option.placements, positions, codecs, option.chunks)
                except PlanError:  # not for this schedule
                    continue


def coded_edges(problem: Problem, option: Option, positions: tuple[int, ...]) -> list[tuple[str, int]]:
    """Value and target of each edge that may have a codec."""
    workers = tuple(placement.worker for placement in option.placements)
    return [
        (value.name, target)
        for value, source, target, is_whole in problem.stages(option.placements, positions).crossings
        if is_whole and value.is_compressible and source >= 0 and target < len(workers)
        and workers[source] != workers[target]
    ]  # fmt: skip


def every_codecs(problem: Problem, option: Option, positions: tuple[int, ...]) -> Iterator[Codecs]:
    """A codec for each edge, there and back."""
    plain = [tuple(codecs[cut][0] for cut in option.cuts) for codecs in (problem.there, problem.back)]
    edges = coded_edges(problem, option, positions)
    cuts = [option.cuts[target - 1] for _, target in edges]
    for pairs in itertools.product(*(itertools.product(problem.there[cut], problem.back[cut]) for cut in cuts)):
        yield Codecs(plain[0], plain[1], dict(zip(edges, pairs, strict=True)))


def count_of_drafts(problem: Problem) -> int:
    """How many `every_draft` has."""
    count = 0
    for option in problem.options():
        for positions in itertools.combinations(problem.positions, len(option.cuts)):
            edges = [] if 0 in positions[1:] else coded_edges(problem, option, positions)
            cuts = [option.cuts[target - 1] for _, target in edges]
            count += math.prod(len(problem.there[cut]) * len(problem.back[cut]) for cut in cuts)
    return count


def case(seed: int, lists: list[list[str]] = LISTS) -> tuple[CostTable, list[str], dict[str, Any], dict[str, Any]]:
    """Graph, devices, options of the planner, and the assumptions on links."""
    draw = random.Random(seed)
    costs = random_graph(draw, KINDS[seed % len(KINDS)])
    devices = draw.choice(lists)
    devices = devices if len(devices) <= len(costs) else lists[0]
    is_auto = draw.random() < (0.6 if len(devices) < 3 else 0.3)
    named = draw.choice(
        [None, "uniform4", "fastquant8", ["uniform8", "none", "uniform4"][: max(len(devices) - 1, 1)]]
    )
    options: dict[str, Any] = {
        "compressor": "auto" if is_auto else named,
        "gradient_compressor": draw.choice(["auto", "none"] if is_auto else ["same", "none", "uniform8"]),
        "guard": Guard(("uniform4", "fastquant8")[: draw.randint(1, 2)], ("uniform8",)),
        "chunks": draw.choice([1, 2, 5, "auto"]) if len(devices) < 4 else draw.choice([1, 3]),
        "schedule": draw.choice(["gpipe", "gpipe", "gpipe", "interleaved", "1f1b", "zero-bubble", "auto"]),
        "placement": draw.choice(["given", "auto"]),
        "objective": draw.choice(["step", "step", "step", "latency", "throughput", "price"]),
        "price": {device: draw.choice([0.5, 1.0, 3.0]) for device in devices},
        "profile": random_profile(draw, costs, devices, ("uniform4", "fastquant8", "uniform8")),
    }
    if options["chunks"] == "auto" and is_auto:
        options["chunks"] = 2
    options["optimizer"] = draw.choice(list(OPTIMIZERS))
    if is_auto and count_of_drafts(problem_of(costs, devices, options, Budget())) > MOST_DRAFTS:
        options["compressor"], options["gradient_compressor"] = "uniform4", "none"
    links: dict[str, Any] = {"bandwidth": 10.0 ** draw.randint(5, 9), "latency": draw.choice([0.0, 1e-4, 1e-2])}
    if len(devices) > 1 and draw.random() < 0.3:
        links["bandwidth"] = {devices[1]: 1e6, f"client -> {devices[1]}": 1e7}
        links["latency"] = {devices[0]: 1e-2}
    return costs, devices, options, links


def problem_of(costs: CostTable, devices: list[str], options: dict[str, Any], budget: Budget) -> Problem:
    """What `plan` makes of its arguments, with the chunks one by one."""
    there, back = _codecs(
        options["compressor"], options["gradient_compressor"], len(devices) - 1, options["guard"]
    )
    placements = parse_devices(devices)
    chunks = (1, 2, 3, 4, 6, 8) if options["chunks"] == "auto" else (options["chunks"],)
    return Problem(
        costs, placements, there, back, Links.of(budget, placements), chunks, budget, options["schedule"],
        _objective(options["objective"], options["price"], devices), options["profile"],
        options["placement"] == "auto", states=OPTIMIZERS[options["optimizer"]],
    )  # fmt: skip


def random_budget(draw: random.Random, drafts: list[Draft]) -> dict[str, Any]:
    """Lines that some of the drafts break, or all."""
    middling = sorted(drafts, key=lambda d: d.value)[draw.randint(0, len(drafts) - 1)]
    part, slack = draw.choice(middling.parts), draw.choice([0.3, 0.9, 1.0, 1.0, 1.5])
    crossing = max([e.wire_bytes for e in middling.edges], default=0)
    lines: dict[str, Any] = {
        "macs": {part.device: int(part.macs * slack)},
        "memory": int(part.memory_bytes * slack) if draw.random() < 0.5 else {part.device: part.memory_bytes},
        "link_bytes": int(crossing * slack) if draw.random() < 0.5 or not middling.names
        else {name: int(crossing * slack) for name in middling.names},
        "step_time": middling.outcome.seconds * slack or 1.0,
    }  # fmt: skip
    return {name: lines[name] for name in draw.sample(list(lines), draw.randint(1, 3))}


def direction_budget(draw: random.Random, drafts: list[Draft]) -> dict[str, Any]:
    """A limit of one direction between two workers that some of the drafts break, or all; nothing without any."""
    draft = drafts[draw.randint(0, len(drafts) - 1)]
    sent = link_bytes(draft.edges, draft.workers, with_gradients=draft.is_training)
    if not sent:
        return {}
    (sender, receiver), count = draw.choice(sorted(sent.items()))
    return {"link_bytes": {f"{sender} -> {receiver}": int(count * draw.choice([0.3, 0.9, 1.0]))}}


@pytest.mark.parametrize("seed", range(500))
def test_the_choice_is_that_of_brute_force(seed: int) -> None:
    assert_best(seed, *case(seed))


@pytest.mark.parametrize("seed", range(1000, 1100))
def test_the_choice_for_replicated_stages_is_that_of_brute_force(seed: int) -> None:
    assert_best(seed, *case(seed, REPLICATED))


def assert_best(
    seed: int, costs: CostTable, devices: list[str], options: dict[str, Any], links: dict[str, Any]
) -> None:
    """Without a budget, and with one that some plans break: nothing there is is better."""
    draw = random.Random(seed + 10**6)
    drafts = list(every_draft(problem_of(costs, devices, options, Budget(**links))))
    if not drafts:
        with pytest.raises(PlanError):
            plan(costs, devices, **options, budget=Budget(**links))
        return
    budgets = [{}, random_budget(draw, drafts), *([direction_budget(draw, drafts)] if seed % 4 == 0 else [])]
    for lines in budgets:
        budget = Budget(**links, **lines)
        problem = problem_of(costs, devices, options, budget)
        excess = [max((v.excess for v in violations(d, costs, budget)), default=0.0) for d in drafts]
        kept = [draft.value for draft, missed in zip(drafts, excess, strict=True) if missed <= 0]
        if kept:
            found = plan(costs, devices, **options, budget=budget)
            value = found.predicted_step_s * problem.objective.price_per_s(found.devices)
            assert value == pytest.approx(min(kept), rel=1e-8)
            assert found.is_optimal and found.gap == 0.0
        else:
            with pytest.raises(BudgetError, match="no plan satisfies the budget") as caught:
                plan(costs, devices, **options, budget=budget)
            missed = float(caught.value.what.partition("(")[2].partition(" %")[0]) / 100
            assert missed == pytest.approx(min(excess), rel=1e-2, abs=1e-6)
