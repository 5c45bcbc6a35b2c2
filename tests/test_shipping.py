"""What is shipped to a worker is the same model."""

from __future__ import annotations

import torch
from torch import nn

import fxsplit
from fxsplit.runtime import shipping
from tests.models import images, mobilenet, tokens, transformer


def stages_of_roberta() -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """A model and its stages."""
    model, batch = transformer("roberta").eval(), tokens(4)
    cuts = ["roberta.encoder.layer.1", "roberta.encoder.layer.3"]
    traced = fxsplit.trace(model, batch, cuts=cuts)
    plan = fxsplit.plan(fxsplit.analyze(traced, batch), ["cpu", "a/cpu", "b/cpu"], cuts=cuts)
    return model, fxsplit.split(fxsplit.rewrite(traced, plan), 3).stages


def test_stages_hold_the_models_own_keys() -> None:
    model, stages = stages_of_roberta()
    keys = [key for stage in stages for key in stage.state_dict()]
    assert sorted(keys) == sorted(model.state_dict())
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for stage in stages for p in stage.parameters()), "nothing is copied before shipping"


def test_a_shipped_stage_computes_the_same() -> None:
    model = mobilenet().eval()
    x = images(4)
    traced = fxsplit.trace(model, x, cuts=["features.5"])
    plan = fxsplit.plan(fxsplit.analyze(traced, x), ["cpu", "a/cpu"], cuts=["features.5"])
    stages = fxsplit.split(fxsplit.rewrite(traced, plan), 2).stages
    data, tensors = shipping.dump(stages)
    assert len(data) < 200_000, "tensors travel apart"
    first, second = shipping.load(data, tensors)
    with torch.no_grad():
        assert torch.equal(second(*first(x))[0], model(x))
    assert {p.data_ptr() for p in first.parameters()}.isdisjoint({p.data_ptr() for p in model.parameters()})
    assert [n for n, _ in second.named_buffers()] == [n for n, _ in stages[1].named_buffers()]
    assert all(
        a.requires_grad == b.requires_grad
        for a, b in zip(stages[1].parameters(), second.parameters(), strict=True)
    )


def test_shared_parameters_stay_shared() -> None:
    one = nn.Linear(3, 3)
    data, tensors = shipping.dump({"a": one, "b": one.weight, "c": nn.Sequential(one)})
    assert len(tensors) == 2
    loaded = shipping.load(data, tensors)
    assert loaded["a"].weight is loaded["b"] and loaded["c"][0].weight is loaded["b"]


def test_functions_of_a_script_travel_by_value() -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec("def double(x):\n    return helper(x) * 2\ndef helper(x):\n    return x + 1\n", namespace)
    data, tensors = shipping.dump(namespace["double"])
    assert shipping.load(data, tensors)(3) == 8


def test_operators_travel_by_name() -> None:
    for operator in (torch.ops.aten.add, torch.ops.aten.add.Tensor, torch.ops.torchvision.nms):
        assert shipping.load(*shipping.dump(operator)) is operator


def test_parametrized_modules_are_shipped() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    loaded = shipping.load(*shipping.dump(module))
    x = torch.ones(2, 3)
    assert torch.equal(loaded(x), module(x))
    assert list(loaded.state_dict()) == list(module.state_dict())
