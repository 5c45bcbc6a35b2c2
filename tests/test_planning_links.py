"""Links that differ, the optimizer's memory, and what a plan says it was compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxsplit
from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.errors import BudgetError, PlanError
from fxsplit.planning import Budget, Plan, parse_devices
from fxsplit.planning.links import Link, Links
from fxsplit.schedules import schedule as schedule_of
from fxsplit.schedules import simulate
from fxsplit.spec import TensorSpec

DEVICES = ["cpu", "a/cpu", "b/cuda"]


def chain() -> CostTable:
    """Four nodes in a chain: the first makes much, the third makes little."""
    sizes = [4000, 3000, 50, 10]
    values = [Value("x", -1, (0,), TensorSpec((8, 1000), torch.float32), False)]
    values += [Value(f"n{i}", i, (i + 1,), TensorSpec((8, n), torch.float32), True) for i, n in enumerate(sizes)]
    nodes = [NodeCost(f"n{i}", f"m{i}", "Linear", 10**8, 32 * n, 1000) for i, n in enumerate(sizes)]
    return CostTable("Toy", "f00d", 8, tuple(nodes), tuple(values), {f"m{i}": i for i in range(4)})


def test_a_pair_counts_before_devices_and_of_devices_the_slower() -> None:
    budget = Budget(
        bandwidth={"a/cpu": "1MB/s", "b": "2MB/s", "cpu -> b/cuda": "3MB/s"}, latency={"client->a": "7ms"}
    )
    links = Links.of(budget, parse_devices(DEVICES), {("b", "client"): Link(5.0, 0.1, "measured")})
    assert links.between("client", "a") == Link(1e6, 7e-3, "given")
    assert links.between("a", "client") == Link(1e6, Link().latency_s, "given")
    assert links.between("client", "b").bytes_per_s == 3e6
    assert links.between("b", "client") == Link(2e6, 0.1, "given")
    assert links.between("a", "b").bytes_per_s == 1e6


def test_what_was_measured_counts_where_nothing_is_said() -> None:
    measured = {("client", "a"): Link(5e6, 0.1, "measured")}
    links = Links.of(Budget(), parse_devices(DEVICES), measured)
    assert links.between("client", "a") == measured["client", "a"]
    assert links.between("a", "client") == Link()


@pytest.mark.parametrize("key", ["c/cpu", "cpu -> c/cpu", "cpu ->"])
def test_unknown_ends_are_named(key: str) -> None:
    with pytest.raises(BudgetError, match="bandwidth names an unknown device"):
        fxsplit.plan(chain(), DEVICES, budget=Budget(bandwidth={key: "1MB/s"}))


def test_the_slow_link_is_cut_where_little_crosses() -> None:
    slow = fxsplit.plan(chain(), DEVICES, budget=Budget(bandwidth={"cpu->a/cpu": "1MB/s", "b/cuda": "1GB/s"}))
    assert slow.cut_names[0] == "m3" or slow.edges[0].wire_bytes == min(e.wire_bytes for e in slow.edges)
    rates = {(link.sender, link.receiver): link.bytes_per_s for link in slow.links}
    assert rates["client", "a"] == 1e6 and rates["a", "b"] == 1e9
    assert "link client -> a 1.00 MB/s" in slow.note


def test_the_plan_keeps_the_times_it_was_predicted_with() -> None:
    budget = Budget(bandwidth="1MB/s", latency="1ms")
    for schedule in ("gpipe", "auto"):
        found = fxsplit.plan(
            chain(), ["cpu", "s/cuda", "cpu"], compressor="uniform8", chunks=4, schedule=schedule, budget=budget
        )
        again = Plan.from_json(found.to_json())
        assert again.times == found.times and any(hop.encode_s > 0 for hop in again.hops)
        orders = schedule_of(schedule).orders(again.workers, 4, again.times)
        step_s = simulate(orders, again.workers, again.times).step_s
        assert step_s == pytest.approx(found.predicted_step_s, rel=1e-12)


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_the_optimizer_counts_as_memory(optimizer: str, states: int) -> None:
    found = fxsplit.plan(chain(), ["cpu"], optimizer=optimizer)
    plain = fxsplit.plan(chain(), ["cpu"], optimizer="sgd")
    assert found.parts[0].memory_bytes - plain.parts[0].memory_bytes == states * 4000
    assert found.optimizer == optimizer
    served = fxsplit.plan(chain(), ["cpu"], optimizer=optimizer, objective="latency")
    assert served.parts[0].memory_bytes == plain.parts[0].memory_bytes - 4000  # no gradients either


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(PlanError, match=r"unknown optimizer[^$]*sgd, momentum, adam"):
        fxsplit.plan(chain(), ["cpu"], optimizer="adamax")


def test_one_device_the_raw_input_and_no_compression_are_always_looked_at() -> None:
    found = fxsplit.plan(chain(), ["cpu", "s/cuda", "cpu"], cuts=["m1", "m3"], compressor="uniform8")
    assert {each.what for each in found.alternatives} == {
        "all on cpu",
        "all on s/cuda",
        "the raw input sent",
        "no compression",
    }
    by_name = {each.what: each.step_s for each in found.alternatives}
    plain = fxsplit.plan(chain(), ["cpu", "s/cuda", "cpu"], cuts=["m1", "m3"])
    assert by_name["no compression"] == pytest.approx(plain.predicted_step_s)
    assert by_name["all on cpu"] == pytest.approx(fxsplit.plan(chain(), ["cpu"]).predicted_step_s)
    free: dict[str, Any] = {"placement": "auto", "compressor": "auto"}
    best = fxsplit.plan(chain(), ["cpu", "s/cuda", "cpu"], **free).predicted_step_s
    assert best <= min(by_name.values()) * (1 + 1e-12)
    assert "beside it: all on" in str(found)


def test_a_budget_holds_for_what_is_beside_the_plan() -> None:
    found = fxsplit.plan(chain(), ["cpu", "s/cuda"], budget=Budget(macs={"cpu": 10**8}))
    assert not next(each for each in found.alternatives if each.what == "all on cpu").keeps_budget
    assert "(breaks the budget)" in str(found)
