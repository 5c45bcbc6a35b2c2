"""Small real models for the tests, with their inputs."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model with every dropout switched off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def mobilenet() -> nn.Module:
    """MobileNetV2 for ten classes, dropout off."""
    torch.manual_seed(0)
    return without_dropout(torchvision.models.mobilenet_v2(num_classes=10))


def images(samples: int, size: int = 32) -> Tensor:
    """Random images."""
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(samples))


TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def transformer(name: str, dropout: float = 0.0) -> nn.Module:
    """A small model of transformers, by its family's name."""
    import transformers as t

    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if name == "bert":
        return t.BertForMaskedLM(t.BertConfig(**TINY, **rates))  # type: ignore[no-any-return]
    if name == "roberta":
        return t.RobertaForSequenceClassification(t.RobertaConfig(**TINY, **rates))  # type: ignore[no-any-return]
    if name == "gpt2":
        drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        return t.GPT2LMHeadModel(  # type: ignore[no-any-return]
            t.GPT2Config(vocab_size=128, n_embd=32, n_layer=4, n_head=4, n_positions=64, **drop)
        )
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**TINY, num_key_value_heads=2))  # type: ignore[no-any-return]
    if name == "vit":
        sizes = {"image_size": 32, "patch_size": 8}
        config = t.ViTConfig(
            **{k: v for k, v in TINY.items() if k.startswith(("hidden", "num", "inter"))}, **sizes, **rates
        )
        return t.ViTForImageClassification(config)  # type: ignore[no-any-return]
    raise ValueError(name)


def tokens(samples: int, length: int = 12, padded: bool = True) -> dict[str, Tensor]:
    """Token ids and a padding mask."""
    generator = torch.Generator().manual_seed(samples)
    ids = torch.randint(5, 128, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[::2, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(name: str, samples: int) -> dict[str, Any]:
    """Inputs for a model of `transformer`."""
    return {"pixel_values": images(samples)} if name == "vit" else dict(tokens(samples))
