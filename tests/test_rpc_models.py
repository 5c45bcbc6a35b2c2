"""A sample of real models through real worker processes: outputs in both modes, gradients, state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxsplit
from tests.comparison import CHAIN2, assert_same_gradients, assert_same_state
from tests.models import TINY, images, inputs_of, tokens, transformer, without_dropout


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A classifier of torchvision for ten classes, dropout off."""
    return lambda: without_dropout(torchvision.models.get_model(name, weights=None, num_classes=10, **options))


def t5() -> nn.Module:
    """An encoder and a decoder over one embedding, which is the head, too."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=128, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    model: nn.Module = T5ForConditionalGeneration(config)
    return model


def mixture() -> nn.Module:
    """A mixture of experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model: nn.Module = MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4))
    return model


def with_labels() -> dict[str, Tensor]:
    """Tokens that are their own labels."""
    batch = tokens(4)
    return {**batch, "labels": batch["input_ids"]}


Case = tuple[Callable[[], nn.Module], Callable[[], Any], str]
CASES: dict[str, Case] = {
    "mobilenet_v3_small": (vision("mobilenet_v3_small"), lambda: images(4, 64), "features.6"),
    "resnet18": (vision("resnet18"), lambda: images(4, 64), "layer2.1.conv2"),
    "densenet121": (vision("densenet121"), lambda: images(4, 64), "features.denseblock2"),
    "efficientnet_b0": (vision("efficientnet_b0", stochastic_depth_prob=0.0), lambda: images(4, 64), "features.4"),
    "vit_b_16": (vision("vit_b_16", image_size=32), lambda: images(4, 32), "encoder.layers.encoder_layer_6"),
    "bert": (lambda: transformer("bert"), lambda: inputs_of("bert", 4), "bert.encoder.layer.2"),
    "roberta": (lambda: transformer("roberta"), lambda: inputs_of("roberta", 4), "roberta.encoder.layer.2"),
    "gpt2": (lambda: transformer("gpt2"), lambda: inputs_of("gpt2", 4), "transformer.h.2"),
    "llama": (lambda: transformer("llama"), with_labels, "model.layers.2"),
    "vit": (lambda: transformer("vit"), lambda: inputs_of("vit", 4), "vit.layers.2"),
    "t5": (t5, with_labels, "decoder.block.0"),
    "mixtral": (mixture, with_labels, "model.layers.2"),
}


@pytest.mark.parametrize("name", CASES)
def test_real_models_over_real_workers(name: str) -> None:
    build, inputs, cut = CASES[name]
    torch.manual_seed(0)
    model, example = build(), inputs()
    reference = copy.deepcopy(model)
    if (config := getattr(reference, "config", None)) is not None:
        config.use_cache = False
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    with fxsplit.compile(model, CHAIN2, cuts=[cut]) as pipe:
        for training in (True, False):
            pipe.train(training)
            reference.train(training)
            found, expected = (tensors(run(*args, **kwargs)) for run in (pipe, reference))
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            if training:
                for outputs in (found, expected):
                    sum((o.square().mean() for o in outputs if o.requires_grad), torch.zeros(())).backward()
                if name == "t5":  # its embedding is used four times: the sums are in another order
                    gradients = pipe.gradients()
                    for key, parameter in reference.named_parameters():
                        assert parameter.grad is not None
                        error = (gradients[key] - parameter.grad).norm() / parameter.grad.norm()
                        assert error < 1e-5, f"{key}: {error}"
                else:
                    assert_same_gradients(pipe, reference)
        assert_same_state(pipe, reference)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
