"""What is measured: bytes, seconds, bandwidth, and the trace; and that steps leave nothing behind."""

from __future__ import annotations

import gc
import io
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import PipelineError
from fxsplit.opening import trace_for_planning
from fxsplit.planning import Profile
from fxsplit.planning.units import format_seconds
from fxsplit.runtime.metrics import Bandwidth, Metrics, WorkerTime
from fxsplit.runtime.report import LinkTraffic, RunReport, Span
from fxsplit.trace import Arguments
from tests.comparison import CHAIN2, MOBILENET, SANDWICH, TRANSPORTS
from tests.models import images, mobilenet

LABELS = torch.arange(8)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_second_and_byte_has_a_place(transport: str, tmp_path: Path) -> None:
    x = images(8, 64)
    with fxsplit.compile(
        mobilenet(),
        CHAIN2,
        cuts=MOBILENET[2],
        chunks=4,
        schedule="1f1b",
        compressor="uniform8",
        transport=transport,
    ) as pipe:
        pipe(x)
        pipe.metrics.reset()
        for _ in range(2):
            pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
        metrics, workers = pipe.metrics, ("client", "server")
        assert metrics.calls == 2 and metrics.samples == 16
        assert set(metrics.workers) == set(workers) == set(metrics.peak_memory_bytes)
        assert set(metrics.stages) == {0, 1}
        for name, time in metrics.workers.items():
            assert 0 < time.compute_s + time.wait_s <= metrics.total_s, name
            assert time.encode_s > 0 and time.decode_s > 0
            assert 0.0 <= metrics.bubble_share(name) < 1.0
            assert metrics.peak_memory_bytes[name] > 10e6
        assert metrics.samples_per_s == pytest.approx(8 / metrics.batch_s)
        forward = metrics.links["client", "server", False]
        assert metrics.average_bytes_per_s("client", "server") == pytest.approx(
            forward.wire_bytes / metrics.compute_s
        )
        there = metrics.bandwidths["client", "server"]
        assert there.wire_bytes > 0
        assert there.peak_bytes_per_s > 0 and there.busy_bytes_per_s > 0
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(metrics)
        text = console.export_text()
        assert "client -> server" in text and "stage 1" in text and "samples/s" in text

        path = tmp_path / "trace.json"
        pipe.trace(path)
        events = json.loads(path.read_text())["traceEvents"]
        names = {event["args"]["name"] for event in events if event["ph"] == "M"}
        assert {"client", "server", "compute", "encode", "decode", "link to server", "link to client"} <= names
        spans = [event for event in events if event["ph"] == "X"]
        found = {event["name"] for event in spans}
        assert {
            "F0.0",
            "F1.3",
            "B1.0",
            "B0.3",
            "loss 1.2",
            "encode 0->1.0",
            "decode 1->0.3",
            "send 0->1.0",
        } <= found
        assert min(event["ts"] for event in spans) >= 0 and all(event["dur"] >= 0 for event in spans)
        last = max(event["ts"] + event["dur"] for event in spans)
        assert last < 2 * 1e6 * metrics.total_s + 1e6, "the clocks of the workers are one"
        with pytest.raises(PipelineError, match="cannot be written"):
            pipe.trace(tmp_path / "no" / "folder.json")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_prediction_of_a_saved_plan_is_beside_what_was_measured(transport: str, tmp_path: Path) -> None:
    x, model, path = images(8, 64), mobilenet(), tmp_path / "plan.json"
    costs = fxsplit.analyze(trace_for_planning(model, Arguments.of(x)), x)
    plan = fxsplit.plan(costs, CHAIN2, cuts=MOBILENET[2], chunks=2, profile=Profile())
    plan.save(path)
    with fxsplit.compile(model, CHAIN2, plan=str(path), example_inputs=x, transport=transport) as pipe:
        metrics = pipe.metrics
        assert metrics.predicted_step_s == plan.predicted_step_s > 0
        before = metrics.over_predicted
        for _ in range(2):
            pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
        measured = metrics.over_predicted
        assert before is None and measured == metrics.total_s / 2 / plan.predicted_step_s > 0
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(metrics)
        said = f"step predicted {format_seconds(plan.predicted_step_s)}, {measured:.2f} times that"
        assert said in " ".join(console.export_text().split())
        metrics.reset()
        assert metrics.predicted_step_s == plan.predicted_step_s and metrics.over_predicted is None


def test_nothing_to_trace() -> None:
    with (
        fxsplit.compile(
            mobilenet(), CHAIN2, cuts=MOBILENET[2], example_inputs=images(4), transport="in_process", verify=False
        ) as pipe,
        pytest.raises(PipelineError, match="no step yet"),
    ):
        pipe.trace("trace.json")


def test_sums_by_hand() -> None:
    metrics = Metrics(calls=2, samples=10, total_s=4.0, stage_count=2)
    report = RunReport("a", compute_s=1.0, wait_s=2.0)
    report.traffic["b", False] = LinkTraffic("a", "b", False, 4000, 1000, 1)
    report.spans = [
        Span("F", 0, 0, 0, 0.0, 0.75),
        Span("loss", 0, 0, 0, 0.75, 1.0),
        Span("decode", 1, 0, 0, 0.0, 0.5),
        Span("send", 0, 1, 0, 1.0, 2.0, 100_000, "b"),
        Span("send", 0, 1, 1, 2.0, 2.5, 100_000, "b"),
        Span("send", 0, 1, 1, 2.5, 2.5001, 100, "b"),
    ]
    metrics.add(report)
    assert metrics.stages == {0: WorkerTime(compute_s=1.0, decode_s=0.5)}
    assert metrics.bandwidths["a", "b"].peak_bytes_per_s == 200_000
    assert metrics.bandwidths["a", "b"].wire_bytes == 200_100
    assert metrics.batch_s == 2.0 and metrics.samples_per_s == 2.5 and metrics.bubble_share("a") == 0.75
    assert metrics.average_bytes_per_s("a", "b") == 1000.0
    assert Bandwidth().busy_bytes_per_s == 0.0


def test_two_hundred_steps_leave_nothing() -> None:
    """Threads, file descriptors and shared memory are as before; memory does not grow by a step's activations."""
    x, labels = images(8), LABELS
    with fxsplit.compile(
        mobilenet(), SANDWICH, cuts=MOBILENET[3], chunks=2, schedule="auto", compressor="uniform8", verify=False
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.01)
        pids = [worker.pid for worker in pipe.workers]

        def steps(count: int) -> None:
            for _ in range(count):
                optimizer.zero_grad()
                pipe.step(x, target=labels, loss_fn=F.cross_entropy)
                optimizer.step()
            gc.collect()

        steps(20)
        before = [state_of(pid) for pid in pids]
        steps(180)
        after = [state_of(pid) for pid in pids]
        assert [state[:2] for state in before] == [state[:2] for state in after]
        assert all(late[2] - early[2] < 8 << 20 for early, late in zip(before, after, strict=True)), (
            before,
            after,
        )
        assert threading.active_count() < 20


def state_of(pid: int) -> tuple[int, int, int]:
    """Threads, file descriptors and resident bytes of a process."""
    folder = Path(f"/proc/{pid}")
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir())), resident
