"""More transformers models of images, audio and several kinds of data, in small configurations."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from .base import Batch, Call, Case
from .builders import ENCODER, SEQUENCE_TO_SEQUENCE, VISION, transformers_case
from .inputs import OTHER_LENGTH, class_labels, padding_mask, pixels, token_ids


def _vision(name: str, cut: str, **config: Any) -> Case:
    return transformers_case(name, "vision", pixels(), cut, **config)


def _segmented(batch: Batch) -> Call:
    generator = batch.generator()
    pictures = torch.randn(batch.samples, 3, 32, 32, generator=generator)
    classes = torch.randint(0, 2, (batch.samples, 32, 32), generator=generator)
    return Call(kwargs={"pixel_values": pictures, "labels": classes})


_STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}

_VISION = (
    _vision("DeiTForImageClassification", "deit.layers.2", **VISION),
    _vision("BeitForImageClassification", "beit.layers.2", use_relative_position_bias=True, **VISION),
    _vision("Dinov2ForImageClassification", "dinov2.encoder.layer.2", **{**VISION, "mlp_ratio": 2}),
    _vision("ConvNextForImageClassification", "convnext.encoder.stages.2", drop_path_rate=0.1, **_STAGES),
    _vision("ResNetForImageClassification", "resnet.encoder.stages.2", embedding_size=16, **_STAGES),
    _vision("PoolFormerForImageClassification", "poolformer.encoder.block.2.1", **_STAGES),
    _vision(
        "Swinv2ForImageClassification",
        "swinv2.encoder.layers.1",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    transformers_case(
        "SegformerForSemanticSegmentation",
        "vision",
        _segmented,
        "decode_head",
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 32],
        decoder_hidden_size=16,
        num_attention_heads=[1, 2, 2, 4],
    ),
)

_AUDIO_LENGTH = 800


def _waveforms(batch: Batch) -> Call:
    """Sound, padded with zeros at its end in all but the first sample, and the text said in it."""
    generator = batch.generator()
    sound = torch.randn(batch.samples, batch.length or _AUDIO_LENGTH, generator=generator)
    mask = torch.ones(sound.shape, dtype=torch.long)
    mask[1:, -200:] = 0
    said = torch.randint(5, 32, (batch.samples, 3), generator=generator)
    return Call(kwargs={"input_values": sound * mask, "attention_mask": mask, "labels": said})


def _filter_banks(batch: Batch) -> Call:
    generator = batch.generator()
    features = torch.randn(batch.samples, 40, 8, generator=generator)
    mask = torch.ones(batch.samples, 40, dtype=torch.long)
    mask[1:, -8:] = 0
    said = torch.randint(5, 128, (batch.samples, 6), generator=generator)
    return Call(kwargs={"input_features": features, "attention_mask": mask, "labels": said})


_SPEECH_ENCODER = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_length": 4,
}

_SPEECH = (
    *(
        transformers_case(name, "speech", _waveforms, cut, other_length=640, **_SPEECH_ENCODER, **more)
        for name, cut, more in (
            ("Wav2Vec2ForCTC", "wav2vec2.encoder.layers.2", {}),
            ("HubertForCTC", "hubert.encoder.layers.2", {"apply_spec_augment": False}),
            ("WavLMForCTC", "wavlm.encoder.layers.2", {"apply_spec_augment": False, "layerdrop": 0.0}),
        )
    ),
    transformers_case(
        "Speech2TextForConditionalGeneration",
        "speech",
        _filter_banks,
        "model.decoder.layers.0",
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=64,
        decoder_start_token_id=2,
        **SEQUENCE_TO_SEQUENCE,
    ),
)

_TEXT_TOWER = {**ENCODER, "num_hidden_layers": 2}
_VISION_TOWER = {**VISION, "num_hidden_layers": 2}


def _model(name: str, config: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, name)(config)
    return model


def _siglip() -> nn.Module:
    config = transformers.SiglipConfig(text_config=_TEXT_TOWER, vision_config=_VISION_TOWER)
    return _model("SiglipModel", config)


def _blip() -> nn.Module:
    text = {**_TEXT_TOWER, "encoder_hidden_size": 32, "projection_dim": 16, "bos_token_id": 1, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config={**text, "sep_token_id": 2, "eos_token_id": 2},
        vision_config=_VISION_TOWER,
        projection_dim=16,
        image_text_hidden_size=16,
    )
    return _model("BlipForImageTextRetrieval", config)


def _dual_encoder() -> nn.Module:
    config = transformers.VisionTextDualEncoderConfig(
        vision_config=transformers.ViTConfig(**_VISION_TOWER).to_dict(),
        text_config=transformers.BertConfig(**_TEXT_TOWER).to_dict(),
        projection_dim=16,
    )
    return _model("VisionTextDualEncoderModel", config)


def _clipseg() -> nn.Module:
    special = {"eos_token_id": 127, "bos_token_id": 1, "pad_token_id": 0}
    config = transformers.CLIPSegConfig(
        text_config={**_TEXT_TOWER, **special},
        vision_config=_VISION_TOWER,
        projection_dim=16,
        extract_layers=[0, 1],
        reduce_dim=16,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=32,
    )
    return _model("CLIPSegForImageSegmentation", config)


def _images_and_text(batch: Batch, mask: bool = True, **more: Any) -> Call:
    ids = token_ids(batch)
    kwargs = {"input_ids": ids, "attention_mask": padding_mask(ids)} if mask else {"input_ids": ids}
    pictures = torch.randn(batch.samples, 3, 32, 32, generator=batch.generator())
    return Call(kwargs={**kwargs, "pixel_values": pictures, **more})


def _questions(batch: Batch) -> Call:
    answers = torch.nn.functional.one_hot(class_labels(batch), 2).float()
    return _images_and_text(batch, labels=answers)


def _pairs_with_loss(batch: Batch) -> Call:
    return _images_and_text(batch, return_loss=True)


_MULTIMODAL = (
    Case(
        "SiglipModel",
        "multimodal",
        _siglip,
        lambda batch: _images_and_text(Batch(batch.samples, length=64), mask=False, return_loss=True),
        "text_model.encoder.layers.1",
    ),
    Case("BlipForImageTextRetrieval", "multimodal", _blip, _images_and_text, "text_encoder", OTHER_LENGTH),
    Case("VisionTextDualEncoder", "multimodal", _dual_encoder, _pairs_with_loss, "text_model", OTHER_LENGTH),
    Case("CLIPSegForImageSegmentation", "multimodal", _clipseg, _images_and_text, "decoder", OTHER_LENGTH),
    transformers_case(
        "ViltForQuestionAnswering",
        "multimodal",
        _questions,
        "vilt.encoder.layer.2",
        other_length=OTHER_LENGTH,
        max_position_embeddings=64,
        vocab_size=128,
        num_labels=2,
        **VISION,
    ),
)

CASES = (*_VISION, *_SPEECH, *_MULTIMODAL)
