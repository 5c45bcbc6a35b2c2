"""How the tests hold a pipeline against the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit

TRANSPORTS = ["in_process", "rpc"]
SANDWICH = ["cpu", "server/cpu", "cpu"]
CHAIN2 = ["cpu", "server/cpu"]
CHAIN3 = ["cpu", "middle/cpu", "end/cpu"]
MOBILENET = {2: ["features.5"], 3: ["features.0.2", "classifier"]}
ROBERTA = {
    2: ["roberta.encoder.layer.1"],
    3: ["roberta.encoder.layer.0.attention.output", "classifier"],
}


def loss_of(output: Any, labels: Tensor) -> Tensor:
    """The loss that all comparisons use."""
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits, labels)


def reference_step(
    model: nn.Module, chunks: Sequence[Any], call: Callable[[nn.Module, Any], Tensor], labels: Tensor
) -> Tensor:
    """The model run on the micro-batches, gradients accumulated in their order; returns the joined logits."""
    outputs = [call(model, chunk) for chunk in chunks]
    joined = torch.cat([output.detach() for output in outputs]).requires_grad_()
    F.cross_entropy(joined, labels).backward()
    assert joined.grad is not None
    for output, gradient in zip(outputs, joined.grad.split([len(o) for o in outputs]), strict=True):
        output.backward(gradient)
    return joined.detach()


def assert_same_gradients(pipe: fxsplit.Pipeline, model: nn.Module) -> None:
    """Every gradient, bit for bit."""
    found = pipe.gradients()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def assert_same_state(pipe: fxsplit.Pipeline, model: nn.Module) -> None:
    """Every entry of the state_dict, bit for bit, under the same keys in the same order."""
    found, expected = pipe.state_dict(), model.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
