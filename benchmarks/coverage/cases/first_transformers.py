"""The first group's transformers models, in small configurations; dropout as the configurations have it."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from .base import Batch, Call, Case
from .builders import DECODER, ENCODER, SEQUENCE_TO_SEQUENCE, VISION, text_case, transformers_case
from .inputs import OTHER_LENGTH, padding_mask, pixels, spectrograms, token_ids, tokens

_LANGUAGE = tokens("token")
_CLASSES = tokens("class")

_ENCODERS = (
    text_case("BertForMaskedLM", "encoder", _LANGUAGE, "bert.encoder.layer.2", **ENCODER),
    text_case("RobertaForSequenceClassification", "encoder", _CLASSES, "roberta.encoder.layer.2", **ENCODER),
    text_case(
        "DistilBertForSequenceClassification",
        "encoder",
        _CLASSES,
        "distilbert.transformer.layer.2",
        vocab_size=128,
        dim=32,
        n_layers=4,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=64,
    ),
    text_case("AlbertForMaskedLM", "encoder", _LANGUAGE, "predictions", embedding_size=16, **ENCODER),
    text_case(
        "ElectraForSequenceClassification",
        "encoder",
        _CLASSES,
        "electra.encoder.layer.2",
        embedding_size=16,
        **ENCODER,
    ),
    text_case(
        "DebertaV2ForSequenceClassification",
        "encoder",
        _CLASSES,
        "deberta.encoder.layer.2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        **ENCODER,
    ),
    text_case("XLMRobertaForTokenClassification", "encoder", tokens("tag"), "roberta.encoder.layer.2", **ENCODER),
    text_case(
        "ModernBertForMaskedLM",
        "encoder",
        _LANGUAGE,
        "model.layers.2",
        pad_token_id=0,
        local_attention=8,
        **ENCODER,
    ),
)

_DECODERS = (
    text_case(
        "GPT2LMHeadModel",
        "decoder",
        _LANGUAGE,
        "transformer.h.2",
        vocab_size=128,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    text_case("GPTNeoXForCausalLM", "decoder", _LANGUAGE, "gpt_neox.layers.2", **ENCODER),
    text_case(
        "OPTForCausalLM",
        "decoder",
        _LANGUAGE,
        "model.decoder.layers.2",
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    *(
        text_case(f"{name}ForCausalLM", "decoder", _LANGUAGE, "model.layers.2", **DECODER, **more)
        for name, more in (
            ("Llama", {}),
            ("Mistral", {}),
            ("Qwen2", {}),
            ("Qwen3", {"head_dim": 8}),
            ("Phi", {}),
            ("Gemma", {"head_dim": 8}),
        )
    ),
    text_case(
        "FalconForCausalLM",
        "decoder",
        _LANGUAGE,
        "transformer.h.2",
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    ),
    text_case(
        "BloomForCausalLM",
        "decoder",
        _LANGUAGE,
        "transformer.h.2",
        vocab_size=128,
        hidden_size=32,
        n_layer=4,
        n_head=4,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    ),
)

_ENCODER_DECODERS = (
    text_case(
        "T5ForConditionalGeneration",
        "encoder-decoder",
        _LANGUAGE,
        "decoder.block.0",
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    text_case(
        "BartForConditionalGeneration",
        "encoder-decoder",
        _LANGUAGE,
        "model.decoder.layers.0",
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        **SEQUENCE_TO_SEQUENCE,
    ),
)

_SPEECH = (
    transformers_case(
        "WhisperForConditionalGeneration",
        "speech",
        spectrograms(bands=8, frames=40, labels=6),
        "model.decoder.layers.0",
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.1,
        **SEQUENCE_TO_SEQUENCE,
    ),
)

_VISION = (
    transformers_case(
        "ViTForImageClassification", "vision", pixels(), "vit.layers.2", hidden_dropout_prob=0.1, **VISION
    ),
    transformers_case(
        "SwinForImageClassification",
        "vision",
        pixels(),
        "swin.encoder.layers.1",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
)


def _clip() -> nn.Module:
    text = {**ENCODER, "num_hidden_layers": 2, "max_position_embeddings": 32}
    special = {"eos_token_id": 127, "bos_token_id": 1, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**text, **special}, vision_config={**VISION, "num_hidden_layers": 2}, projection_dim=16
    )
    model: nn.Module = transformers.CLIPModel(config)
    return model


def _captioned_images(batch: Batch) -> Call:
    ids = token_ids(batch)
    mask = padding_mask(ids)
    ids[:, -1] = 127  # the end of the text, whose state stands for it
    pictures = torch.randn(batch.samples, 3, 32, 32, generator=batch.generator())
    kwargs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures, "return_loss": True}
    return Call(kwargs=kwargs)


_MULTIMODAL = (Case("CLIPModel", "multimodal", _clip, _captioned_images, "text_model", OTHER_LENGTH),)

_MIXTURE = (
    text_case(
        "MixtralForCausalLM",
        "mixture of experts",
        _LANGUAGE,
        "model.layers.2",
        num_local_experts=4,
        **DECODER,
    ),
)

_STATE_SPACE = (
    text_case(
        "MambaForCausalLM",
        "state space",
        tokens("token", mask=False),
        "backbone.layers.2",
        vocab_size=128,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=4,
    ),
)

CASES = (
    *_ENCODERS,
    *_DECODERS,
    *_ENCODER_DECODERS,
    *_SPEECH,
    *_VISION,
    *_MULTIMODAL,
    *_MIXTURE,
    *_STATE_SPACE,
)
