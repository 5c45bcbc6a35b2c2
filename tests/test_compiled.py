"""Stages compiled by torch.compile: the numbers of the stages as they are, but for the last bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import DeviceError, PlanError
from tests.processes import worker_processes

TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
"""Of values of the order of 1 in float32 after three updates; the last bits may differ."""


class Small(nn.Module):
    """Dropout, running statistics, something in place, and work that depends on a size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.second, self.drop, self.last = nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.first(x)))
        x = self.drop(self.second(x)).mul_(1.0 + 1.0 / x.shape[1])
        return self.last(torch.tanh(x))  # type: ignore[no-any-return]


def run(transport: str, compiles: bool, **options: Any) -> dict[str, Any]:
    """What comes of three steps, a call and its backward, and an evaluation."""
    torch.manual_seed(2)
    model, x, y = Small(), torch.randn(8, 6), torch.randn(8, 2)
    settings: dict[str, Any] = {"cuts": ["second"], "chunks": 2, "transport": transport, **options}
    devices = settings.pop("devices", ["cpu", "a/cpu"])
    with fxsplit.compile(model, devices, compile_stages=compiles, **settings) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1, momentum=0.5)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(pipe.step(x, target=y, loss_fn=F.mse_loss).loss)
            optimizer.step()
        x.requires_grad_()
        pipe(x).sum().backward()
        found = {"gradients": pipe.gradients(), "state": pipe.state_dict(), "losses": losses, "input": x.grad}
        pipe.eval()
        with torch.no_grad():
            found["evaluated"] = pipe(x)
        return found


@pytest.mark.parametrize(
    ("transport", "options"),
    [
        ("rpc", {}),
        ("in_process", {"schedule": "zero-bubble", "compressor": "uniform8"}),
        ("in_process", {"checkpoint": "always", "deferred_batch_norm": True}),
        ("in_process", {"devices": ["cpu", "a/cpu+b/cpu"]}),
    ],
)
def test_the_numbers_are_those_of_the_stages_as_they_are(transport: str, options: dict[str, Any]) -> None:
    """Training with dropout and running statistics, a caller's backward, and evaluation."""
    found, expected = run(transport, True, **options), run(transport, False, **options)
    assert found.keys() == expected.keys()
    if "compressor" in options:  # a last bit may fall on the other side of a rounding to 8 bits
        found, expected = ({"losses": torch.stack(one["losses"])} for one in (found, expected))
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.0)
        return
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert worker_processes() == []


def test_stages_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a stage, kind of micro-batch and direction, and not again at later steps."""
    from torch._dynamo.utils import counters

    counters.clear()
    torch._dynamo.reset()
    model, x = Small().eval(), torch.randn(8, 6)
    options: dict[str, Any] = {"cuts": ["second"], "chunks": 2, "transport": "in_process"}
    with fxsplit.compile(model, ["cpu", "a/cpu"], compile_stages=True, **options) as pipe, torch.no_grad():
        expected = model(x)
        for _ in range(3):
            torch.testing.assert_close(pipe(x), expected, **TOLERANCE)
        assert counters["stats"]["unique_graphs"] >= 2, "each stage"
        graphs = counters["stats"]["unique_graphs"]
        pipe(x)
        assert counters["stats"]["unique_graphs"] == graphs
        torch.testing.assert_close(pipe(x[:6]), expected[:6], **TOLERANCE)
        assert counters["stats"]["unique_graphs"] > graphs, "another shape"


def test_an_error_in_a_compiled_stage_arrives_with_its_place() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 5:
                raise ValueError("five is right out")
            return x * 2

    model = nn.Sequential(nn.Linear(3, 3), Breaks())
    options: dict[str, Any] = {"cuts": ["1"], "example_inputs": torch.ones(4, 3), "transport": "in_process"}
    with fxsplit.compile(model, ["cpu", "a/cpu"], compile_stages=True, **options) as pipe:
        with pytest.raises(fxsplit.FxsplitError, match="five is right out") as caught:
            pipe(torch.ones(5, 3))
        assert "stage 1" in str(caught.value) and "worker a" in str(caught.value)
        torch.testing.assert_close(pipe(torch.ones(4, 3)), model(torch.ones(4, 3)), **TOLERANCE)


def test_what_cannot_be_is_refused_before_any_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    devices: Any = ["cpu", "a/cpu"]
    with pytest.raises(PlanError, match="one of them"):
        fxsplit.compile(Small(), devices, compile_stages=True, cuda_graphs=True)
    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    with pytest.raises(DeviceError, match=r"C\+\+ compiler") as caught:
        fxsplit.compile(Small(), devices, compile_stages=True)
    for word in ("this host", "/nowhere/g++", "CXX", "leave compile_stages out"):
        assert word in str(caught.value)
    assert worker_processes() == []
