"""A value is sent as it was when it left its stage, whatever is done to its memory afterwards.

The tensors are large: sending them takes longer than what would change them, were they not copied.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsplit

WIDTH = 1 << 19


class Counting(nn.Module):
    """What crosses the cut is a buffer, which every micro-batch changes in place."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(WIDTH))
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        table = self.table.add_(1.0)
        y: Tensor = self.second(x)
        return y + table[:4] + table[-4:]


@pytest.mark.parametrize("transport", ["in_process", "rpc"])
def test_a_buffer_that_the_next_micro_batch_changes(transport: str) -> None:
    model, x = Counting().eval(), torch.zeros(8, 4)
    expected = torch.cat([model(row) for row in x.split(1)])
    options: dict[str, Any] = {"cuts": ["second"], "chunks": 8, "example_inputs": x, "transport": transport}
    with fxsplit.compile(Counting(), ["cpu", "one/cpu"], **options) as pipe, torch.no_grad():
        pipe.eval()
        found = pipe(x)
        first = found[0, 0] - expected[0, 0]  # compiling has run it, too
        assert torch.equal(found - first, expected)


class Adding(nn.Module):
    """The gradient of a parameter has the memory of the one that is sent back: autograd makes no copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.first, self.second = nn.Identity(), nn.Identity()
        self.position = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.first(x * self.scale)
        y: Tensor = (self.second(scaled) + self.position.unsqueeze(0)) * x[:, :1]
        return y


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
@pytest.mark.parametrize("devices", [["cpu", "one/cpu"], ["cpu", "cpu"]], ids=["sent", "on one worker"])
def test_a_gradient_whose_memory_is_a_parameters_gradient(devices: list[str], schedule: str) -> None:
    model, x = Adding(), torch.rand(4, WIDTH)
    for row in x.split(1):
        (model(row).square().mean() / 4).backward()
    options: dict[str, Any] = {"cuts": ["second"], "chunks": 4, "schedule": schedule, "verify": False}
    with fxsplit.compile(Adding(), devices, example_inputs=x, **options) as pipe:
        pipe.step(x, loss_fn=lambda output: output.square().mean())
        found = pipe.gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(found[name], parameter.grad), name


class Staying(nn.Module):
    """A value goes to the next stage here, which changes it in place, and to another worker."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        value = self.first(x * 2.0)
        small = self.second(value.sum()) * 0.0 + value.view(-1).zero_().sum()
        y: Tensor = self.third(small) + value
        return y


def test_a_value_that_stays_and_is_sent() -> None:
    """The split is refused when it is verified, since all share the value in the unsplit model."""
    x = torch.rand(2, WIDTH)
    options: dict[str, Any] = {"cuts": ["second", "third"], "chunks": 2, "example_inputs": x, "verify": False}
    with fxsplit.compile(Staying(), ["cpu", "cpu", "one/cpu"], **options) as pipe, torch.no_grad():
        for _ in range(3):
            assert torch.equal(pipe(x), x * 2.0)


@pytest.mark.parametrize("devices", [["cpu", "one/cpu"], ["cpu", "cpu"]], ids=["on a worker", "here"])
@pytest.mark.parametrize("width", [4, WIDTH])
def test_an_output_that_the_loss_changes_in_place(devices: list[str], width: int) -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, width))
    x, target = torch.rand(2, 4), torch.rand(2, width)
    expected = torch.cat([model(row) for row in x.split(1)])

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return output.sub_(target).square_().mean()

    with fxsplit.compile(model, devices, cuts=["1"], chunks=2, example_inputs=x, verify=False) as pipe:
        result = pipe.step(x, target=target, loss_fn=loss_fn)
    assert torch.equal(result.output, expected)
    assert torch.allclose(result.loss, (expected - target).square().mean())
