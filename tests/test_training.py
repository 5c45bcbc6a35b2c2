"""Training through the pipeline against training the model: optimizers, groups, clipping, states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fxsplit
from tests.comparison import (
    CHAIN2,
    CHAIN3,
    MOBILENET,
    ROBERTA,
    SANDWICH,
    TRANSPORTS,
    assert_same_gradients,
    assert_same_state,
    loss_of,
    reference_step,
)
from tests.models import images, inputs_of, mobilenet, tokens, transformer


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("devices", [SANDWICH, CHAIN2], ids=["sandwich", "chain2"])
def test_roberta_trains_as_one_process(transport: str, devices: list[str]) -> None:
    """Five AdamW steps with a scheduler and clipping: the weights agree to 1e-6."""
    model, labels = transformer("roberta"), torch.arange(6) % 2
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"cuts": ROBERTA[len(devices)], "transport": transport}
    with fxsplit.compile(model, devices, **options) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=1e-3)
        plain = torch.optim.AdamW(reference.parameters(), lr=1e-3)
        schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, plain)]
        assert isinstance(optimizer, torch.optim.Optimizer)
        for step in range(5):
            batch = tokens(6, length=8 + step)
            losses = [loss_of(run(**batch), labels) for run in (pipe, reference)]
            assert (
                torch.equal(losses[0], losses[1]) if step == 0 else torch.allclose(losses[0], losses[1], rtol=1e-5)
            )
            for loss in losses:
                loss.backward()
            norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1) for module in (pipe, reference)]
            assert torch.allclose(norms[0], norms[1], rtol=1e-5)
            for each in (optimizer, plain):
                each.step()
                each.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == 1e-3 * 0.25
        for name, value in pipe.state_dict().items():
            assert torch.allclose(value, reference.state_dict()[name], rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("chunks", [1, 4])
def test_five_steps_of_mobilenet_are_bit_identical(kind: type[torch.optim.Optimizer], chunks: int) -> None:
    model, x, labels = mobilenet(), images(16), torch.arange(16) % 10
    reference = copy.deepcopy(model)
    with fxsplit.compile(model, CHAIN3, cuts=MOBILENET[3], chunks=chunks, transport="in_process") as pipe:
        optimizer = pipe.optimizer(kind, lr=0.001)
        plain = kind(reference.parameters(), lr=0.001)  # type: ignore[call-arg]
        for _ in range(5):
            loss_of(pipe(x), labels).backward()
            reference_step(reference, x.tensor_split(chunks), lambda m, c: m(c), labels)
            for each in (optimizer, plain):
                each.step()
                each.zero_grad()
        assert_same_state(pipe, reference)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_transformers_over_three_workers(name: str) -> None:
    """Masks, positions and rotary tables cross the cuts; GPT-2's and BERT's embedding is tied to the head."""
    cuts = {
        "bert": ["bert.encoder.layer.1", "bert.encoder.layer.3"],
        "gpt2": ["transformer.h.1", "transformer.h.3"],
        "llama": ["model.layers.1", "model.layers.3"],
        "vit": ["vit.layers.1", "vit.layers.3"],
    }[name]
    model = transformer(name)
    reference = copy.deepcopy(model)
    if hasattr(reference.config, "use_cache"):
        reference.config.use_cache = False
    with fxsplit.compile(model, CHAIN3, cuts=cuts, transport="in_process") as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        plain = torch.optim.SGD(reference.parameters(), lr=0.1)
        for samples in (4, 3):
            batch = inputs_of(name, samples)
            output, expected = pipe(**batch), reference(**batch)
            assert type(output) is type(expected)
            assert torch.equal(output.logits, expected.logits)
            output.logits.square().mean().backward()
            expected.logits.square().mean().backward()
            assert_same_gradients(pipe, reference)
            for each in (optimizer, plain):
                each.step()
                each.zero_grad()
        assert_same_state(pipe, reference)


def test_state_dict_goes_round() -> None:
    model = mobilenet()
    other = mobilenet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    x = images(4)
    with fxsplit.compile(model, SANDWICH, cuts=MOBILENET[3], example_inputs=x, transport="in_process") as pipe:
        pipe.load_state_dict(other.state_dict())
        pipe.eval()
        other.eval()
        with torch.no_grad():
            assert torch.equal(pipe(x), other(x))
        other.load_state_dict(pipe.state_dict())


def test_optimizer_state_is_that_of_the_unsplit_optimizer() -> None:
    """It loads into a plain optimizer over the model, and back."""
    model, x, labels = mobilenet(), images(4), torch.arange(4)
    plain_model = copy.deepcopy(model)
    with fxsplit.compile(model, SANDWICH, cuts=MOBILENET[3], transport="in_process") as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        loss_of(pipe(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        plain_model.load_state_dict(pipe.state_dict())
        plain = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
        plain.load_state_dict(optimizer.state_dict())
        loss_of(plain_model(x), labels).backward()
        plain.step()
        loss_of(pipe(x), labels).backward()
        optimizer.step()
        assert_same_state(pipe, plain_model)
        optimizer.load_state_dict(plain.state_dict())
        state = optimizer.state_dict()["state"]
        assert all(
            torch.equal(state[i]["momentum_buffer"], s["momentum_buffer"])
            for i, s in plain.state_dict()["state"].items()
        )


def test_parameter_groups_by_name_and_frozen_parameters() -> None:
    model, x, labels = mobilenet(), images(4), torch.arange(4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("features.3"))
    reference = copy.deepcopy(model)

    def groups(parameters: Any) -> list[dict[str, Any]]:
        named = list(parameters)
        norm = [p for n, p in named if "bias" in n and p.requires_grad]
        rest = [p for n, p in named if "bias" not in n and p.requires_grad]
        return [{"params": norm, "lr": 0.5}, {"params": rest}]

    with fxsplit.compile(model, CHAIN2, cuts=MOBILENET[2], transport="in_process") as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, groups(pipe.named_parameters()), lr=0.1)
        plain = torch.optim.SGD(groups(reference.named_parameters()), lr=0.1)
        for run, each in ((pipe, optimizer), (reference, plain)):
            loss_of(run(x), labels).backward()
            each.step()
        assert_same_state(pipe, reference)


def test_a_plan_can_be_saved_and_used_again(tmp_path: Any) -> None:
    model, x = mobilenet(), images(4)
    path = str(tmp_path / "plan.json")
    with fxsplit.compile(model, CHAIN2, compressor="uniform8", example_inputs=x, transport="in_process") as pipe:
        pipe.plan.save(path)
        first = pipe(x)
    with fxsplit.compile(model, CHAIN2, plan=path, example_inputs=x, transport="in_process") as pipe:
        assert pipe.plan == fxsplit.Plan.load(path)
        assert torch.equal(pipe(x), first)
    with pytest.raises(fxsplit.FxsplitError, match="devices"):
        fxsplit.compile(model, ["cpu", "other/cpu"], plan=path, example_inputs=x, transport="in_process")


def test_clipping_by_the_pipelines_own_method() -> None:
    model, x, labels = mobilenet(), images(4), torch.arange(4)
    reference = copy.deepcopy(model)
    with fxsplit.compile(model, CHAIN2, cuts=MOBILENET[2], transport="in_process") as pipe:
        loss_of(pipe(x), labels).backward()
        loss_of(reference(x), labels).backward()
        for norm_type in (2.0, float("inf")):
            found = pipe.clip_grad_norm_(0.05, norm_type)
            expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05, norm_type)
            assert torch.allclose(found, expected, rtol=1e-5)
        found_gradients = pipe.gradients()
        for name, parameter in reference.named_parameters():
            assert torch.allclose(found_gradients[name], parameter.grad, rtol=1e-5)  # type: ignore[arg-type]


def test_norms_are_those_of_the_last_backward() -> None:
    """Looked at after each of two accumulated backwards; scaling in between cannot be carried over."""
    model, x, labels = mobilenet(), images(4), torch.arange(4)
    reference = copy.deepcopy(model)
    with fxsplit.compile(model, CHAIN2, cuts=MOBILENET[2], transport="in_process") as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(2):
            loss_of(pipe(x), labels).backward()
            loss_of(reference(x), labels).backward()
            found, expected = (
                torch.nn.utils.get_total_norm([p.grad for p in m.parameters() if p.grad is not None])
                for m in (pipe, reference)
            )
            assert torch.allclose(found, expected, rtol=1e-5)
        torch.nn.utils.clip_grad_norm_(pipe.parameters(), 0.01)
        loss_of(pipe(x), labels).backward()
        with pytest.raises(fxsplit.FxsplitError, match="another backward"):
            optimizer.step()
