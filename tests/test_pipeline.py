"""The pipeline against the model itself: outputs, gradients, buffers and weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.spec import TensorSpec
from tests.models import images, inputs_of, mobilenet, tokens, transformer

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


class Decides(nn.Module):
    """Ways through the model that depend on data, on sizes and on optional arguments; batch norm has a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.second = nn.Linear(4, 4)
        self.extra = nn.Linear(4, 4)

    def forward(self, x: Tensor, bias: Tensor | None = None, double: bool = False) -> Tensor:
        y = self.first(x)
        if y.mean() > 100 or x.sum() > 50:
            y = self.extra(y)
        if x.shape[0] > 6:
            y = y * 2
        for row in range(x.shape[1] - 3):
            y = y + row
        y = self.second(y)
        y = y if bias is None else y + bias
        return y * 2 if double else y  # type: ignore[no-any-return]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_other_ways_through_the_model_are_recorded_when_they_come(transport: str) -> None:
    """Each is said once; weights, buffers, gradients and optimizer states stay those of the unsplit model."""
    model = Decides()
    reference = copy.deepcopy(model)
    small, large, many = torch.rand(4, 4), torch.rand(4, 4) * 20, torch.rand(8, 4)
    bias = torch.ones(4)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((small,), {}),
        ((large,), {}),
        ((many,), {}),
        ((small, bias), {}),
        ((small,), {"bias": bias, "double": True}),
    ]
    with fxsplit.compile(model, CHAIN2, cuts=["second"], transport=transport) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-4, momentum=0.9)
        plain = torch.optim.SGD(reference.parameters(), lr=1e-4, momentum=0.9)
        for turn in range(2):
            for number, (args, kwargs) in enumerate(calls):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    output = pipe(*args, **kwargs)
                said = [str(w.message) for w in caught if "traced again" in str(w.message)]
                assert len(said) == (turn == 0 and number > 0), said
                expected = reference(*args, **kwargs)
                assert torch.equal(output, expected)
                output.square().sum().backward()
                expected.square().sum().backward()
                if number % 2:  # every other step leaves gradients to be carried over
                    for each in (optimizer, plain):
                        each.step()
                        each.zero_grad()
        assert_same_state(pipe, reference)


def test_ways_that_differ_within_a_batch_are_refused() -> None:
    mixed = torch.cat([torch.rand(2, 4), torch.rand(2, 4) * 50])
    with fxsplit.compile(Decides().eval(), CHAIN2, cuts=["second"], chunks=2, transport="in_process") as pipe:
        pipe(torch.rand(4, 4))
        with (
            pytest.warns(UserWarning, match="traced again"),
            pytest.raises(fxsplit.FxsplitError, match="chunks=1"),
        ):
            pipe(mixed)


class Endless(nn.Module):
    """Decides on a number of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * x.max().item())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Endless is traced again")
def test_a_graph_for_every_batch_is_refused_with_its_line() -> None:
    with fxsplit.compile(Endless(), CHAIN2, cuts=["second"], transport="in_process") as pipe:
        with pytest.raises(fxsplit.FxsplitError, match="nearly every batch") as caught:
            for _ in range(40):
                pipe(torch.rand(4, 4))
        assert "test_pipeline.py" in str(caught.value)


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


def test_the_picture_of_a_pipeline() -> None:
    with fxsplit.compile(mobilenet(), SANDWICH, cuts=MOBILENET[3], transport="in_process") as pipe:
        assert "compiles at its first call" in repr(pipe)
        pipe(images(2))
        assert repr(pipe) == (
            "Pipeline(MobileNetV2 over [cpu, server/cpu, cpu], 1 chunks, cuts features.0.2, classifier)"
        )
        assert [w.name for w in pipe.workers] == ["client", "server"]
    assert "closed" in repr(pipe)
