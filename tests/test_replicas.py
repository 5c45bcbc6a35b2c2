"""Replicated stages: how micro-batches are dealt, what is refused, and what a plan predicts of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxsplit
from fxsplit.cli import app
from fxsplit.errors import DeviceError, FxsplitError, PipelineError, PlanError
from fxsplit.planning.devices import parse_devices
from fxsplit.planning.links import Links
from fxsplit.planning.predict import all_reduce_s
from fxsplit.schedules import SCHEDULES, Hop, StageTimes, Times, check, schedule, simulate
from fxsplit.schedules.replicas import replica_for, single_workers

NAMES = [kind.name for kind in SCHEDULES]
TEAMS = [
    ["client", "a+b"],
    ["client", "a+b", "client"],
    ["client", "a+b", "c+d+e"],
    ["client", "a", "b+c", "client", "b+c"],
]


def random_times(draw: random.Random, stages: int) -> Times:
    hops = {(s, s + 1): Hop(*(draw.random() for _ in range(4))) for s in range(stages - 1)}
    own = [StageTimes(draw.random(), draw.random(), draw.random(), draw.randint(1, 9)) for _ in range(stages)]
    return Times(tuple(own), hops, dict(hops))


# ---------------------------------------------------------------------- dealing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", TEAMS, ids=["pair", "sandwich", "two teams", "mixed"])
@pytest.mark.parametrize("chunks", [7, 8, 12])
def test_every_schedule_deals_a_whole_step(name: str, workers: list[str], chunks: int) -> None:
    """Each micro-batch is done once, forward and backward by the same replica, within the limits on memory."""
    if name == "1f1b" and len(set(workers)) < len(workers):
        return
    made, draw = schedule(name), random.Random(chunks)
    times = random_times(draw, len(workers))
    orders = made.orders(workers, chunks, times)
    assert set(orders) == set(single_workers(workers))
    for worker, actions in orders.items():
        assert all(replica_for(workers[a.stage], a.micro_batch) == worker for a in actions)
    timeline = check(orders, workers, chunks, times)
    for stage, live in enumerate(timeline.live):
        assert live <= made.live_limit(stage, workers, chunks)
    assert set(timeline.live_bytes) == set(orders)


def test_replicas_halve_the_time_of_the_longest_stage() -> None:
    """Eight micro-batches through stages of 1 and 10 seconds; the sum of the gradients comes at the end."""
    times = Times((StageTimes(1.0, 0.0, 0.0), StageTimes(10.0, 0.0, 0.0, reduce_s=3.0)))
    alone, pair = ["client", "a"], ["client", "a+b"]
    gpipe = schedule("gpipe")
    assert simulate(gpipe.orders(alone, 8, times), alone, times).step_s == 1.0 + 8 * 10.0 + 3.0
    assert simulate(gpipe.orders(pair, 8, times), pair, times).step_s == 2.0 + 4 * 10.0 + 3.0


def test_an_order_for_the_wrong_replica_is_found() -> None:
    workers, times = ["client", "a+b"], Times.unit(2)
    orders = schedule("gpipe").orders(workers, 2, times)
    swapped = {**orders, "a": orders["b"], "b": orders["a"]}
    with pytest.raises(PlanError, match="an action of another's stage"):
        check(swapped, workers, 2, times)


@pytest.mark.parametrize("name", NAMES)
def test_no_replica_goes_without_a_micro_batch(name: str) -> None:
    with pytest.raises(
        PlanError, match=r"more replicas than the batch has micro-batches[^$]*chunks=2[^$]*at least 3"
    ):
        schedule(name).orders(["client", "a+b+c"], 2, Times.unit(2))


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        (["cpu", "cpu+a/cpu"], "the client takes part"),
        (["a/cpu+b/cpu", "c/cpu"], "the client takes part"),
        (["cpu", "a/cpu+a/cpu"], "named twice"),
        (["cpu", "cuda:0+cuda:0"], "named twice"),
        (["cpu", "a/cpu+b/cuda"], "different kinds of device"),
        (["cpu", "a/cpu+b/cpu", "a/cpu"], "a stage that the other replicas have not"),
        (["cpu", "a/cpu+b/cpu", "b/cpu+c/cpu"], "a stage that the other replicas have not"),
        (["cpu", "a/cpu+"], "not a device"),
        (["cpu", "+"], "not a device"),
        (["cpu", "client/cpu+a/cpu"], "'client' is reserved"),
        (["cpu", "a+b/cpu"], "not a device"),
    ],
)
def test_bad_replicas_are_refused(devices: list[str], says: str) -> None:
    with pytest.raises(DeviceError, match=says):
        parse_devices(devices)


def test_replicas_may_share_all_their_stages() -> None:
    placements = parse_devices(["cpu", "a/cpu+b/cpu", "cpu", "a/cpu+b/cpu"])
    assert [p.worker for p in placements] == ["client", "a+b", "client", "a+b"]
    assert [(r.worker, r.device) for r in placements[1].replicas] == [("a", "cpu"), ("b", "cpu")]


class Counts(nn.Module):
    """Has a buffer that every forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return x * 2.0


def compiled(model: nn.Module, devices: list[str], **options: Any) -> fxsplit.Pipeline:
    arguments: dict[str, Any] = {"cuts": ["1"], "chunks": 2, "transport": "in_process", **options}
    return fxsplit.compile(model, devices, example_inputs=torch.randn(4, 6), **arguments)


