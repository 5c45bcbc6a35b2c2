"""Whole steps: whatever the schedule, the numbers are those of a loop over the micro-batches in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import FxsplitError, InputError, PipelineError, PlanError
from fxsplit.runtime.packet import GradientTap
from fxsplit.schedules import SCHEDULES
from fxsplit.split_backward import SplitBackward
from tests.comparison import (
    CHAIN2,
    CHAIN3,
    MOBILENET,
    SANDWICH,
    TRANSPORTS,
    assert_same_gradients,
    assert_same_state,
)
from tests.models import images, inputs_of, mobilenet, transformer

ALL = [kind.name for kind in SCHEDULES]
LABELS = torch.arange(10) % 10


def loop(
    model: nn.Module, batches: Any, targets: Any, loss_fn: Callable[..., Tensor], call: Any
) -> tuple[Tensor, Any]:
    """The micro-batches one after the other, as people accumulate gradients."""
    total, outputs = torch.zeros(()), []
    samples = sum(len(target) for target in targets)
    for batch, target in zip(batches, targets, strict=True):
        output = call(model, batch)
        loss = loss_fn(output, target) * (len(target) / samples)
        loss.backward()
        total = total + loss.detach()
        outputs.append(output)
    return total, outputs


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("devices", [SANDWICH, CHAIN2, CHAIN3], ids=["sandwich", "chain2", "chain3"])
def test_every_schedule_is_bit_identical(name: str, devices: list[str]) -> None:
    """Loss, outputs, gradients, statistics; ten samples do not divide by four; the second step accumulates."""
    if name == "1f1b" and devices is SANDWICH:
        return
    model, x = mobilenet(), images(10)
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"cuts": MOBILENET[len(devices)], "chunks": 4, "transport": "in_process"}
    with fxsplit.compile(model, devices, schedule=name, verify=False, **options) as pipe:
        for _ in range(2):
            result = pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
            loss, outputs = loop(
                reference, x.tensor_split(4), LABELS.tensor_split(4), F.cross_entropy, lambda m, c: m(c)
            )
            assert torch.equal(result.loss, loss)
            assert torch.equal(result.output, torch.cat(outputs))
            assert not result.output.requires_grad and not result.loss.requires_grad
            assert_same_gradients(pipe, reference)
        assert_same_state(pipe, reference)


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble", "auto"])
def test_over_processes(name: str) -> None:
    """Three workers, compressed both ways, with a loss of the script's own, trained as the calls of a GPipe."""

    def my_loss(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output.logits, target, label_smoothing=0.1)

    model, batch, labels = transformer("roberta"), inputs_of("roberta", 8), torch.arange(8) % 2
    options: dict[str, Any] = {"cuts": ["roberta.encoder.layer.1", "roberta.encoder.layer.3"], "chunks": 4}
    options |= {"compressor": "uniform8", "verify": False}
    with fxsplit.compile(copy.deepcopy(model), CHAIN3, transport="in_process", **options) as plain:
        plain_loss = my_loss(plain(**batch), labels)
        plain_loss.backward()
        expected = plain.gradients()
    with fxsplit.compile(model, CHAIN3, schedule=name, **options) as pipe:
        result = pipe.step(**batch, target=labels, loss_fn=my_loss)
        assert torch.allclose(result.loss, plain_loss)
        found = pipe.gradients()
        assert found.keys() == expected.keys()
        # The gradients of a quarter batch go through the codec as such, so they are rounded otherwise.
        for key, value in expected.items():
            assert torch.linalg.vector_norm(found[key] - value) <= 0.05 * torch.linalg.vector_norm(value) + 1e-6, (
                key
            )


@pytest.mark.parametrize("name", ALL)
def test_tied_weights_masks_and_dropout(name: str) -> None:
    """GPT-2: embedding and head are one; the numbers dropout draws do not depend on the schedule."""
    results = []
    for schedule in ("gpipe", name):
        model = transformer("gpt2", dropout=0.1)
        options: dict[str, Any] = {"cuts": ["transformer.h.1", "transformer.h.3"], "chunks": 4}
        torch.manual_seed(1)
        with fxsplit.compile(model, CHAIN3, schedule=schedule, transport="in_process", **options) as pipe:
            batch = inputs_of("gpt2", 8)
            torch.manual_seed(2)
            result = pipe.step(**batch, target=batch["input_ids"], loss_fn=next_token)
            results.append((result.loss, pipe.gradients(), torch.rand(1)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][2], results[1][2])
    for key, value in results[0][1].items():
        assert torch.equal(value, results[1][1][key]), key


