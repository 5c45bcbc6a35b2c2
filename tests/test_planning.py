"""The planner: stages, edges, predictions, choice of cuts and budgets, on small tables made by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fxsplit.compressors import compressor
from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.errors import BudgetError, CompressorError, DeviceError, PlanError
from fxsplit.planning import Budget, plan, planner
from fxsplit.planning.guard import Guard
from fxsplit.spec import TensorSpec

SANDWICH = ["cpu", "server/cuda", "cpu"]
LISTS = [
    ["cpu", "a/cuda"],
    SANDWICH,
    ["cpu", "a/cpu", "b/cuda"],
    ["cpu", "a/cuda:0", "a/cuda:1"],
    ["cpu", "a/cuda", "cpu", "a/cuda"],
    ["cpu", "a/cuda", "b/cpu", "cpu"],
]


def table(
    macs: Sequence[int],
    values: Sequence[Value],
    *,
    modules: Sequence[str] = (),
    cut_points: dict[str, int] | None = None,
    parameter_bytes: Sequence[int] = (),
) -> CostTable:
    """One module a node, 'm0', 'm1', ..., unless told otherwise."""
    names = modules or [f"m{index}" for index in range(len(macs))]
    weights = parameter_bytes or [100] * len(macs)
    outputs = {value.producer: value.nbytes for value in values}
    nodes = tuple(
        NodeCost(f"n{index}", names[index], "Linear", count, outputs.get(index, 0), weights[index])
        for index, count in enumerate(macs)
    )
    points = {name: index for index, name in enumerate(names)} if cut_points is None else cut_points
    return CostTable("Toy", "f00d", 8, nodes, tuple(values), points)


def value(producer: int, consumers: Sequence[int], width: int, dtype: torch.dtype = torch.float32) -> Value:
    """The value of a node, or the input for -1: eight rows of `width`."""
    spec = TensorSpec((8, width), dtype)
    return Value(f"n{producer}" if producer >= 0 else "x", producer, tuple(consumers), spec, producer >= 0)


def chain(macs: Sequence[int], widths: Sequence[int]) -> CostTable:
    """Nodes one after another, with the widths of their outputs."""
    values = [value(index - 1, [index], width) for index, width in enumerate([16, *widths])]
    return table(macs, values)


def random_table(seed: int) -> CostTable:
    """Skip edges, early outputs, late uses of the input, integers, and values that are no tensors."""
    draw = random.Random(seed)
    count = draw.randint(5, 11)
    values = []
    for index in range(-1, count):
        later = {node for node in range(index + 1, count) if draw.random() < 0.15}
        output = {count} if draw.random() < 0.1 else set()
        dtype = torch.int64 if draw.random() < 0.1 else torch.float32
        consumers = sorted({min(index + 1, count)} | later | output)
        made = value(index, consumers, draw.randint(1, 4000), dtype)
        if draw.random() < 0.05:
            made = Value(made.name, index, made.consumers, None, False)
        values.append(made)
    macs = [draw.choice([0, 10**6, 10**7]) * draw.randint(1, 9) for _ in range(count)]
    return table(macs, values, parameter_bytes=[draw.randint(0, 10**5) for _ in range(count)])


TOY = chain([10**6, 5 * 10**8, 5 * 10**8, 10**6], [1000, 500, 100, 10])


def test_a_sandwich_by_hand() -> None:
    found = plan(TOY, SANDWICH, cuts=["m1", "m3"], compressor="uniform8", gradient_compressor="none")
    assert found.cut_names == ("m1", "m3") and found.workers == ("client", "server", "client")
    assert [(edge.value, edge.source, edge.target) for edge in found.edges] == [
        ("x", -1, 0),
        ("n0", 0, 1),
        ("n2", 1, 2),
        ("n3", 2, 3),
    ]
    first, second = found.cuts
    wire = compressor("uniform8").wire_bytes(TensorSpec((8, 1000), torch.float32))
    assert (first.stage, first.raw_bytes, first.wire_bytes, first.gradient_wire_bytes) == (
        1,
        32000,
        wire,
        32000,
    )
    assert first.compressor == second.compressor == "uniform8" == found.compressor
    assert found.gradient_compressor == "none"
    server = found.parts[1]
    assert (server.device, server.modules, server.macs) == ("server/cuda", ("m1", "m2"), 10**9)
    assert server.parameter_bytes == 200
    # weights, gradients and Adam's two tensors; outputs, what it receives
    assert server.memory_bytes == 4 * 200 + 4 * 8 * (500 + 100) + 32000
    assert server.forward_s == pytest.approx(10**9 / 5e12 + 2e-5)  # an estimate of each operation
    assert server.step_s == pytest.approx(3 * 10**9 / 5e12 + 4e-5)


def test_the_prediction_by_hand() -> None:
    found = plan(TOY, SANDWICH, cuts=["m1", "m3"], chunks=4, budget=Budget(bandwidth=1e6, latency="1ms"))
    call, packet, latency = 1e-5, 1e-4, 1e-3  # estimates: of an operation, and of a packet
    client, server = 1e6 / 4 / 2.5e10 + call, 1e9 / 4 / 5e12 + 2 * call
    up, down = packet + 32000 / 4 / 1e6, packet + 3200 / 4 / 1e6
    path = client + up + latency + server + down + latency + client
    back = 2 * (path - up - down - 2 * latency) - 4 * call
    there = path + 3 * 32000 / 4 / 1e6  # the link is the slowest
    again = back + up + down + 2 * latency + 3 * 32000 / 4 / 1e6
    assert found.predicted_step_s == pytest.approx(there + again)


def test_edges_within_a_worker_are_free() -> None:
    found = plan(TOY, ["cpu", "a/cuda:0", "a/cuda:1"], cuts=["m1", "m2"], compressor="uniform8")
    between = [edge for edge in found.edges if (edge.source, edge.target) == (1, 2)]
    assert [(edge.raw_bytes, edge.wire_bytes, edge.compressor) for edge in between] == [(16000, 0, "none")]
    assert found.cuts[1].edges == () and found.cuts[1].compressor == "none"


def test_a_value_used_by_several_stages_has_an_edge_to_each() -> None:
    values = [value(-1, [0, 3], 8), value(0, [1, 2, 3], 100), value(1, [2], 10), value(2, [3], 10)]
    costs = table([1] * 4, [*values, value(3, [4], 10)])
    found = plan(costs, ["cpu", "a/cpu", "b/cpu", "c/cpu"], cuts=["m1", "m2", "m3"], compressor="uniform8")
    assert [edge.target for edge in found.edges if edge.value == "n0"] == [1, 2, 3]
    assert [edge.target for edge in found.inputs] == [0, 3]
    late = found.inputs[1]
    assert (late.wire_bytes, late.gradient_wire_bytes, late.compressor) == (late.raw_bytes, 0, "none")
    assert [edge.value for edge in found.cuts[1].edges] == ["x", "n0", "n0", "n1"]


def test_outputs_of_a_worker_go_to_the_client_as_they_are() -> None:
    found = plan(TOY, ["cpu", "a/cuda"], cuts=["m1"], compressor="uniform8")
    (output,) = found.outputs
    assert (output.source, output.target, output.compressor) == (1, 2, "none")
    assert output.wire_bytes == output.gradient_wire_bytes == output.raw_bytes == 320


def test_integers_and_python_values_are_not_compressed_and_have_no_gradient() -> None:
    mask, size = value(0, [2], 7, torch.int64), Value("n0s", 0, (2,), None, False)
    values = [value(-1, [0], 8), mask, size, value(1, [2], 9), value(2, [3], 9)]
    found = plan(table([1] * 3, values), ["cpu", "a/cpu"], cuts=["m2"], compressor="sortquant8")
    edges = {edge.value: edge for edge in found.cuts[0].edges}
    assert (edges["n0"].wire_bytes, edges["n0"].gradient_wire_bytes, edges["n0"].compressor) == (
        448 + 16,  # a bound: the bits that they need show with the data
        0,
        "none",
    )
    assert (edges["n0s"].raw_bytes, edges["n0s"].wire_bytes, edges["n0s"].spec) == (0, 0, None)
    assert edges["n1"].compressor == "sortquant8"


def test_the_modules_of_a_part_are_the_outermost_that_are_whole() -> None:
    modules = ["stem.conv", "stem.norm", "body.0.a", "body.0.b", "body.1.a", "", "head"]
    costs = table([1] * 7, [], modules=modules, cut_points={"body.0.b": 3, "body.1": 4})
    found = plan(costs, SANDWICH, cuts=["body.1", "body.0.b"])
    assert [part.modules for part in found.parts] == [
        ("stem", "body.0.a"),
        ("body.0.b",),
        ("body.1", "head"),
    ]


def test_a_chosen_cut_has_the_outermost_name_of_its_place() -> None:
    points = {"a": 0, "b.c.d": 1, "b": 1, "b.c": 1}
    costs = table([1, 1], [value(0, [1], 4)], cut_points=points)
    assert plan(costs, ["cpu", "a/cpu"]).cut_names == ("b",)


def test_one_device() -> None:
    found = plan(TOY, ["cpu"], chunks=4)
    assert found.cuts == () and found.is_optimal and found.parts[0].macs == TOY.forward_macs
    assert found.predicted_step_s == pytest.approx(3 * TOY.forward_macs / 2.5e10 + 4 * 2 * 4 * 1e-5)
    assert plan(TOY, ["cpu"], cuts=[]).is_optimal


@pytest.mark.parametrize("seed", range(40))
def test_dynamic_programming_finds_what_enumeration_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    count = draw.randint(4, 9)
    widths = [draw.randint(1, 10**4) for _ in range(count)]
    costs = chain([draw.randint(10**6, 10**8) for _ in range(count)], widths)
    devices = ["cpu", "a/cuda", "b/cpu", "c/cuda"][: draw.randint(2, 4)]
    options: dict[str, Any] = {
        "chunks": draw.choice([1, 3, "auto"]),
        "placement": draw.choice(["given", "auto"]),
        "compressor": draw.choice(["auto", None, "uniform8"]),
        "budget": Budget(bandwidth=10.0 ** draw.randint(6, 9)),
    }
    best = plan(costs, devices, **options)
    monkeypatch.setattr(planner, "EXACT_CELLS", 0)
    found = plan(costs, devices, **options)
    assert found.is_optimal and found.predicted_step_s == pytest.approx(best.predicted_step_s, rel=1e-6)
    limit: dict[str, Any] = {"macs": {found.parts[-1].device: max(found.parts[-1].macs - 1, 0)}}
    bound = Budget(bandwidth=options["budget"].bandwidth, **limit)
    outcomes = []
    for cells in (0, 4_000_000):
        monkeypatch.setattr(planner, "EXACT_CELLS", cells)
        try:
            outcomes.append(plan(costs, devices, **{**options, "budget": bound}).predicted_step_s)
        except BudgetError:
            outcomes.append(float("inf"))
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-6)


@pytest.mark.parametrize("devices", [["cpu", "a/cuda", "b/cpu", "cpu"], ["cpu", "a/cpu+b/cpu", "c/cpu+d/cpu"]])
@pytest.mark.parametrize("seed", range(20))
def test_beyond_chains_the_long_search_states_its_gap(
    seed: int, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = random_table(seed)
    best = plan(costs, devices, chunks=2)
    monkeypatch.setattr(planner, "EXACT_CELLS", 0)
    found = plan(costs, devices, chunks=2)
    assert found.lower_bound_s <= best.predicted_step_s * (1 + 1e-9) <= found.predicted_step_s * (1 + 2e-9)
    assert found.predicted_step_s <= (1 + found.gap) * best.predicted_step_s * (1 + 1e-9)


def test_the_candidates_include_one_device_the_raw_input_and_no_compression() -> None:
    slow, fast = Budget(bandwidth="1kB/s"), Budget(bandwidth="10GB/s", latency=0)
    alone = plan(TOY, SANDWICH, placement="auto", compressor="auto", budget=slow)
    assert alone.devices == ("cpu",) and alone.is_optimal
    costs = chain([10**9, 10**9], [10**5, 10])
    raw = plan(costs, ["cpu", "a/cuda"], placement="auto", compressor="auto", budget=fast)
    assert raw.cut_names == ("m0",) and raw.parts[0].macs == 0
    assert plan(TOY, SANDWICH, compressor="auto", budget=fast).compressor == "none"
    squeezed = plan(TOY, SANDWICH, compressor="auto", budget=slow)
    assert "fastquant8" in squeezed.compressor


def test_chunks_are_chosen() -> None:
    costs = chain([4 * 10**8, 10**11], [10**6, 10])
    found = plan(costs, ["cpu", "a/cuda"], chunks="auto", budget=Budget(bandwidth="1GB/s"))
    fixed = [
        plan(costs, ["cpu", "a/cuda"], chunks=c, budget=Budget(bandwidth="1GB/s")) for c in (1, 2, 3, 4, 6, 8)
    ]
    assert found.chunks > 1
    assert found.predicted_step_s == pytest.approx(min(each.predicted_step_s for each in fixed))


def test_a_guard_on_real_data() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    strict = Guard(("uniform2", "uniform8"), max_error=0.02, data=[x])
    assert [str(codec) for codec in strict.allowed()] == ["none", "uniform8"]
    for wrong, says in (({"max_error": 2.0, "data": [x]}, "0 to 1"), ({"max_error": 0.1}, "needs data")):
        with pytest.raises(CompressorError, match=says):
            Guard(**wrong)
    with pytest.raises(CompressorError, match="learned"):
        Guard(("convinsert(ratio=0.25)",))


def test_objectives_differ() -> None:
    costs = chain([10**8] * 8, [10**4] * 8)
    devices = ["cpu", "a/cpu", "b/cpu"]
    stream = plan(costs, devices, objective="throughput", chunks=4)
    single = plan(costs, devices, objective="latency", placement="auto")
    assert single.devices == ("cpu",) and len(stream.devices) == 3
    price = {"cpu": 1.0, "a/cpu": 100.0, "b/cpu": 100.0}
    assert plan(costs, devices, objective="price", price=price, chunks=4, placement="auto").devices == ("cpu",)
    with pytest.raises(PlanError, match="unknown device"):
        plan(costs, devices, objective="price", price={"gpu": 1.0})
    with pytest.raises(PlanError, match="needs prices"):
        plan(costs, devices, objective="price")
    with pytest.raises(PlanError, match="objective"):
        plan(costs, devices, objective="energy")


def test_the_price_by_hand() -> None:
    """A device is taken as long as it saves more of the others' hours than its own cost."""
    devices, macs = ["cpu", "cuda"], TOY.forward_macs
    alone_s = 3 * macs / 2.5e10 + 4 * 2 * 1e-5  # estimates: MACs a second, and of an operation
    split = plan(TOY, devices, placement="auto")
    split_s = split.predicted_step_s
    assert list(split.devices) == devices and split_s < alone_s
    even = 0.5 * (alone_s / split_s - 1.0)  # (0.5 + even) * split_s is 0.5 * alone_s
    for per_h, taken in ((0.99 * even, devices), (1.01 * even, ["cpu"])):
        asked: dict[str, Any] = {"objective": "price", "price": {"cpu": 0.5, "cuda": per_h}}
        found = plan(TOY, devices, placement="auto", **asked)
        assert list(found.devices) == taken and found.is_optimal
        step_s = split_s if len(taken) == 2 else alone_s
        assert found.predicted_step_s == pytest.approx(step_s)
        step_price = step_s * (0.5 + per_h * (len(taken) == 2)) / 3600
        assert found.note.endswith(f"objective: price, {step_price:.3g} a step")


