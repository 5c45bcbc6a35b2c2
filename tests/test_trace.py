"""Tracing: the graph is the model, bit for bit, in both modes, at every batch size, under every mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import FxsplitError, GuardError, InputError, PlanError, TraceError
from fxsplit.trace.patches import without_cache
from tests.models import images, inputs_of, mobilenet, tokens, transformer

# One member of every torchvision classification family, all others being the same code with other numbers, and a
# place to cut it.
CLASSIFIERS = {
    "alexnet": "features.6",
    "convnext_tiny": "features.4",
    "densenet121": "features.denseblock3",
    "efficientnet_b0": "features.4",
    "efficientnet_v2_s": "features.4",
    "googlenet": "inception4b",
    "inception_v3": "Mixed_6b",
    "maxvit_t": "blocks.2",
    "mnasnet0_5": "layers.10",
    "mobilenet_v2": "features.0.2",
    "mobilenet_v3_small": "features.6",
    "regnet_y_400mf": "trunk_output.block3",
    "resnet18": "layer3.0.bn1",
    "resnext50_32x4d": "layer3",
    "shufflenet_v2_x0_5": "stage3",
    "squeezenet1_1": "features.7",
    "swin_t": "features.3.0.mlp",
    "swin_v2_t": "features.4",
    "vgg11_bn": "features.15",
    "vit_b_16": "encoder.layers.encoder_layer_6",
    "wide_resnet50_2": "layer3",
}
SIZES = {"inception_v3": 96, "maxvit_t": 224}
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False, "aux_logits": True},
    "inception_v3": {"init_weights": False},
    "vit_b_16": {"image_size": 64},
}
# In train mode with auxiliary heads these want images larger than the tests can afford.
EVAL_ONLY = {"inception_v3"}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_torchvision_classifiers(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {}))
    model.train(name not in EVAL_ONLY)
    x = images(2, SIZES.get(name, 64))
    traced = fxsplit.trace(model, x, cuts=[CLASSIFIERS[name]])  # verifies itself, in both modes
    assert set(traced.graphs) == ({True, False} if name not in EVAL_ONLY else set(traced.graphs))
    assert CLASSIFIERS[name] in traced.primary.cut_points
    torch.manual_seed(1)
    expected = _tensors(model(x))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(traced(x)), expected, strict=True))


CUTS = {
    "bert": "bert.encoder.layer.2",
    "roberta": "roberta.encoder.layer.0.attention.output",
    "gpt2": "transformer.h.1.mlp",
    "llama": "model.layers.2.mlp",
    "vit": "vit.layers.2",
}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", CUTS)
def test_transformers_with_any_mask(name: str, padded: bool) -> None:
    """Traced with padding and run without it, and the reverse: no mask is frozen into the graph."""
    model = transformer(name, dropout=0.1)
    example = inputs_of(name, 4)
    if "attention_mask" in example and not padded:
        example["attention_mask"] = torch.ones_like(example["attention_mask"])
    traced = fxsplit.trace(model, example, cuts=[CUTS[name]])
    for samples, length, mask in ((1, 12, True), (5, 12, False), (3, 9, True)):
        other = {"pixel_values": images(samples)} if name == "vit" else tokens(samples, length, mask)
        for training in (True, False):
            model.train(training)
            torch.manual_seed(2)
            with without_cache(model):
                expected = model(**other)
            torch.manual_seed(2)
            found = traced(**other)
            assert type(found) is type(expected)
            assert all(torch.equal(a, b) for a, b in zip(_tensors(found), _tensors(expected), strict=True))


def test_gradients_are_the_models() -> None:
    model = transformer("roberta", dropout=0.1)
    traced = fxsplit.trace(model, inputs_of("roberta", 4), cuts=[CUTS["roberta"]])
    gradients = []
    for run in (model, traced):
        torch.manual_seed(3)
        model.zero_grad()
        run(**inputs_of("roberta", 4)).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model = mobilenet().train()
    model.get_submodule("features.1").eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    fxsplit.trace(model, images(4), cuts=["features.3"])
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert nn.Module.__call__ is nn.Module._wrapped_call_impl


def test_one_graph_serves_both_modes_where_it_can() -> None:
    traced = fxsplit.trace(mobilenet(), images(4), cuts=["features.3"])
    assert traced.graphs[True] is traced.graphs[False]


class Sizes(nn.Module):
    """Shapes, lengths and functional dropout at the top level."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        batch, length, width = x.shape
        y = self.first(x.reshape(batch * length, width)).view(len(x), -1, width)
        y = F.dropout(y, 0.5, training=self.training) + torch.arange(x.size(1)).view(1, -1, 1) * scale
        y[:, 0] = 0
        y += 1
        return {"y": self.second(y.view(x.size(0), length, -1)), "count": batch * 2, "none": None}


