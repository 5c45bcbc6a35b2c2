"""Analysis: MACs, bytes and what may cross a cut, against numbers computed by hand and by the documents."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxsplit
from fxsplit.costs import CostTable
from fxsplit.errors import FxsplitError, InputError
from fxsplit.opening import trace_for_planning
from fxsplit.trace import Arguments
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


def test_published_macs() -> None:
    """The MACs that torchvision publishes with its weights; batch norm, counted here, adds up to five per cent."""
    for name, published in (("mobilenet_v2", 0.301e9), ("resnet18", 1.814e9), ("vgg11", 7.609e9)):
        model = torchvision.models.get_model(name)
        traced = fxsplit.trace(
            model.eval(), images(2, 224), opened=["features" if name != "resnet18" else "layer1"]
        )
        costs = fxsplit.analyze(traced, images(1, 224))
        assert costs.forward_macs == pytest.approx(published, rel=0.05)


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
    with pytest.warns(UserWarning, match="no MAC formula for aten.*rnn|lstm"):
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