def test_a_price_is_least_with_few_devices_in_the_long_search_too(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = ["cpu", "a/cuda", "b/cuda", "c/cuda"]
    costs = chain([10**10] * 6, [10**3] * 6)
    prices = {**dict.fromkeys(devices, 1.0), "cpu": 0.1}
    asked: dict[str, Any] = {"objective": "price", "price": prices, "chunks": 4}
    assert len(plan(costs, devices, placement="auto", chunks=4).devices) > 2, "which is faster"
    best = plan(costs, devices, placement="auto", **asked)
    assert best.is_optimal and len(best.devices) == 2
    monkeypatch.setattr(planner, "EXACT_CELLS", 0)
    found = plan(costs, devices, placement="auto", **asked)
    assert found.predicted_step_s == pytest.approx(best.predicted_step_s) and len(found.devices) == 2


def test_a_client_that_has_no_price_does_all_for_nothing() -> None:
    asked: dict[str, Any] = {"objective": "price", "price": {"cuda": 2.5}}
    found = plan(TOY, ["cpu", "cuda"], placement="auto", **asked)
    assert found.devices == ("cpu",) and found.is_optimal and "price, 0 a step" in found.note
    given = plan(TOY, ["cpu", "cuda"], **asked)
    assert given.note.endswith(f"price, {given.predicted_step_s * 2.5 / 3600:.3g} a step")


def test_a_client_that_computes_nothing() -> None:
    """It is asked for by a cut before the first module."""
    found = plan(TOY, SANDWICH, cuts=["m1", "m0"])
    assert found.cut_names == ("m0", "m1")
    assert found.parts[0].macs == 0 < found.parts[2].macs


@pytest.mark.parametrize(
    ("devices", "options", "error", "says"),
    [
        (SANDWICH, {"cuts": ["m1", "m9"]}, PlanError, r"no such module[^$]*'m9'[^$]*m1"),
        (SANDWICH, {"cuts": ["m1"]}, PlanError, r"number of cuts[^$]*found: +1[^$]*2 for 3 devices"),
        (SANDWICH, {"cuts": ["m1", "m1"]}, PlanError, r"same place[^$]*m1 and m1"),
        (SANDWICH, {"cuts": "m1"}, PlanError, "not a list of module names"),
        (SANDWICH, {"cuts": ["m1", 3]}, PlanError, "no such module"),
        (["cpu", "a/cpu"] * 3, {}, PlanError, r"fewer places to cut[^$]*6 devices[^$]*at most 4"),
        (SANDWICH, {"chunks": 0}, PlanError, "chunks"),
        (SANDWICH, {"chunks": 2.0}, PlanError, "chunks"),
        (SANDWICH, {"chunks": True}, PlanError, "chunks"),
        (SANDWICH, {"schedule": "2f2b"}, PlanError, r"unknown schedule[^$]*2f2b[^$]*gpipe"),
        (SANDWICH, {"budget": {"macs": 3}}, BudgetError, "not a Budget"),
        (
            SANDWICH,
            {"budget": Budget(macs={"gpu": 1})},
            BudgetError,
            r"unknown device[^$]*gpu[^$]*cpu, server/cuda",
        ),
        (SANDWICH, {"budget": Budget(link_bytes={"m": 1})}, BudgetError, r"unknown cut[^$]*m3, m2, m1"),
        (
            SANDWICH,
            {"budget": Budget(link_bytes={"cpu -> b": 1})},
            BudgetError,
            r"link_bytes names an unknown device",
        ),
        (
            SANDWICH,
            {"budget": Budget(bandwidth={"m1": 1}, link_bytes={"m1": 1})},
            BudgetError,
            "bandwidth names an unknown device",
        ),
        (SANDWICH, {"compressor": "zip"}, CompressorError, "unknown compressor"),
        (["cpu", "tpu"], {}, DeviceError, "tpu"),
    ],
)
def test_bad_requests(devices: list[str], options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        plan(TOY, devices, **options)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (
            {"macs": {"cpu": "1M"}},
            r"macs of cpu is missed by 1\.00e6 \(100 %\)[^$]*found: +2\.00e6[^$]*1\.00e6",
        ),
        ({"memory": {"server/cuda": "10kB"}}, r"memory of server/cuda is missed by[^$]*allowed: 10\.0 kB"),
        ({"link_bytes": "35kB"}, r"link_bytes from client to server is missed by 200 B \(0\.571 %\)"),
        ({"link_bytes": {"cpu -> server/cuda": "35kB"}}, r"from client to server is missed by 200 B"),
        ({"link_bytes": {"server -> client": "16kB"}}, r"link_bytes from server to client is missed by"),
        ({"link_bytes": {"m1": "16kB"}}, r"over the cut m1 is missed by 16\.0 kB \(100 %\)"),
        ({"step_time": "1us"}, r"step_time is missed by [^$]*allowed: 1\.00 us"),
    ],
)
def test_given_cuts_that_break_the_budget(limits: dict[str, Any], says: str) -> None:
    with pytest.raises(BudgetError, match=r"the plan breaks the budget: [^$]*cuts: m1, m3") as caught:
        plan(TOY, SANDWICH, cuts=["m1", "m3"], budget=Budget(**limits))
    caught.match(says)


