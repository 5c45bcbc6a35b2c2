"""Analysis: MACs, bytes and what may cross a cut, against numbers computed by hand and by the documents."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxsplit
from fxsplit.analyze import module_macs
from fxsplit.costs import CostTable
from fxsplit.errors import FxsplitError, InputError
from fxsplit.opening import trace_for_planning
from fxsplit.pricing import mac_counter
from fxsplit.trace import Arguments, checked_call
from tests.models import TINY, images, inputs_of, mobilenet, tokens, transformer


def costs_of(cuts: list[str], samples: int, size: int) -> CostTable:
    """Costs of MobileNetV2 with 1000 classes."""
    model = torchvision.models.mobilenet_v2()
    traced = fxsplit.trace(model, images(2, size), cuts=cuts)
    return fxsplit.analyze(traced, torch.empty(samples, 3, size, size))


def test_the_documents_parts() -> None:
    """Type 1 of the reference documents: client conv + bn, server the rest, client classifier."""
    costs = costs_of(["features.0.2", "classifier"], samples=64, size=224)
    plan = fxsplit.plan(
        costs, ["cpu", "cuda", "cpu"], cuts=["features.0.2", "classifier"], compressor="sortquant8"
    )
    for part, macs in zip(plan.parts, (7.45e8, 1.93e10, 8.19e7), strict=True):
        assert part.macs == pytest.approx(macs, rel=0.01)
    assert costs.forward_macs == pytest.approx(2.01e10, rel=0.01)
    assert plan.cuts[0].raw_bytes == 64 * 32 * 112 * 112 * 4
    assert plan.cuts[1].raw_bytes == 64 * 1280 * 4
    assert [part.worker for part in plan.parts] == ["client", "cuda", "client"]


def test_macs_do_not_depend_on_what_is_opened_and_grow_with_the_batch() -> None:
    coarse, fine = costs_of(["features.1"], 4, 64), costs_of(["features.1.conv.1", "features.0.1"], 4, 64)
    assert coarse.forward_macs == fine.forward_macs
    assert coarse.parameter_bytes == fine.parameter_bytes
    assert costs_of(["features.1"], 8, 64).forward_macs == 2 * coarse.forward_macs
    assert len(fine) > len(coarse)


PUBLISHED = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "inception_v3", "mnasnet1_0",
    "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "resnet18", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_0", "swin_t", "vgg11", "vgg16_bn", "vit_b_16",
    "vit_b_32", "wide_resnet50_2",
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_macs(name: str) -> None:
    """The MACs, in 1e9, that torchvision publishes with its weights as GFLOPs; batch norm is not in them."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    (size,) = weights.transforms().crop_size
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **({"init_weights": False} if "inception" in name else {}))
    model = model.eval().to_empty(device="cpu")
    call, leaves = checked_call(model, Arguments.of(torch.empty(1, 3, size, size)))
    macs = module_macs(model, call, leaves, count_batch_norm=False)[""]
    assert macs == pytest.approx(weights.meta["_ops"] * 1e9, rel=0.01)


def test_batch_norm_counts_as_the_documents_do_or_not() -> None:
    model, x = torchvision.models.resnet18().eval(), images(1, 224)
    traced = fxsplit.trace(model, x, opened=["layer1"], verify=False)
    assert fxsplit.analyze(traced, x, count_batch_norm=False).forward_macs == pytest.approx(1.814e9, rel=1e-3)
    assert fxsplit.analyze(traced, x).forward_macs == pytest.approx(1.814e9 + 2 * 2_483_712, rel=2e-3)


@pytest.mark.parametrize("name", ["mobilenet", "resnet", "roberta"])
def test_backward_and_saved_bytes_are_those_of_a_real_step(name: str) -> None:
    x: Any = tokens(4, 16) if name == "roberta" else images(2, 64)
    if name == "roberta":
        model = transformer("roberta")
    else:
        model = mobilenet() if name == "mobilenet" else torchvision.models.resnet18()
    costs = fxsplit.analyze(trace_for_planning(model, Arguments.of(x), verify=False), x)
    kept: dict[int, Any] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    counter = mac_counter()
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = model(**x).logits if name == "roberta" else model(x)
        forward = counter.get_total_flops() // 2
        parameters = list(model.parameters())
        torch.autograd.grad(made, parameters, torch.ones_like(made), allow_unused=True)
    assert costs.forward_macs == forward
    assert costs.backward_macs == counter.get_total_flops() // 2 - forward
    assert costs.saved_bytes == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.02)
    assert sum(n.trainable_bytes for n in costs.nodes) == sum({id(p): p.nbytes for p in parameters}.values())
    assert sum(n.optimizer_bytes(2) for n in costs.nodes) == 2 * sum(p.nbytes for p in parameters)


def test_attention_is_counted() -> None:
    model = transformer("roberta")
    batch = tokens(4, 16)
    costs = fxsplit.analyze(fxsplit.trace(model, batch, cuts=["roberta.encoder.layer.1"]), batch)
    h, f, t = TINY["hidden_size"], TINY["intermediate_size"], 16
    layer = 4 * t * (4 * h * h + 2 * h * f) + 4 * 2 * t * t * h
    assert costs["roberta_encoder_layer_1"].forward_macs == layer


def test_values_that_may_be_compressed() -> None:
    """Activations may, masks and token ids may not."""
    model = transformer("llama")
    batch = inputs_of("llama", 4)
    costs = fxsplit.analyze(fxsplit.trace(model, batch, cuts=["model.layers.2"]), batch)
    crossing = [v for v in costs.values if v.producer < costs.cut_points["model.layers.2"] <= max(v.consumers)]
    compressible = [v.name for v in crossing if v.is_compressible]
    assert compressible == ["model_layers_1"]
    assert len(crossing) >= 3, "mask, cosine and sine cross beside it"


class Custom(nn.Module):
    """An operation without a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.first(x))[0]  # type: ignore[no-any-return]


def test_operations_without_a_formula_are_named() -> None:
    x = torch.randn(2, 3, 4)
    traced = fxsplit.trace(Custom(), x, cuts=["rnn"])
    with pytest.warns(UserWarning, match=r"no MAC formula for aten\.\w*(rnn|lstm)\w* \(node rnn\)"):
        costs = fxsplit.analyze(traced, x)
    assert costs.uncounted


def test_nothing_is_warned_of_common_models() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fxsplit.analyze(fxsplit.trace(mobilenet(), images(2), cuts=["features.3"]), images(2))
        for name in ("bert", "gpt2", "vit"):
            batch = inputs_of(name, 2)
            fxsplit.analyze(fxsplit.trace(transformer(name), batch, opened=[]), batch)


def test_a_plan_knows_its_model() -> None:
    first, second = costs_of(["features.1"], 2, 64), costs_of(["features.1"], 4, 64)
    assert first.fingerprint == second.fingerprint
    other = fxsplit.analyze(fxsplit.trace(mobilenet(), images(2), cuts=["features.1"]), images(2))
    assert other.fingerprint != first.fingerprint


def test_batches_that_the_model_does_not_take() -> None:
    traced = fxsplit.trace(mobilenet(), images(4), cuts=["features.3"])
    with pytest.raises(InputError, match="more than 1 value per channel"):
        fxsplit.analyze(traced, images(1))
    for x, message in ((torch.rand(2, 1, 32, 32), "RuntimeError"), (torch.rand(0, 3, 32, 32), "empty")):
        with pytest.raises(FxsplitError, match=message):
            trace_for_planning(mobilenet(), Arguments.of(x))
