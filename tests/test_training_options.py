"""Training as people do it: accumulation, freezing, checkpointing, loss scaling, several optimizers, callbacks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import PlanError
from fxsplit.runtime.steps import StepReport
from tests.comparison import CHAIN2, CHAIN3, MOBILENET, assert_same_gradients, assert_same_state
from tests.models import images, inputs_of, mobilenet, transformer

LABELS = torch.arange(8)
HALVES: dict[str, Any] = {"cuts": MOBILENET[2], "chunks": 2, "transport": "in_process", "verify": False}


def reference(model: nn.Module, x: Tensor, chunks: int) -> None:
    for part, labels in zip(x.tensor_split(chunks), LABELS[: len(x)].tensor_split(chunks), strict=True):
        (F.cross_entropy(model(part), labels) * (len(part) / len(x))).backward()


@pytest.mark.parametrize("policy", ["always", "except_last", ["never", "always", "except_last"]], ids=str)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero-bubble"])
def test_checkpointing_changes_no_number(policy: Any, schedule: str) -> None:
    """Gradients and running statistics; both ways of running."""
    model, x = mobilenet(), images(8)
    whole = copy.deepcopy(model)
    options: dict[str, Any] = {"cuts": MOBILENET[3], "chunks": 4, "transport": "in_process", "verify": False}
    with fxsplit.compile(model, CHAIN3, schedule=schedule, checkpoint=policy, **options) as pipe:
        pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
        reference(whole, x, 4)
        assert_same_gradients(pipe, whole)
        assert_same_state(pipe, whole)
        pipe.zero_grad()
        whole.zero_grad()
        output = pipe(x)
        F.cross_entropy(output, LABELS).backward()
        joined = torch.cat([whole(part) for part in x.tensor_split(4)])
        F.cross_entropy(joined, LABELS).backward()
        assert torch.equal(output, joined)
        assert_same_state(pipe, whole)


def test_checkpointing_draws_the_same_random_numbers() -> None:
    found = []
    for policy in ("never", "always"):
        model, batch = transformer("gpt2", dropout=0.2), inputs_of("gpt2", 8)
        options: dict[str, Any] = {"cuts": ["transformer.h.1", "transformer.h.3"], "chunks": 2}
        with fxsplit.compile(model, CHAIN3, checkpoint=policy, transport="in_process", **options) as pipe:
            torch.manual_seed(3)
            pipe.step(**batch, loss_fn=mean_square)
            found.append(pipe.gradients())
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def mean_square(output: Any) -> Tensor:
    result: Tensor = output.logits.square().mean()
    return result


def test_checkpointing_keeps_less() -> None:
    """What autograd keeps between forward and backward, counted by its own hooks on the client's stage."""
    kept = {}
    for policy in ("never", "always"):
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        options: dict[str, Any] = {"cuts": ["features.14"], "transport": "in_process", "checkpoint": policy}
        counting = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        options |= {"example_inputs": images(2), "verify": False}
        with fxsplit.compile(mobilenet(), CHAIN2, **options) as pipe, counting:
            pipe(images(8))
        kept[policy] = total
    assert kept["always"] < 0.3 * kept["never"], kept


@pytest.mark.parametrize("policy", ["sometimes", ["never"], ["never", "always", "never"]], ids=str)
def test_policies_that_do_not_exist(policy: Any) -> None:
    with pytest.raises(PlanError, match="checkpoint policy"):
        fxsplit.compile(mobilenet(), CHAIN2, cuts=MOBILENET[2], checkpoint=policy)


@pytest.mark.parametrize("schedule", ["gpipe", "auto"])
def test_freezing(schedule: str) -> None:
    """The first stage frozen, then all but the classifier, then nothing; as the same handles in one process."""
    model, x = mobilenet(), images(8)
    whole = copy.deepcopy(model)
    with fxsplit.compile(model, CHAIN2, schedule=schedule, example_inputs=x, **HALVES) as pipe:
        for frozen in (["features.0.", "features.1."], ["features."], []):
            for module in (pipe, whole):
                module.zero_grad()
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_(not any(name.startswith(f) for f in frozen))
            pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
            reference(whole, x, 2)
            assert_same_gradients(pipe, whole)
        pipe.requires_grad_(False)
        with torch.no_grad():
            pipe(x)
        pipe.requires_grad_()