def test_a_budget_binds_the_choice() -> None:
    free = plan(TOY, SANDWICH)
    assert free.cut_names == ("m1", "m3")
    bound = plan(TOY, SANDWICH, budget=Budget(macs={"server/cuda": "600M"}))
    assert bound.is_optimal and bound.parts[1].macs <= 600_000_000
    narrow = plan(TOY, SANDWICH, budget=Budget(link_bytes={"m1": 100}))
    assert narrow.cut_names != free.cut_names and "m1" not in narrow.cut_names


def test_a_budget_that_nothing_satisfies_names_the_nearest_plan() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(TOY, SANDWICH, budget=Budget(macs="100M", step_time="1s"))
    assert caught.value.what.startswith("no plan satisfies the budget: macs of ")
    assert str(caught.value.where).startswith("nearest plan on cpu, server/cuda, cpu, cuts: m")
    assert (caught.value.found, caught.value.allowed) == ("5.02e8", "1.00e8")


def test_a_limit_of_zero_can_be_kept_and_missed() -> None:
    assert plan(TOY, ["cpu", "cpu"], budget=Budget(link_bytes=0)).is_optimal
    with pytest.raises(BudgetError, match="link_bytes"):
        plan(TOY, ["cpu", "a/cpu"], budget=Budget(link_bytes=0))
