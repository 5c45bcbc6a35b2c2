"""Shorthands that make cases of torchvision and transformers models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision
import transformers
from torch import nn
from torchvision.models.video.mvit import MViT

from .base import Case, Inputs
from .inputs import OTHER_LENGTH, images

ENCODER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DECODER = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQUENCE_TO_SEQUENCE = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def vision_case(
    name: str,
    cut: str,
    *,
    family: str = "classification",
    size: int = 64,
    inputs: Inputs | None = None,
    function: Callable[..., nn.Module] | None = None,
    **options: Any,
) -> Case:
    """A case of a torchvision model, by default a classifier of that name."""
    make = function or getattr(torchvision.models, name)
    return Case(name, family, lambda: make(weights=None, **options), inputs or images(size), cut)


def transformers_model(name: str, **config: Any) -> nn.Module:
    """A transformers model of that class with random weights."""
    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**config))
    return model


def transformers_case(
    name: str, family: str, inputs: Inputs, cut: str, *, other_length: int | None = None, **config: Any
) -> Case:
    """A case of a transformers model in a small configuration."""
    return Case(name, family, lambda: transformers_model(name, **config), inputs, cut, other_length)


def text_case(name: str, family: str, inputs: Inputs, cut: str, **config: Any) -> Case:
    """The same for a model of tokens, which is tried at another length too."""
    return transformers_case(name, family, inputs, cut, other_length=OTHER_LENGTH, **config)


def small_mvit(**config: Any) -> Callable[[None], nn.Module]:
    """The class behind torchvision's mvit models, which are fixed to 16 frames of 224 pixels, smaller."""

    def make(weights: None = None) -> nn.Module:
        model: nn.Module = MViT(
            spatial_size=(32, 32),
            temporal_size=4,
            residual_with_cls_embed=False,
            stochastic_depth_prob=0.2,
            num_classes=10,
            **config,
        )
        return model

    return make
