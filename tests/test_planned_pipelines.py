"""Pipelines of plans that choose more than cuts: codecs, micro-batches, and which devices take part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.errors import PlanError
from fxsplit.opening import trace_for_planning
from fxsplit.planning import NodeSeconds, Profile
from fxsplit.trace import Arguments


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def batch() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def profile_of(net: nn.Module, x: Tensor, seconds: dict[str, float]) -> Profile:
    """Every node takes so long on a device."""
    costs = fxsplit.analyze(trace_for_planning(net, Arguments.of(x)), x)
    return Profile({d: {n.name: NodeSeconds(s, s) for n in costs.nodes} for d, s in seconds.items()})


@pytest.mark.parametrize(
    ("seconds", "devices", "cuts"),
    [
        ({"cpu": 1e-6, "a/cpu": 1.0}, ("cpu",), ()),
        ({"cpu": 1.0, "a/cpu": 1e-6}, ("cpu", "a/cpu"), ("0",)),
    ],
    ids=["all on the client", "raw input"],
)
def test_devices_that_are_left_out(
    seconds: dict[str, float], devices: tuple[str, ...], cuts: tuple[str, ...], tmp_path: Path
) -> None:
    net, x = model(), batch()
    options: dict[str, Any] = {"example_inputs": x, "transport": "in_process"}
    profile = profile_of(net, x, seconds)
    with fxsplit.compile(net, ["cpu", "a/cpu"], placement="auto", profile=profile, **options) as pipe:
        assert pipe.plan.devices == devices and pipe.plan.cut_names == cuts and pipe.plan.is_optimal
        assert torch.equal(pipe(x), net(x))
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        result = pipe.step(x, target=None, loss_fn=lambda y: y.square().sum(), reduction="sum")
        assert torch.equal(result.output, net(x))
        optimizer.step()
        trained = pipe.state_dict()
        pipe.plan.save(tmp_path / "plan.json")
    own = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    own.step()
    assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())
    again = str(tmp_path / "plan.json")
    with fxsplit.compile(net, list(devices), plan=again, **options) as pipe:
        assert torch.equal(pipe(x), net(x))


def test_integers_as_raw_input() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8)), torch.arange(40).reshape(8, 5)
    profile = profile_of(net, x, {"cpu": 1.0, "a/cpu": 1e-6})
    options: dict[str, Any] = {"example_inputs": x, "transport": "in_process", "placement": "auto"}
    with fxsplit.compile(net, ["cpu", "a/cpu"], profile=profile, **options) as pipe:
        assert pipe.plan.parts[0].macs == 0 and pipe.plan.cut_names == ("0",)
        assert torch.equal(pipe(x), net(x))


def test_codecs_and_chunks_that_are_chosen() -> None:
    net, x = model(), batch()
    slow = fxsplit.Budget(bandwidth="20kB/s", latency=0)
    guard = fxsplit.Guard(("uniform8",), ("uniform8",))
    options: dict[str, Any] = {"example_inputs": x, "transport": "in_process", "chunks": "auto"}
    with fxsplit.compile(net, ["cpu", "a/cpu"], compressor="auto", guard=guard, budget=slow, **options) as pipe:
        assert pipe.plan.compressor == "uniform8" == pipe.plan.gradient_compressor and pipe.plan.chunks > 1
        rows = x.chunk(pipe.plan.chunks)
        assert torch.equal(pipe(x), torch.cat([pipe.rewritten(row) for row in rows]))


def test_what_has_to_be_known_to_choose() -> None:
    for option in ({"chunks": "auto"}, {"placement": "auto"}):
        with pytest.raises(PlanError, match="looks at the batch"):
            fxsplit.compile(model(), ["cpu", "a/cpu"], transport="in_process", **option)  # type: ignore[arg-type]