def next_token(output: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Branches(nn.Module):
    """An early output, a skip over a stage, an output that is an input, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        first = self.a(x).relu_()
        return {"early": first, "late": self.c(self.b(first) + first), "input": y, "number": 3}


@pytest.mark.parametrize("name", ["gpipe", "zero-bubble", "auto", "1f1b"])
@pytest.mark.parametrize("targets", [True, False])
def test_outputs_of_several_stages_and_a_loss_in_place(name: str, targets: bool) -> None:
    model, x, y, target = Branches(), torch.randn(6, 8), torch.randn(6, 8), (torch.randn(6, 8), {"scale": 2.0})
    reference = copy.deepcopy(model)

    def loss_fn(output: Any, target: Any = None) -> Tensor:
        wanted, scale = (0.0, 2.0) if target is None else (target[0], target[1]["scale"])
        output["late"].mul_(scale)
        loss: Tensor = (output["late"] - wanted).square().mean()
        loss += (output["early"] - output["input"]).square().mean()
        return loss

    with fxsplit.compile(model, CHAIN3, cuts=["b", "c"], chunks=3, schedule=name, transport="in_process") as pipe:
        result = pipe.step(x, y, target=target if targets else None, loss_fn=loss_fn)
        for m in range(3):
            part = slice(2 * m, 2 * m + 2)
            cut = (target[0][part], target[1])
            output = reference(x[part], y[part])
            (loss_fn(output, cut) if targets else loss_fn(output)).div(3).backward()
        assert result.output["number"] == 3 and torch.equal(result.output["input"], y)
        gradients = pipe.gradients()
        for key, parameter in reference.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(gradients[key], parameter.grad, rtol=1e-5, atol=1e-7), key


def test_a_sum_is_not_averaged_and_outputs_may_stay_away() -> None:
    model, x = mobilenet().eval(), images(6)
    reference = copy.deepcopy(model)
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    with fxsplit.compile(
        model, CHAIN2, cuts=MOBILENET[2], chunks=2, schedule="auto", transport="in_process"
    ) as pipe:
        pipe.eval()
        result = pipe.step(x, target=LABELS[:6], loss_fn=loss_fn, return_output=False)
        expected = loss_fn(reference(x), LABELS[:6])
        expected.backward()
        assert result.output is None and torch.allclose(result.loss, expected.detach())
        gradients = pipe.gradients()
        for key, parameter in reference.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(gradients[key], parameter.grad, rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_failed_step_leaves_nothing_behind(transport: str) -> None:
    """The loss of the third micro-batch fails, after the first ones have gone back through all stages."""
    model, x = mobilenet(), images(8)
    options: dict[str, Any] = {"cuts": MOBILENET[2], "chunks": 4, "schedule": "auto", "transport": transport}
    with fxsplit.compile(model, CHAIN2, **options) as pipe:
        pipe.step(x, target=LABELS[:8], loss_fn=F.cross_entropy)
        gradients, state = pipe.gradients(), pipe.state_dict()

        def bad(output: Tensor, target: Tensor) -> Tensor:
            if int(target[0]) == 4:
                raise ValueError("the user's own")
            return F.cross_entropy(output, target)

        with pytest.raises(FxsplitError, match=r"the user's own[^$]*micro-batch 2"):
            pipe.step(x, target=LABELS[:8], loss_fn=bad)
        for key, value in pipe.gradients().items():
            assert torch.equal(value, gradients[key]), key
        for key, value in pipe.state_dict().items():
            assert torch.equal(value, state[key]), key
        again = pipe.step(x, target=LABELS[:8], loss_fn=F.cross_entropy)
        assert torch.isfinite(again.loss)


BAD: dict[str, tuple[dict[str, Any], type[FxsplitError], str]] = {
    "not a scalar": ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, InputError, "reduction"),
    "a vector": (
        {"loss_fn": lambda o, t: o.sum(1) - t, "reduction": "mean"},
        InputError,
        r"not a scalar[^$]*\[2\]",
    ),
    "a number": ({"loss_fn": lambda o, t: 1.0}, InputError, "not a scalar[^$]*float"),
    "no gradient": ({"loss_fn": lambda o, t: t.float().mean()}, InputError, "does not depend"),
    "short target": ({"target": LABELS[:3]}, InputError, "another length[^$]*3[^$]*4"),
    "no function": ({"loss_fn": "cross_entropy"}, InputError, "no function"),
    "too small a batch": ({"batch": 1, "target": LABELS[:1]}, InputError, "fewer samples than chunks"),
    "reduction": ({"reduction": "max"}, InputError, "max"),
    "a loss that learns": ({"loss_fn": nn.Bilinear(1, 1, 1)}, InputError, "has parameters"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_steps(case: str) -> None:
    changed, error, message = BAD[case]
    options = {"target": LABELS[:4], "loss_fn": F.cross_entropy, **changed}
    x = images(options.pop("batch", 4))
    with fxsplit.compile(
        mobilenet(), CHAIN2, cuts=MOBILENET[2], chunks=2, schedule="auto", transport="in_process", verify=False
    ) as pipe:
        with pytest.raises(error, match=message):
            pipe.step(x, **options)
        with torch.no_grad(), pytest.raises(PipelineError, match="no_grad"):
            pipe.step(images(4), target=LABELS[:4], loss_fn=F.cross_entropy)
        with pytest.raises(InputError, match="needs a gradient"):
            pipe.step(images(4).requires_grad_(), target=LABELS[:4], loss_fn=F.cross_entropy)
        assert torch.isfinite(pipe.step(images(4), target=LABELS[:4], loss_fn=F.cross_entropy).loss)


def test_schedules_that_do_not_fit_are_refused_before_anything_starts() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"schedule": "1f1b", "chunks": 1}, "too few micro-batches"),
        ({"schedule": "zero-bubble", "chunks": 2}, "too few micro-batches[^$]*at least 3"),
    ]
    for options, message in cases:
        with pytest.raises(PlanError, match=message):
            fxsplit.compile(mobilenet(), CHAIN3, cuts=MOBILENET[3], **options)
    with pytest.raises(PlanError, match="interleaved"):
        fxsplit.compile(mobilenet(), SANDWICH, cuts=MOBILENET[3], schedule="1f1b", chunks=4)


def test_a_batch_that_takes_another_way_is_recorded_in_a_step() -> None:
    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            result: Tensor = self.b(h) if bool(x[0, 0] > 0) else self.b(-h)
            return result

    model = Ways()
    reference = copy.deepcopy(model)
    x, y = torch.rand(4, 4), torch.randn(4, 4)
    with fxsplit.compile(
        model, CHAIN2, cuts=["b"], schedule="auto", chunks=2, example_inputs=x, transport="in_process"
    ) as pipe:
        pipe.step(x, target=y, loss_fn=F.mse_loss)
        with pytest.warns(UserWarning, match="traced again"):
            pipe.step(-x, target=y, loss_fn=F.mse_loss)
        for batch in (x, -x):
            loop(reference, batch.tensor_split(2), y.tensor_split(2), F.mse_loss, lambda m, c: m(c))
        assert_same_gradients(pipe, reference)


@pytest.mark.parametrize("build", ["chain", "tied", "beside"])
def test_a_split_backward_is_the_whole_one(build: str) -> None:
    """Input gradients first and nothing else; then the parameters', bit for bit."""
    linear, norm, head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
    parameters = [*linear.parameters(), *norm.parameters(), *head.parameters()]

    def run(x: Tensor) -> list[Tensor]:
        h = norm(linear(x).relu())
        if build == "tied":
            return [linear(h)]
        return [head(h), (linear.weight * 2.0).sum()] if build == "beside" else [head(h)]

    found = []
    for split in (False, True):
        for parameter in parameters:
            parameter.grad = None
        tap = GradientTap(torch.linspace(-1, 1, 30).view(5, 6))
        outputs = run(tap.tensor)
        gradients = [torch.ones_like(o) * 0.5 for o in outputs]
        if split:
            parts = SplitBackward(outputs, gradients, [tap.anchor])
            if build == "chain":
                assert tap.gradient is not None and all(p.grad is None for p in parameters)
            parts.finish()
        else:
            torch.autograd.backward(outputs, gradients)
        found.append([tap.gradient, *(p.grad for p in parameters)])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or (
            one is not None and other is not None and torch.equal(one, other)
        )


def test_sparse_gradients_are_added_up_over_steps() -> None:
    """What a step may have to take back is copied before it, in whatever layout it is."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(20, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.last(self.table(x).mean(1))
            return result

    torch.manual_seed(0)
    model, x, y = Lookup(), torch.randint(0, 20, (8, 5)), torch.arange(8) % 3
    expected = copy.deepcopy(model)
    options: dict[str, Any] = {"cuts": ["last"], "chunks": 1, "transport": "in_process", "example_inputs": x}
    with fxsplit.compile(model, ["cpu", "a/cpu"], **options) as pipe:
        for _ in range(2):
            pipe.step(x, target=y, loss_fn=F.cross_entropy)
            F.cross_entropy(expected(x), y).backward()
        found, wanted = pipe.gradients()["table.weight"], expected.table.weight.grad
    assert found.is_sparse and wanted is not None
    assert torch.equal(found.to_dense(), wanted.to_dense())


def test_a_client_that_computes_nothing_gives_the_models_numbers() -> None:
    """The cut is before the first module: inputs go on as they are, and their gradients come back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    reference, x, y = copy.deepcopy(model), torch.randn(4, 6, requires_grad=True), torch.arange(4) % 3
    options: dict[str, Any] = {"cuts": ["0"], "chunks": 2, "transport": "in_process", "example_inputs": x}
    with fxsplit.compile(model, ["cpu", "a/cpu"], **options) as pipe:
        assert torch.equal(pipe(x), reference(x))
        pipe(x).square().sum().backward()
        found, x.grad = x.grad, None
        sum(reference(part).square().sum() for part in x.tensor_split(2)).backward()
        assert found is not None and x.grad is not None
        torch.testing.assert_close(found, x.grad)
        result = pipe.step(x.detach(), target=y, loss_fn=F.cross_entropy)
        torch.testing.assert_close(result.loss, F.cross_entropy(reference(x), y).detach())
