"""The budget: how it is written, checked and saved."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsplit.errors import BudgetError, PlanError
from fxsplit.planning import Budget

FULL = Budget(
    macs={"cpu": 1e9, "a/cuda": "2G"},
    memory="2GiB",
    link_bytes={"m1": "8MB"},
    bandwidth="50Mbit/s",
    latency="20ms",
    step_time="400ms",
)


def test_strings_are_parsed_at_once() -> None:
    assert FULL.to_dict() == {
        "macs": {"cpu": 10**9, "a/cuda": 2 * 10**9},
        "memory": 2 * 2**30,
        "link_bytes": {"m1": 8_000_000},
        "bandwidth": 6.25e6,
        "latency": 0.02,
        "step_time": 0.4,
    }


def test_limits_are_asked_for_by_name() -> None:
    assert (FULL.macs_limit("cpu"), FULL.macs_limit("b/cpu"), FULL.memory_limit("b/cpu")) == (
        10**9,
        None,
        2**31,
    )
    assert FULL.link_limit is None and FULL.cut_limits == {"m1": 8_000_000}
    assert (FULL.bandwidth, FULL.latency, FULL.step_time_s) == (6.25e6, 0.02, 0.4)
    assert Budget(link_bytes="1kB").link_limit == 1000 and Budget(link_bytes="1kB").cut_limits == {}


def test_an_empty_budget_limits_nothing() -> None:
    empty = Budget()
    assert empty.to_dict() == {} and empty == Budget(macs=None)
    assert empty.macs_limit("cpu") is empty.memory_limit("cpu") is empty.link_limit is empty.step_time_s is None


def test_it_cannot_be_changed() -> None:
    limits = {"cpu": 5}
    budget = Budget(macs=limits)
    limits["cpu"] = 6
    assert budget.macs_limit("cpu") == 5
    changing: Any = budget
    with pytest.raises(TypeError):
        changing.macs["cpu"] = 7
    with pytest.raises(AttributeError):
        changing.macs = 7


def test_equal_budgets_are_one_key_and_survive_copies() -> None:
    assert pickle.loads(pickle.dumps(FULL)) == copy.deepcopy(FULL) == FULL
    assert len({FULL, copy.deepcopy(FULL), Budget()}) == 2


amounts = st.integers(0, 10**15)
names = st.sampled_from(["cpu", "a/cuda", "b/cpu"])
limits = st.none() | amounts | st.dictionaries(names, amounts)
times = st.none() | st.floats(1e-6, 1e3)


@given(
    st.fixed_dictionaries(
        {"macs": limits, "memory": limits, "link_bytes": limits, "bandwidth": times, "latency": times}
    )
)
def test_json_round_trip(lines: dict[str, Any]) -> None:
    budget = Budget(**lines)
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({"memory": "2 apples"}, "memory has an unknown unit"),
        ({"memory": {"cpu": "-2GB"}}, "memory of cpu is negative"),
        ({"macs": {"": 3}}, "macs has a key that is no name"),
        ({"macs": {3: 3}}, "macs has a key that is no name"),
        ({"macs": ["1e9"]}, "macs is not a quantity"),
        ({"bandwidth": [3]}, "bandwidth is not a quantity"),
        ({"bandwidth": {"cpu": 0}}, "bandwidth of cpu must be more than zero"),
        ({"bandwidth": 0}, "bandwidth must be more than zero"),
        ({"step_time": "0s"}, "step_time must be more than zero"),
        ({"latency": "fast"}, "latency does not begin with a number"),
        ({"speed": 3}, "unknown budget line"),
        ([], "not a mapping"),
    ],
)
def test_bad_budgets_are_refused(lines: Any, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        Budget.from_dict(lines)


def test_a_budget_error_is_a_plan_error_and_lists_what_is_known() -> None:
    with pytest.raises(PlanError, match=r"found: +'speed'[^$]*macs, memory, link_bytes, bandwidth"):
        Budget.from_dict({"speed": 3})