def test_sizes_are_never_frozen() -> None:
    model = Sizes()
    traced = fxsplit.trace(model, torch.randn(4, 3, 8), cuts=["second"])
    for shape in ((1, 3, 8), (7, 5, 8)):
        x = torch.randn(shape)
        for training in (True, False):
            model.train(training)
            torch.manual_seed(0)
            expected = model(x)
            torch.manual_seed(0)
            found = traced(x)
            assert torch.equal(found["y"], expected["y"])
            assert found["count"] == expected["count"] and found["none"] is None


def test_keyword_calls_in_any_order() -> None:
    model = transformer("bert").eval()
    traced = fxsplit.trace(model, tokens(4), cuts=[CUTS["bert"]])
    batch = tokens(3)
    swapped = {"attention_mask": batch["attention_mask"], "input_ids": batch["input_ids"]}
    assert torch.equal(traced(**swapped).logits, model(**batch).logits)
    assert torch.equal(traced(batch["input_ids"], batch["attention_mask"]).logits, model(**batch).logits)


class Double(torch.autograd.Function):
    """Doubles, with a gradient that is not the true one, so that it can be told apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 5


class WithFunction(nn.Module):
    """A user's autograd function, no_grad regions and autocast at the top level."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = Double.apply(self.first(x))
        with torch.no_grad():
            scale = self.first(x).abs().mean(dim=1, keepdim=True).sqrt()
        with torch.autocast("cpu", torch.bfloat16):
            scale = scale + torch.matmul(x, x.T).mean()
        return self.second(y * scale)  # type: ignore[no-any-return]


def test_autograd_functions_and_no_grad_regions() -> None:
    model, x = WithFunction(), torch.randn(4, 4)
    traced = fxsplit.trace(model, x, cuts=["second"])
    gradients = []
    for run in (model, traced):
        model.zero_grad()
        run(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class DecidesOnData(nn.Module):
    """Control flow on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 0.9:
            x = x * 3
        return self.second(self.first(x))  # type: ignore[no-any-return]


def test_a_graph_refuses_batches_that_take_another_way() -> None:
    """Control flow on data or on sizes is guarded, with the line that decides."""
    traced = fxsplit.trace(DecidesOnData(), torch.ones(4, 4), cuts=["second"])
    with pytest.raises(GuardError) as caught:
        traced(torch.ones(4, 4) * 0.5)
    assert "test_trace.py" in str(caught.value) and "in forward" in str(caught.value)


class FrozenIn(nn.Module):
    """Takes a number out of a tensor by a way that no recorder sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.detach().numpy().max())
        return self.second(self.first(x) * scale)  # type: ignore[no-any-return]


def test_what_cannot_be_guarded_is_found_by_verification() -> None:
    with pytest.raises(TraceError) as caught:
        fxsplit.trace(FrozenIn(), torch.ones(4, 4), cuts=["second"])
    text = str(caught.value)
    for words in ("does not reproduce the model", "another batch", "output 0 differs by", "train mode"):
        assert words in text


def test_a_failing_model_is_reported_with_its_own_line() -> None:
    with pytest.raises(TraceError) as caught:
        fxsplit.trace(mobilenet(), torch.randn(4, 5, 32, 32), cuts=["features.3"])
    assert "RuntimeError" in str(caught.value) and "mobilenetv2.py" in str(caught.value)


@pytest.mark.parametrize("value", [mobilenet, {"state": 1}, "model", None, 3])
def test_not_a_module(value: Any) -> None:
    with pytest.raises(TraceError, match=r"only a torch\.nn\.Module can be compiled"):
        fxsplit.trace(value, images(2))


def test_unknown_cut_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"features\.3") as caught:
        fxsplit.trace(mobilenet(), images(2), cuts=["featurs.3"])
    assert isinstance(caught.value, FxsplitError)


@pytest.mark.parametrize(
    ("example", "text"),
    [
        ((), "cannot be called"),
        ((torch.randn(2, 3, 32, 32), 1), "cannot be called"),
        (torch.empty(0, 3, 32, 32), "empty"),
    ],
)
def test_inputs_that_do_not_fit(example: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        fxsplit.trace(mobilenet(), example, cuts=["features.3"])


def test_a_call_of_another_kind_is_refused() -> None:
    model = Sizes()
    traced = fxsplit.trace(model, (torch.randn(4, 3, 8), 2.0), cuts=["second"])
    assert traced(torch.randn(2, 3, 8), 2.0)["y"].shape == (2, 3, 8)
    with pytest.raises(InputError, match="another way of calling it"):
        traced(torch.randn(2, 3, 8), 3.0)


def _tensors(output: Any) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def test_a_value_that_a_module_hands_through_is_more_than_its_layout() -> None:
    """`nn.Identity` calls no torch function: what comes out of it is used all the same."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)), torch.rand(2, 4)
    with (
        fxsplit.compile(model, ["cpu", "one/cpu"], cuts=["1"], transport="in_process", example_inputs=x) as pipe,
        torch.no_grad(),
    ):
        assert torch.equal(pipe(x), model(x))
