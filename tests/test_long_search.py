"""The search for what is too large to enumerate: on graphs that are not, beside brute force."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fxsplit.costs import CostTable
from fxsplit.errors import BudgetError, PlanError
from fxsplit.planning import Budget, Plan, plan, planner
from fxsplit.planning.limits import violations
from tests.test_planner_exact import REPLICATED, case, direction_budget, every_draft, problem_of, random_budget

NAMES = ("step", "latency", "throughput", "price")


@pytest.fixture(autouse=True)
def nothing_is_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every search is the long one."""
    monkeypatch.setattr(planner, "EXACT_CELLS", 0)


@pytest.mark.parametrize("seed", range(160))
def test_what_is_found_holds_beside_brute_force(seed: int) -> None:
    costs, devices, options, links = case(seed)
    options["objective"] = NAMES[seed // 3 % len(NAMES)]  # the kinds of graphs go by three
    assert_sound(seed, costs, devices, options, links)


@pytest.mark.parametrize("seed", range(1000, 1040))
def test_what_is_found_for_replicas_holds_beside_brute_force(seed: int) -> None:
    costs, devices, options, links = case(seed, REPLICATED)
    options["objective"] = NAMES[seed // 3 % len(NAMES)]
    assert_sound(seed, costs, devices, options, links)


def assert_sound(
    seed: int, costs: CostTable, devices: list[str], options: dict[str, Any], links: dict[str, Any]
) -> None:
    """It keeps the budget, its bound is one, and "optimal" and "no plan" are said only where they are true."""
    drafts = list(every_draft(problem_of(costs, devices, options, Budget(**links))))
    if not drafts:
        with pytest.raises(PlanError):
            plan(costs, devices, **options, budget=Budget(**links))
        return
    draw = random.Random(seed + 10**6)
    for lines in ({}, random_budget(draw, drafts), direction_budget(draw, drafts)):
        budget = Budget(**links, **lines)
        problem = problem_of(costs, devices, options, budget)
        excess = [max((v.excess for v in violations(d, costs, budget)), default=0.0) for d in drafts]
        kept = [draft.value for draft, missed in zip(drafts, excess, strict=True) if missed <= 0]
        try:
            found = plan(costs, devices, **options, budget=budget)
        except BudgetError as error:
            missed = float(error.what.partition("(")[2].partition(" %")[0]) / 100
            assert missed >= min(excess) * (1 - 1e-2) - 1e-6
            assert not kept or error.what.startswith("no plan was found that satisfies the budget")
            continue
        assert Plan.from_json(found.to_json()) == found
        price_per_s = problem.objective.price_per_s(found.devices)
        value, bound = found.predicted_step_s * price_per_s, found.lower_bound_s * price_per_s
        assert kept and bound <= min(kept) * (1 + 1e-6) and value >= min(kept) * (1 - 1e-9)
        assert not found.is_optimal or value == pytest.approx(min(kept), rel=2e-6)
        alone = [d.value for d, missed in zip(drafts, excess, strict=True) if missed <= 0 and not d.positions]
        assert value <= min(alone, default=value) * (1 + 1e-9), "the client alone is always looked at"