def test_state_that_replicas_would_have_apart_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Counts(), nn.Linear(6, 3))
    with pytest.raises(PlanError, match=r"changes a buffer of a replicated stage[^$]*1\.calls, of a Counts"):
        compiled(model, ["cpu", "a/cpu+b/cpu"])
    with compiled(model, ["cpu", "a/cpu+b/cpu"], cuts=["2"]):
        pass  # it is on the client now
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    with pytest.raises(PlanError, match="decaylinear counts the steps of one worker"):
        compiled(
            model,
            ["cpu", "a/cpu+b/cpu", "cpu"],
            cuts=["1", "2"],
            compressor=[None, "decaylinear(rate=0.9,steps=1)"],
        )


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Identity(), nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3))
    tokens = torch.arange(8).view(4, 2)
    options: dict[str, Any] = {"cuts": ["1"], "chunks": 2, "transport": "in_process", "verify": False}
    with (
        fxsplit.compile(model, ["cpu", "a/cpu+b/cpu"], **options) as pipe,
        pytest.raises(PipelineError, match=r"sparse gradient[^$]*sparse=False"),
    ):
        pipe.step(tokens, loss_fn=lambda output: output.sum())


def test_too_few_chunks_are_refused_before_anything_starts() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    with pytest.raises(PlanError, match="more replicas than the batch has micro-batches"):
        compiled(model, ["cpu", "a/cpu+b/cpu"], chunks=1)


# ---------------------------------------------------------------------- plans


def test_a_plan_knows_its_replicas() -> None:
    """It is simulated with them, says what the sum of the gradients takes, and survives its file."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    budget = fxsplit.Budget(bandwidth={"a/cpu": "1Mbit/s"}, latency=0.01)
    costs = fxsplit.analyze(fxsplit.trace(model, torch.randn(8, 64), cuts=["2"]), torch.randn(8, 64))
    devices = ["cpu", "a/cpu+b/cpu"]
    plan = fxsplit.plan(costs, devices, cuts=["2"], chunks=4, budget=budget)
    assert plan.workers == ("client", "a+b")
    # Two pieces of half of the gradients, at 125,000 bytes a second.
    reduce_s = plan.parts[1].parameter_bytes / 125_000 + 2 * 0.01
    assert plan.times.stages[1].reduce_s == pytest.approx(reduce_s)
    assert plan.times.stages[0].reduce_s == 0.0
    orders = schedule(plan.schedule).orders(plan.workers, 4, plan.times)
    assert simulate(orders, plan.workers, plan.times).step_s == pytest.approx(plan.predicted_step_s)
    again = fxsplit.Plan.from_json(plan.to_json())
    assert again == plan and "a/cpu+b/cpu" in str(plan)
    with pytest.raises(FxsplitError, match="other devices"):
        fxsplit.compile(model, ["cpu", "a/cpu"], plan=plan, example_inputs=torch.randn(8, 64))
    with fxsplit.compile(
        model, devices, plan=again, transport="in_process", example_inputs=torch.randn(8, 64)
    ) as pipe:
        assert pipe(torch.randn(8, 64)).shape == (8, 64)
        assert [worker.name for worker in pipe.workers] == ["client", "a", "b"]


def test_links_between_replicas_are_the_slowest() -> None:
    placements = parse_devices(["cpu", "a/cpu+b/cpu"])
    budget = fxsplit.Budget(bandwidth={"client -> a": 1e6, "a -> b": 3e5, "b -> a": 4e5}, latency=1e-3)
    links = Links.of(budget, placements)
    assert links.between("client", "a+b").bytes_per_s == 1e6
    assert links.between("a+b", "a+b").bytes_per_s == 3e5
    budget = fxsplit.Budget(bandwidth={"a/cpu+b/cpu": 2e6})
    assert Links.of(budget, placements).between("a+b", "client").bytes_per_s == 2e6


def test_the_all_reduce_of_a_ring() -> None:
    costs = fxsplit.analyze(
        fxsplit.trace(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), torch.randn(6, 9), cuts=["1"]),
        torch.randn(6, 9),
    )
    plan = fxsplit.plan(costs, ["cpu", "a/cpu+b/cpu+c/cpu"], cuts=["1"], chunks=3)
    part, link = plan.parts[1], Links().between("a", "b")
    expected = 4 * (90 * 4 / 3 / link.bytes_per_s + link.latency_s)
    assert all_reduce_s(part.parameter_bytes, part.worker, Links().between) == pytest.approx(expected)
    assert all_reduce_s(0, part.worker, Links().between) == 0.0
    assert all_reduce_s(360, "client", Links().between) == 0.0


def test_the_command_line_takes_replicas() -> None:
    arguments = ["analyze", "torchvision:mobilenet_v2", "-i", "4,3,32,32", "--devices", "cpu,a/cpu+b/cpu"]
    done = CliRunner().invoke(app, [*arguments, "--cuts", "features.7", "--chunks", "4"])
    assert done.exit_code == 0, done.output
    assert "a/cpu+b/cpu" in done.output
    done = CliRunner().invoke(app, [*arguments, "--cuts", "features.7", "--chunks", "1"])
    assert done.exit_code == 1 and "more replicas than the batch has micro-batches" in done.output
