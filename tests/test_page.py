"""The page of a plan, and why a plan is as it is."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fxsplit
from fxsplit.cli import app
from fxsplit.page import page
from fxsplit.planning import Budget
from fxsplit.planning.explain import busiest, explain_plan, timeline_of
from fxsplit.planning.neighbours import neighbours
from tests.test_planning_links import chain

DEVICES = ["cpu", "s/cuda", "cpu"]
BUDGET = Budget(bandwidth="10MB/s", macs={"cpu": 2 * 10**8})
OPTIONS: dict[str, Any] = {"compressor": "uniform8", "chunks": 2, "budget": BUDGET}


class _Links(HTMLParser):
    """What a page refers to, and whether it runs anything."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "link", "object"):
            self.found.append(tag)
        self.found += [f"{name}={value}" for name, value in attrs if name in ("src", "href") and value]


def test_the_page_is_one_file_that_refers_to_nothing_outside() -> None:
    plan = fxsplit.plan(chain(), DEVICES, **OPTIONS)
    text = page(chain(), plan, BUDGET)
    parser = _Links()
    parser.feed(text)
    outside = [each for each in parser.found if not re.search(r"=#", each)]
    assert not outside and text.count("<svg") == 3
    assert "this plan" in text and "Toy" in text and "all on cpu" in text


def test_a_plan_on_one_device_has_a_page() -> None:
    assert "all on" not in page(chain(), fxsplit.plan(chain(), ["cpu"]))


def test_neighbours_differ_in_one_choice_and_are_priced_as_the_plan_is() -> None:
    plan = fxsplit.plan(chain(), DEVICES, **OPTIONS)
    beside = neighbours(chain(), plan, budget=BUDGET)
    by_name = {each.what: each for each in beside}
    assert {"1 micro-batches", "4 micro-batches", "no compression", "sortquant8"} <= set(by_name)
    assert any(name.startswith("cut ") for name in by_name)
    assert [e.plan.predicted_step_s for e in beside] == sorted(e.plan.predicted_step_s for e in beside)
    same = fxsplit.plan(chain(), DEVICES, cuts=plan.cut_names, **{**OPTIONS, "chunks": 4})
    assert by_name["4 micro-batches"].plan.predicted_step_s == same.predicted_step_s
    # Of what keeps the budget and has these chunks and this compressor, nothing is faster: the plan is optimal.
    kept = [e for e in beside if e.what.startswith("cut ") and e.refusal is None]
    assert plan.is_optimal and all(e.plan.predicted_step_s >= plan.predicted_step_s * (1 - 1e-9) for e in kept)


def test_the_explanation_prices_each_line_of_the_budget() -> None:
    plan = fxsplit.plan(chain(), DEVICES, **OPTIONS)
    text = explain_plan(chain(), plan, DEVICES, OPTIONS).text()
    assert "budget line macs" in text and "this plan" in text and "all on s/cuda" in text
    timeline = timeline_of(plan)
    for worker in ("client", "s"):
        assert f"{worker} {timeline.bubble_share(worker):.0%}" in text.partition("share of that:")[2]
    tight = Budget(bandwidth="10MB/s", link_bytes="25kB")
    options = {**OPTIONS, "budget": tight}
    bound = fxsplit.plan(chain(), DEVICES, **options)
    free = fxsplit.plan(chain(), DEVICES, **{**OPTIONS, "budget": Budget(bandwidth="10MB/s")})
    costs = bound.predicted_step_s - free.predicted_step_s
    assert ("costs nothing" in explain_plan(chain(), bound, DEVICES, options).text()) == (costs <= 1e-12)


def test_the_timeline_is_the_prediction() -> None:
    plan = fxsplit.plan(chain(), DEVICES, **OPTIONS)
    assert timeline_of(plan).step_s == pytest.approx(plan.predicted_step_s)
    name, share = busiest(timeline_of(plan))
    assert name in {span.resource for span in timeline_of(plan).spans} and 0 < share <= 1


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_plan_for_inference_is_explained_and_drawn_by_its_forwards(objective: str) -> None:
    # 1f1b is not for one micro-batch of three stages: no order of a training step is asked for.
    options: dict[str, Any] = {"objective": objective, "schedule": "1f1b", "chunks": 1}
    plan = fxsplit.plan(chain(), ["cpu", "s/cuda", "b/cpu"], **options)
    text = explain_plan(chain(), plan, ["cpu", "s/cuda", "b/cpu"], options).text()
    assert "predicted seconds of a batch forward" in text and "computes nothing" in text
    drawn = page(chain(), plan, objective=objective)
    assert drawn.count("<svg") == 3 and "this plan" in drawn
    sandwich = fxsplit.plan(chain(), DEVICES, objective="latency", chunks=2)  # nothing goes back to the client
    timeline = timeline_of(sandwich, is_training=False)
    assert timeline.step_s == pytest.approx(sandwich.predicted_step_s)
    assert all(span.action.is_forward for span in timeline.spans)


def test_the_command_line_writes_and_explains(tmp_path: Path) -> None:
    source, target = tmp_path / "model.py", tmp_path / "report.html"
    source.write_text("from torch import nn\nmodel = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))\n")
    command = ["analyze", str(source), "-i", "4,8", "--devices", "cpu,cuda"]
    result = CliRunner().invoke(app, [*command, "--html", str(target), "--explain"], env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    assert "this plan" in result.output and target.read_text().startswith("<!doctype html>")
    result = CliRunner().invoke(app, [*command, "--html", str(tmp_path / "no" / "where.html")])
    assert result.exit_code == 1 and "the folder for the page does not exist" in result.output
    result = CliRunner().invoke(app, [*command, "--html", str(tmp_path)])
    assert result.exit_code == 1 and "is a folder" in result.output
