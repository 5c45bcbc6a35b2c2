"""Workers of one process whose work one thread queues: as on GPUs, here on the CPU."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import FxsplitError, WorkerError
from fxsplit.runtime import engine
from fxsplit.runtime.together import can_be_together
from tests.models import images, mobilenet
from tests.test_replicated_pipelines import choosing

CUTS = ["features.4", "features.9", "features.14"]
DEVICES = ["cpu", "other/cpu", "cpu", "other/cpu"]


@pytest.fixture(params=[True, False], ids=["one thread", "threads"])
def is_together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether one thread does the work of all workers."""
    monkeypatch.setattr(engine, "can_be_together", lambda devices: request.param)
    return bool(request.param)


def trained(
    schedule: str, compressor: str | None, chunks: int, devices: list[str] = DEVICES, **others: Any
) -> dict[str, Any]:
    """Losses and state after some steps, a call with a backward of its own among them."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"cuts": CUTS, "chunks": chunks, "transport": "in_process", "schedule": schedule}
    with fxsplit.compile(mobilenet().train(), devices, compressor=compressor, **{**options, **others}) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-4, momentum=0.9)
        losses = []
        x, y = images(8, 64), torch.arange(8) % 10
        for turn in range(3):
            optimizer.zero_grad()
            if turn == 1:
                output: Tensor = pipe(x)
                loss = F.cross_entropy(output, y)
                loss.backward()
            else:
                loss = pipe.step(x, target=y, loss_fn=F.cross_entropy).loss
            optimizer.step()
            losses.append(loss.detach())
        threads = {thread.name for thread in threading.enumerate()}
        assert {f"fxsplit {worker.name}" for worker in pipe.workers if worker.name != "client"} <= threads
        return {"losses": torch.stack(losses), **pipe.state_dict()}


@pytest.mark.parametrize("run", ["gpipe 4", "zero-bubble 4", "interleaved 4", "gpipe 1"])
@pytest.mark.parametrize("compressor", [None, "sortquant8"])
def test_the_numbers_are_those_of_threads(
    run: str, compressor: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, chunks = run.split()[0], int(run.split()[1])
    expected = trained(schedule, compressor, chunks)
    monkeypatch.setattr(engine, "can_be_together", lambda devices: True)
    found = trained(schedule, compressor, chunks)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("cuts", [["features.0"], ["features.4", "features.9"]], ids=["one", "two"])
def test_replicas_are_together(cuts: list[str], deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they give each other and sum is waited for in turns: one thread is all of them."""
    devices = ["cpu", "a/cpu+b/cpu", "c/cpu+d/cpu"][: len(cuts) + 1]
    options: dict[str, Any] = {"cuts": cuts, "verify": False, "deferred_batch_norm": deferred}
    expected = trained("gpipe", None, 4, devices, **options)
    monkeypatch.setattr(engine, "can_be_together", lambda devices: True)
    found = trained("gpipe", None, 4, devices, **options)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_replica_that_fails_and_gradients_that_one_has_alone(is_together: bool) -> None:
    """Nobody waits for a sum that does not come, nor for a gradient that another does not have."""
    x = torch.ones(4, 4)
    x[2:] = -1.0
    bad = x.clone()
    bad[3] = 1000.0
    y = torch.arange(4) % 3
    with choosing("in_process") as pipe:
        pipe.step(x, target=y, loss_fn=F.cross_entropy)
        before = pipe.gradients()
        assert {"2.low.weight", "2.high.weight"} <= before.keys() and "2.never.weight" not in before
        for _ in range(2):
            with pytest.raises(WorkerError, match="too large"):
                pipe.step(bad, target=y, loss_fn=F.cross_entropy)
            for name, gradient in pipe.gradients().items():
                assert torch.equal(gradient, before[name]), name
        pipe.step(x, target=y, loss_fn=F.cross_entropy)
        for name, gradient in pipe.gradients().items():
            torch.testing.assert_close(gradient, 2 * before[name])
        pipe._engine.check_replicas()


@pytest.mark.parametrize(
    ("devices", "together"),
    [
        (["cuda:0", "cuda:1"], True),
        (["cuda", "server/cuda:1", "cuda"], True),
        (["cuda:0", "cuda-box/cpu"], False),
        (["cuda:0", "a/cuda:0+b/cuda:1"], True),
        (["cpu", "a/cuda:0+b/cuda:1"], False),
        (["cpu", "server/cuda:0"], False),
    ],
)
def test_only_gpus_are_together(devices: list[str], together: bool) -> None:
    assert can_be_together(devices) == together


class Refusing(torch.autograd.Function):
    """Refuses large numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if float(x.abs().max()) > 1e6:
            raise RuntimeError("too large")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Chain(nn.Module):
    """Its middle refuses large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.middle(Refusing.apply(self.first(x))))
        return result


@pytest.mark.parametrize("devices", [["cpu", "other/cpu", "cpu"], ["cpu", "one/cpu", "two/cpu"]])
def test_after_an_error_all_goes_on(is_together: bool, devices: list[str]) -> None:
    """The others give up, and the next step gives the numbers of a model that never failed."""
    torch.manual_seed(0)
    model = Chain()
    expected = copy.deepcopy(model)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"cuts": ["middle", "last"], "chunks": 4, "transport": "in_process"}
    with fxsplit.compile(model, devices, example_inputs=x, verify=False, **options) as pipe:
        for _ in range(2):
            with pytest.raises(WorkerError, match="too large"):
                pipe.step(x * 1e9, target=x, loss_fn=F.mse_loss)
            found = pipe.step(x, target=x, loss_fn=F.mse_loss).loss
            assert found.item() == pytest.approx(F.mse_loss(expected(x), x).item(), rel=1e-5)
        with pytest.raises(FxsplitError):
            pipe.step(x, target=x[:3], loss_fn=F.mse_loss)
        assert pipe(x).shape == (8, 4)
