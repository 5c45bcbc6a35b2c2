"""Measuring nodes, compressors and links; keeping it; planning with it."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxsplit
from fxsplit.cli import app
from fxsplit.errors import DeviceError, PlanError
from fxsplit.measure import timed
from fxsplit.opening import trace_for_planning
from fxsplit.planning import NodeSeconds, Profile, parse_devices
from fxsplit.planning.calibration import CLIENT, WORKER, Calibration, cached
from fxsplit.planning.link_file import load_links, save_links
from fxsplit.planning.links import Link
from fxsplit.planning.profile import Split
from fxsplit.trace import Arguments, trace

X = torch.rand(8, 16)
FILE = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
example_inputs = torch.rand(8, 16)
"""


def model() -> nn.Module:
    """In-place operations, batch statistics, random numbers and a branch."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.5)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = x + self.body(x)
            return result

    return nn.Sequential(Block(), Block(), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def found() -> Calibration:
    torch.set_num_threads(1)  # as in the tests: it is a part of the cache's key
    return fxsplit.calibrate(model(), X, compressors=["uniform8", "none"], repeats=2)


def test_every_node_is_measured_and_nothing_changes() -> None:
    subject = model()
    before, random_state = copy.deepcopy(subject.state_dict()), torch.get_rng_state()
    measured = fxsplit.calibrate(subject, X, compressors=["uniform8"], repeats=2)
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in subject.parameters())
    costs = fxsplit.analyze(trace_for_planning(subject, Arguments.of(X)), X)
    assert [node.name for node in measured.nodes] == [node.name for node in costs.nodes]
    by_name = {node.name: node for node in measured.nodes}
    linear = next(name for name, row in ((n.name, n) for n in costs.nodes) if row.kind == "Linear")
    assert by_name[linear].forward_s + by_name[linear].forward_call_s > 0
    assert by_name[linear].backward_s + by_name[linear].backward_call_s > 0
    (codec,) = measured.codecs
    assert codec.encode_s_per_byte > 0 or codec.call_s > 0


def test_the_document_round_trips_and_is_checked(found: Calibration, tmp_path: Path) -> None:
    assert Calibration.from_json(found.to_json()) == found
    path = found.save(tmp_path / "found.json")
    assert Calibration.load(path) == found
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(PlanError, match="the calibration is damaged"):
        Calibration.load(path)
    path.write_text(json.dumps({**json.loads(text), "version": 9}))
    with pytest.raises(PlanError, match="another version"):
        Calibration.load(path)
    with pytest.raises(PlanError, match="cannot be read"):
        Calibration.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="cannot be written"):
        found.save(tmp_path / "no" / "where.json")


def test_the_cache_is_by_model_device_role_and_version(
    found: Calibration, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached(found.fingerprint, "cpu", CLIENT) is None
    path = found.save()
    assert path.is_relative_to(own_cache) and cached(found.fingerprint, "cpu", CLIENT) == found
    assert cached(found.fingerprint, "cpu", WORKER) is None and cached("other", "cpu", CLIENT) is None
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "0.1.2")
        assert cached(found.fingerprint, "cpu", CLIENT) is None
    path.write_text("{")  # as good as none
    assert cached(found.fingerprint, "cpu", CLIENT) is None


def test_a_coarser_graph_takes_as_long_as_its_parts(found: Calibration) -> None:
    fine = fxsplit.analyze(trace_for_planning(model(), Arguments.of(X)), X)
    coarse = fxsplit.analyze(trace(model(), X, cuts=["1"]), X)
    assert len(coarse) < len(fine)
    placement = parse_devices(["cpu"])[0]
    totals = []
    for costs in (fine, coarse):
        profile = Profile.of(costs, {"cpu": found})
        rows = [profile.node(node, placement) for node in costs.nodes]
        totals.append(tuple(sum(getattr(r, n) for r in rows) for n in ("forward_s", "backward_s", "call_s")))
    assert totals[0] == pytest.approx(totals[1])


def test_another_model_or_device_is_refused(found: Calibration) -> None:
    costs = fxsplit.analyze(trace(nn.Linear(16, 4), X), X)
    with pytest.raises(PlanError, match="of another model"):
        Profile.of(costs, {"cpu": found})
    with pytest.raises(DeviceError, match="no such device"):
        fxsplit.calibrate(nn.Linear(16, 4), X, "cuda:7")
    with pytest.raises(PlanError, match="unknown role"):
        fxsplit.calibrate(nn.Linear(16, 4), X, role="boss")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.mark.parametrize(("like", "factor"), [("cuda", 2.0), ("cpu", 0.0), ("cpu", float("inf")), ("cpu", -1.0)])
def test_only_what_was_measured_is_scaled(like: str, factor: float) -> None:
    known = Profile({"cpu": {"n": NodeSeconds(1.0, 2.0)}})
    assert known.scaled("b/cpu", "cpu", 0.5).nodes["b/cpu"] == {"n": NodeSeconds(0.5, 1.0)}
    with pytest.raises(PlanError, match=rf"cannot be scaled[^$]*{factor} times {like}[^$]*more than 0 times cpu"):
        known.scaled("b/cpu", like, factor)


def test_the_commands_work_together(tmp_path: Path) -> None:
    source, saved = tmp_path / "model.py", tmp_path / "worker.json"
    source.write_text(FILE)
    analyzed = ("analyze", str(source), "--devices", "cpu,server/cpu", "--cuts", "2")
    assert "estimated: cpu" in run(*analyzed)[1]
    status, out = run("calibrate", str(source), "--repeats", "2", "--save", str(saved), "--threads", "1")
    assert status == 0 and "as client" in out and "as worker" in out and "sortquant8" in out, out
    status, out = run(*analyzed)
    assert status == 0 and "measured: cpu; estimated: cpu" in out, out
    status, out = run(*analyzed, "--profile", f"server/cpu={saved}")
    assert status == 0 and "measured: cpu, server/cpu" in out, out
    assert "measured" not in run(*analyzed, "--profile", "none")[1]
    for wrong, says in ((f"b/cpu={saved}", "not a profile"), ("server/cpu", "not a profile")):
        status, out = run(*analyzed, "--profile", wrong)
        assert status == 1 and says in out
    saved.write_text("[]")
    status, out = run(*analyzed, "--profile", f"server/cpu={saved}")
    assert status == 1 and "the calibration is damaged" in out


def test_links_are_measured_over_real_workers_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    status, out = run("probe", "--devices", "cpu,server/cpu", "--save", str(path))
    assert status == 0 and "client -> server" in out, out
    links = load_links(path)
    assert set(links) == {("client", "server"), ("server", "client")}
    assert all(link.bytes_per_s > 1e6 and 0 < link.latency_s < 1 for link in links.values())
    source = tmp_path / "model.py"
    source.write_text(FILE)
    status, out = run("analyze", str(source), "--devices", "cpu,server/cpu", "--links", str(path))
    assert status == 0 and "(measured)" in out, out
    path.write_text('{"version": 1, "links": [{"sender": "a"}]}')
    status, out = run("analyze", str(source), "--links", str(path))
    assert status == 1 and "the file of links is damaged" in out
    with pytest.raises(DeviceError, match="no link to measure"):
        fxsplit.probe(["cpu"])


@pytest.mark.parametrize("transport", ["rpc", "in_process"])
def test_links_between_workers_are_measured_too_and_planned_with(transport: str, tmp_path: Path) -> None:
    devices = ["cpu", "a/cpu", "b/cpu"]
    links = fxsplit.probe(devices, transport=transport)
    names = ("client", "a", "b")
    assert set(links) == {(one, other) for one in names for other in names if one != other}
    assert all(link.origin == "measured" and link.bytes_per_s > 0 for link in links.values())
    save_links(links, tmp_path / "links.json")
    assert load_links(tmp_path / "links.json") == links
    costs = fxsplit.analyze(trace_for_planning(model(), Arguments.of(X)), X)
    plan = fxsplit.plan(costs, devices, cuts=["1", "2"], profile=Profile(links=links))
    found = {(link.sender, link.receiver): link for link in plan.links}
    assert found["a", "b"].bytes_per_s == links["a", "b"].bytes_per_s and found["b", "a"].origin == "measured"


def test_links_round_trip(tmp_path: Path) -> None:
    links: dict[Any, Link] = {("client", "a"): Link(1e6, 0.1, "measured")}
    save_links(links, tmp_path / "links.json")
    assert load_links(tmp_path / "links.json") == links


def test_compile_plans_with_what_was_kept() -> None:
    fxsplit.calibrate(model(), X, compressors=["uniform8"], repeats=1).save()
    fxsplit.calibrate(model(), X, compressors=["uniform8"], repeats=1, role=WORKER).save()
    for profile, is_measured in ((None, True), (Profile(), False)):
        with fxsplit.compile(
            model(), ["cpu", "server/cpu"], cuts=["1"], example_inputs=X, transport="in_process", profile=profile
        ) as pipe:
            assert [part.is_measured for part in pipe.plan.parts] == [is_measured] * 2


def test_backwards_in_two_parts_are_measured_and_planned_with(found: Calibration) -> None:
    """Both parts together are no less than the whole; the first stage, whose inputs need none, has but one."""
    assert found.input_share > 0 and found.weight_share > 0
    costs = fxsplit.analyze(trace_for_planning(model(), Arguments.of(X)), X)
    devices = ["cpu", "a/cpu", "b/cpu"]
    profile = Profile.of(costs, dict.fromkeys(devices, found))
    for shares, expected in (((0.3, 0.1), (0.5, 0.5)), ((0.7, 0.8), (0.7, 0.8)), ((1.4, 0.1), (1.0, 0.1))):
        split = replace(profile, splits=dict.fromkeys(devices, Split.of(*shares)))
        plan = fxsplit.plan(costs, devices, profile=split, cuts=["1", "2"], chunks=4)
        first, *others = plan.parts
        assert first.input_s == pytest.approx(first.step_s - first.forward_s) and first.weight_s == 0.0
        for part, times in zip(others, plan.times.stages[1:], strict=True):
            backward_s = part.step_s - part.forward_s
            assert (part.input_s, part.weight_s) == pytest.approx([share * backward_s for share in expected])
            assert 4 * times.backward_s == pytest.approx(backward_s)
    assert profile.split(parse_devices(devices)[1]) == Split.of(found.input_share, found.weight_share)
    nothing = Profile()
    assert nothing.split(parse_devices(devices)[1]) == Split()


def test_a_model_without_gradients_of_inputs_has_no_parts() -> None:
    measured = fxsplit.calibrate(nn.Linear(16, 4), X, compressors=[], repeats=1)
    assert (measured.input_share, measured.weight_share) == (1.0, 0.0)


def test_what_lacks_a_node_is_marked_as_an_estimate(found: Calibration) -> None:
    costs = fxsplit.analyze(trace_for_planning(model(), Arguments.of(X)), X)
    devices = ["cpu", "a/cpu"]
    whole = fxsplit.plan(costs, devices, cuts=["1"], profile=Profile.of(costs, dict.fromkeys(devices, found)))
    assert all(part.is_measured for part in whole.parts) and "estimated: cpu" not in whole.note
    partly = replace(found, nodes=tuple(node for node in found.nodes if not node.module.startswith("2")))
    plan = fxsplit.plan(costs, devices, cuts=["1"], profile=Profile.of(costs, {"cpu": found, "a/cpu": partly}))
    assert [part.is_measured for part in plan.parts] == [True, False]
    assert "measured: cpu;" in plan.note and "estimated: cpu" in plan.note


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_by_its_own_clock(own_cache: Path) -> None:
    """What is timed is the GPU's work and no more than a synchronised host clock sees of it."""
    x = torch.rand(2048, 2048, device="cuda")

    def work() -> None:
        for _ in range(20):
            x @ x

    for _ in range(3):
        timed(work, "cuda")
    start_s = time.perf_counter()
    seconds = timed(work, "cuda")
    assert 0 < seconds <= time.perf_counter() - start_s
    measured = fxsplit.calibrate(model(), X, "cuda", compressors=["uniform8"], repeats=3, role=WORKER)
    assert measured.device == "cuda" and Calibration.from_json(measured.to_json()) == measured
    path = measured.save()
    assert path.is_relative_to(own_cache) and cached(measured.fingerprint, "cuda", WORKER) == measured
    costs = fxsplit.analyze(trace_for_planning(model(), Arguments.of(X)), X)
    plan = fxsplit.plan(
        costs, ["cpu", "a/cuda"], cuts=["1"], profile=Profile.of(costs, {"a/cuda": measured}), chunks=2
    )
    assert [part.is_measured for part in plan.parts] == [False, True]
    assert "measured: a/cuda" in plan.note and "estimated: cpu" in plan.note
