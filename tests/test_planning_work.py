"""How much work planning is, counted: candidates that are simulated, and passes over the nodes."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

import fxsplit
from fxsplit.opening import trace_for_planning
from fxsplit.planning import Budget
from fxsplit.planning import chain as chain_module
from fxsplit.planning.problem import Problem
from fxsplit.trace import Arguments
from tests.models import images, inputs_of, mobilenet, transformer
from tests.test_planning import chain

EIGHT = ["cpu", *(f"w{index}/cpu" for index in range(1, 8))]
GUARD = fxsplit.Guard(("uniform8", "fastquant8", "sortquant8"))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what planning does."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)

    count(chain_module, "_solve")
    count(Problem, "outcome")
    return counts


def test_the_passes_over_a_long_chain_do_not_grow_with_it(work: Counter[str]) -> None:
    """A pass looks at each node once for each device, so that time is nearly linear in the nodes."""
    found = {}
    for count in (1_000, 10_000):
        draw = random.Random(0)
        costs = chain(*([draw.randint(*ends) for _ in range(count)] for ends in ((10**6, 10**8), (1, 10**5))))
        work.clear()
        assert fxsplit.plan(costs, EIGHT, chunks=8).is_optimal
        found[count] = Counter(work)
    assert 1 <= found[10_000]["_solve"] <= 2 * found[1_000]["_solve"] <= chain_module.MOST_PASSES
    assert found[10_000]["outcome"] == found[1_000]["outcome"] <= 8


@pytest.mark.parametrize("kind", ["mobilenet", "roberta"])
def test_few_of_the_candidates_are_simulated(kind: str, work: Counter[str]) -> None:
    """Bounds rule out all but a few of the cuts, codecs and numbers of micro-batches of a real model."""
    is_image = kind == "mobilenet"
    model, batch = (mobilenet(), images(8, 64)) if is_image else (transformer(kind), inputs_of(kind, 8))
    costs = fxsplit.analyze(trace_for_planning(model, Arguments.of(batch), verify=False), batch)
    asked: dict[str, Any] = {"compressor": "auto", "guard": GUARD, "chunks": "auto"}
    devices = ["cpu", "server/cuda", "cpu"]
    found = fxsplit.plan(costs, devices, budget=Budget(bandwidth="200Mbit/s"), **asked)
    assert found.is_optimal and 0 < work["outcome"] <= 50
