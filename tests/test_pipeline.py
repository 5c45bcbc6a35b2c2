"""The pipeline against the model itself: outputs, gradients and buffers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.spec import TensorSpec
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
from tests.models import images, mobilenet, tokens, transformer


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("devices", [SANDWICH, CHAIN2, CHAIN3], ids=["sandwich", "chain2", "chain3"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_mobilenet_is_bit_identical(transport: str, devices: list[str], chunks: int) -> None:
    """Outputs in both modes, gradients, batch norm's statistics; ten samples do not divide by four chunks."""
    model, x, labels = mobilenet(), images(10), torch.arange(10) % 10
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"cuts": MOBILENET[len(devices)], "chunks": chunks, "transport": transport}
    with fxsplit.compile(model, devices, example_inputs=x, **options) as pipe:
        output = pipe(x)
        loss_of(output, labels).backward()
        expected = reference_step(reference, x.tensor_split(chunks), lambda m, c: m(c), labels)
        assert torch.equal(output, expected)
        assert_same_gradients(pipe, reference)
        assert_same_state(pipe, reference)
        pipe.eval()
        reference.eval()
        with torch.no_grad():
            joined = torch.cat([reference(c) for c in x.tensor_split(chunks)])
            assert torch.equal(pipe(x), joined)
        assert not any(p.grad is not None for p in model.parameters()), "the user's model was touched"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("codecs", [("sortquant8", "sortquant8"), ("fastquant6", "uniform8")])
def test_the_rewritten_module_is_the_pipeline(transport: str, codecs: tuple[str, str]) -> None:
    """The whole module with its codec nodes gives the split pipeline's outputs and gradients bit for bit."""
    model, x, labels = mobilenet(), images(4), torch.arange(4)
    with fxsplit.compile(
        model,
        SANDWICH,
        cuts=MOBILENET[3],
        compressor=codecs[0],
        gradient_compressor=codecs[1],
        transport=transport,
        example_inputs=x,
    ) as pipe:
        output = pipe(x)
        loss_of(output, labels).backward()
        whole = pipe.rewritten(x)
        loss_of(whole, labels).backward()
        assert torch.equal(output, whole)
        assert_same_gradients(pipe, model)
        pipe.eval()
        model.eval()
        with torch.no_grad():
            plain = model(x)
            model.load_state_dict(pipe.state_dict())
            assert torch.equal(pipe(x), pipe.rewritten(x))
        assert not torch.equal(plain, whole), "nothing was compressed"


@pytest.mark.parametrize("chunks", [3, 4, 10])
def test_an_uneven_batch_has_the_unsplit_models_loss_and_gradients(chunks: int) -> None:
    """Ten samples; no batch norm, so the whole batch is the reference: equal but for the order of sums."""
    model, batch, labels = transformer("roberta"), tokens(10), torch.arange(10) % 2
    reference = copy.deepcopy(model)
    with fxsplit.compile(model, SANDWICH, cuts=ROBERTA[3], chunks=chunks, transport="in_process") as pipe:
        found, expected = loss_of(pipe(**batch), labels), loss_of(reference(**batch), labels)
        assert torch.allclose(found, expected, rtol=1e-6)
        found.backward()
        expected.backward()
        gradients = pipe.gradients()
        for name, parameter in reference.named_parameters():
            if parameter.grad is not None:
                assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7), name


def test_a_loss_inside_the_model_is_averaged_over_the_chunks() -> None:
    model = transformer("bert").eval()
    batch = {**tokens(6), "labels": tokens(6)["input_ids"]}
    with fxsplit.compile(model, CHAIN2, cuts=["bert.encoder.layer.2"], chunks=3, transport="in_process") as pipe:
        loss = pipe(**batch).loss
        losses = [model(**{k: v[i : i + 2] for k, v in batch.items()}).loss for i in (0, 2, 4)]
        assert torch.allclose(loss, torch.stack(losses).mean(), rtol=1e-6)
        loss.backward()
        assert pipe.gradients()