def test_accumulation_clipping_schedulers_and_two_optimizers() -> None:
    """Three steps of two batches each, the classifier with an optimizer of its own."""
    model, chunks = mobilenet().eval(), 2  # batch norm of so few samples would amplify the last bits
    whole = copy.deepcopy(model)
    with fxsplit.compile(model, CHAIN2, schedule="1f1b", example_inputs=images(8), **HALVES) as pipe:
        optimizers, schedulers = [], []
        for module, make in ((pipe, pipe.optimizer), (whole, None)):
            named = list(module.named_parameters())
            groups = [[p for n, p in named if ("classifier" in n) == is_head] for is_head in (False, True)]
            for kind, group in zip((torch.optim.SGD, torch.optim.AdamW), groups, strict=True):
                options = {"lr": 0.01, "weight_decay": 1e-4}
                optimizer = make(kind, group, **options) if make else kind(group, **options)
                optimizers.append(optimizer)
                schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        for _ in range(3):
            for samples in (8, 6):
                x = images(samples)
                pipe.step(x, target=LABELS[:samples], loss_fn=F.cross_entropy)
                reference(whole, x, chunks)
            norms = pipe.clip_grad_norm_(0.5), torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
            assert torch.allclose(*norms, rtol=1e-5)
            for each in (*optimizers, *schedulers):
                each.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        for name, value in pipe.state_dict().items():
            assert torch.allclose(value, whole.state_dict()[name], rtol=1e-4, atol=1e-6), name


def test_a_gradient_scaler_finds_what_overflowed() -> None:
    """fp16's loss scaling: gradients are scaled, the step undoes it; one with infinite gradients is left out."""
    model, x = mobilenet(), images(8)
    whole = copy.deepcopy(model)
    with fxsplit.compile(model, CHAIN2, schedule="auto", **HALVES) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.01)
        plain = torch.optim.SGD(whole.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(1))  # makes its tensors
        result = pipe.step(x, target=LABELS, loss_fn=F.cross_entropy, loss_scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        reference(whole, x, 2)
        plain.step()
        assert result.loss < 100
        for name, value in pipe.state_dict().items():
            assert torch.allclose(value, whole.state_dict()[name], rtol=1e-5, atol=1e-6), name
        before = pipe.state_dict()
        optimizer.zero_grad()
        pipe.step(x, target=LABELS, loss_fn=F.cross_entropy, loss_scale=float("inf"))
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        after = pipe.state_dict()
        assert all(torch.equal(before[name], after[name]) for name, _ in pipe.named_parameters())


def test_callbacks() -> None:
    reports: list[StepReport] = []
    with fxsplit.compile(mobilenet(), CHAIN2, schedule="auto", **HALVES) as pipe:
        pipe.on_step(reports.append)
        results = [pipe.step(images(8), target=LABELS, loss_fn=F.cross_entropy) for _ in range(2)]
    assert [report.number for report in reports] == [1, 2]
    assert [float(report.loss) for report in reports] == [float(result.loss) for result in results]
    assert all(0 < report.step_s <= report.metrics.total_s for report in reports)


def test_weights_that_were_cast_before_an_update_are_cast_again() -> None:
    """The caller's autocast is around several steps: torch would keep its casts until that ends."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    x, results = torch.randn(4, 4), []
    for transport in ("rpc", "in_process"):
        options: dict[str, Any] = {"cuts": ["1"], "transport": transport, "verify": False}
        with fxsplit.compile(model, ["cpu", "a/cpu"], **options) as pipe:
            optimizer = pipe.optimizer(torch.optim.SGD, lr=1.0)
            with torch.autocast("cpu", torch.bfloat16):
                losses = []
                for _ in range(3):
                    optimizer.zero_grad()
                    losses.append(pipe.step(x, loss_fn=lambda y: y.float().square().mean()).loss)
                    optimizer.step()
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(pipe.step(x, loss_fn=lambda y: y.float().square().mean()).loss)
            results.append(losses)
    assert all(map(torch.equal, *results)) and len({loss.item() for loss in results[0]}) == 4