class Skips(nn.Module):
    """A value that the next but one stage uses, an input used late, and one output made early."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor, *, factor: float = 1.0) -> dict[str, Tensor]:
        first = self.a(x).relu_()
        second = self.b(first)
        third = self.c(second + first + y) * factor
        return {"early": first, "late": third + x}


@pytest.mark.parametrize("devices", [CHAIN3, SANDWICH], ids=["chain3", "sandwich"])
def test_skip_connections_inputs_with_gradients_and_several_outputs(devices: list[str]) -> None:
    model = Skips()
    reference = copy.deepcopy(model)
    x, y = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    with fxsplit.compile(model, devices, cuts=["b", "c"], chunks=2, transport="in_process") as pipe:
        output = pipe(x, factor=2.0, y=y)
        (output["early"].sum() + output["late"].square().sum()).backward()
        found = [x.grad, y.grad]
        x.grad = y.grad = None
        expected = reference(x, y, factor=2.0)
        (expected["early"].sum() + expected["late"].square().sum()).backward()
        assert list(output) == list(expected)
        assert all(torch.equal(output[k], expected[k]) for k in expected)
        for one, other in zip(found, (x.grad, y.grad), strict=True):
            assert one is not None and other is not None and torch.allclose(one, other, rtol=1e-6)


def test_measured_bytes_are_what_wire_says() -> None:
    """Every link's bytes, both directions, equal the compressor's own arithmetic and the plan's prediction."""
    model, x = mobilenet(), images(8)
    options: dict[str, Any] = {"cuts": MOBILENET[3], "chunks": 2, "transport": "in_process"}
    with fxsplit.compile(
        model, SANDWICH, example_inputs=x, compressor="sortquant4", gradient_compressor="uniform12", **options
    ) as pipe:
        pipe(x).sum().backward()
        links = {(link.source, link.backward): link for link in pipe.metrics.links.values()}
        cut1, cut2 = TensorSpec((4, 32, 16, 16), torch.float32), TensorSpec((4, 1280), torch.float32)
        code4, code12 = fxsplit.compressor("sortquant4"), fxsplit.compressor("uniform12")
        assert links["client", False].wire_bytes == 2 * code4.wire_bytes(cut1)
        assert links["client", True].wire_bytes == 2 * code12.wire_bytes(cut2)
        assert links["server", False].wire_bytes == 2 * code4.wire_bytes(cut2)
        assert links["server", True].wire_bytes == 2 * code12.wire_bytes(cut1)
        assert links["client", False].raw_bytes == 2 * cut1.nbytes
        assert 2 * code4.wire_bytes(cut1) < 0.13 * 2 * cut1.nbytes, "four bits are four bits"
        assert pipe.metrics.calls == 1 and pipe.metrics.samples == 8
        assert pipe.plan.cuts[0].raw_bytes == 2 * cut1.nbytes


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_autocast_around_the_call_holds_on_every_worker(transport: str) -> None:
    model, batch = transformer("roberta"), tokens(4)
    reference = copy.deepcopy(model)
    with fxsplit.compile(model, SANDWICH, cuts=ROBERTA[3], transport=transport, example_inputs=batch) as pipe:
        with torch.autocast("cpu", torch.bfloat16):
            output, expected = pipe(**batch).logits, reference(**batch).logits
        assert output.dtype is expected.dtype is torch.bfloat16
        assert torch.equal(output, expected)
        output.float().sum().backward()
        expected.float().sum().backward()
        assert_same_gradients(pipe, reference)
        with torch.inference_mode():
            assert torch.equal(pipe(**batch).logits, reference(**batch).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, batch = transformer("roberta").to(dtype), tokens(4)
    reference = copy.deepcopy(model)
    with fxsplit.compile(model, SANDWICH, cuts=ROBERTA[3], transport="in_process", example_inputs=batch) as pipe:
        output, expected = pipe(**batch).logits, reference(**batch).logits
        assert output.dtype is dtype and torch.equal(output, expected)
        output.float().sum().backward()
        expected.float().sum().backward()
        assert_same_gradients(pipe, reference)


def test_two_forwards_before_their_backwards() -> None:
    model = mobilenet().eval()
    reference = copy.deepcopy(model)
    one, two = images(4), images(3)
    with fxsplit.compile(model, CHAIN2, cuts=MOBILENET[2], transport="in_process") as pipe:
        (pipe(one).sum() - pipe(two).square().sum()).backward()
        for output in (reference(two).square().sum().neg(), reference(one).sum()):
            output.backward()
        found = pipe.gradients()
        for name, parameter in reference.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-4), name


def test_forwards_without_backward_are_forgotten() -> None:
    """Evaluating with gradients on keeps nothing on the workers once the output is gone."""
    with fxsplit.compile(mobilenet().eval(), CHAIN2, cuts=MOBILENET[2], transport="in_process") as pipe:
        for _ in range(3):
            pipe(images(2))
        with torch.no_grad():
            pipe(images(2))
        worker = pipe._engine._worker
        assert worker is not None
        assert len(worker._runs) == 0


def test_the_picture_of_a_pipeline() -> None:
    with fxsplit.compile(mobilenet(), SANDWICH, cuts=MOBILENET[3], transport="in_process") as pipe:
        assert "compiles at its first call" in repr(pipe)
        pipe(images(2))
        assert repr(pipe) == (
            "Pipeline(MobileNetV2 over [cpu, server/cpu, cpu], 1 chunks, cuts features.0.2, classifier)"
        )
        assert [w.name for w in pipe.workers] == ["client", "server"]
    assert "closed" in repr(pipe)


class PassesContainers(nn.Module):
    """A dictionary and a list of tensors cross the cut whole, with their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Makes(), Takes()

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x)
        features["more"] = features["one"] * 2
        return self.second(features, list(features.values()))  # type: ignore[no-any-return]


class Makes(nn.Module):
    """Two features by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(one=self.one(x), two=self.two(x))


class Takes(nn.Module):
    """Their sums."""

    def forward(self, features: OrderedDict[str, Tensor], items: list[Tensor]) -> Tensor:
        return features["one"] + features["more"] * features["two"] + sum(items)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_containers_of_tensors_cross_with_their_gradients(transport: str) -> None:
    model, x = PassesContainers(), torch.randn(4, 4)
    reference = copy.deepcopy(model)
    with fxsplit.compile(model, CHAIN2, cuts=["second"], transport=transport, example_inputs=x) as pipe:
        output, expected = pipe(x), reference(x)
        assert torch.equal(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        found = pipe.gradients()
        for name, parameter in reference.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(found[name], parameter.grad, rtol=1e-5), name
