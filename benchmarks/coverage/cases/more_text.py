"""More transformers models of text, in small configurations; dropout as the configurations have it."""

from __future__ import annotations

from typing import Any

from .base import Case
from .builders import DECODER, ENCODER, SEQUENCE_TO_SEQUENCE, text_case
from .inputs import tokens

_LANGUAGE = tokens("token")


def _encoder(name: str, cut: str, labels: str = "token", without: str = "", **config: Any) -> Case:
    """An encoder in the usual small configuration, some options of it left out."""
    kept = {option: value for option, value in ENCODER.items() if option not in without.split()}
    return text_case(name, "encoder", tokens(labels), cut, **{**kept, **config})


def _decoder(name: str, cut: str, family: str = "decoder", without: str = "", **config: Any) -> Case:
    """A decoder in the usual small configuration, some options of it left out."""
    kept = {option: value for option, value in DECODER.items() if option not in without.split()}
    return text_case(name, family, _LANGUAGE, cut, **{**kept, **config})


def _sequence_to_sequence(name: str, cut: str = "model.decoder.layers.0", **config: Any) -> Case:
    """A model of source and target text."""
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    options = {**SEQUENCE_TO_SEQUENCE, "max_position_embeddings": 64, **special, **config}
    return text_case(name, "encoder-decoder", _LANGUAGE, cut, **options)


_ENCODERS = (
    _encoder("CamembertForMaskedLM", "roberta.encoder.layer.1.attention.output"),
    _encoder("MPNetForMaskedLM", "mpnet.encoder.layer.2"),
    _encoder("RoFormerForMaskedLM", "roformer.encoder.layer.2"),
    _encoder("ConvBertForMaskedLM", "convbert.encoder.layer.2", embedding_size=32),
    _encoder("DebertaForSequenceClassification", "deberta.encoder.layer.2", "class"),
    _encoder("EsmForMaskedLM", "esm.encoder.layer.2", pad_token_id=1, mask_token_id=4),
    _encoder("LayoutLMForTokenClassification", "layoutlm.encoder.layer.2", "tag"),
    _encoder("MobileBertForMaskedLM", "mobilebert.encoder.layer.2", embedding_size=16, intra_bottleneck_size=16),
    _encoder("FNetForMaskedLM", "fnet.encoder.layer.2", without="num_attention_heads"),
    _encoder("SqueezeBertForMaskedLM", "transformer.encoder.layers.2.attention", embedding_size=32),
    _encoder("IBertForMaskedLM", "ibert.encoder.layer.2"),
    _encoder("MegatronBertForMaskedLM", "bert.encoder.layer.2"),
    _encoder("RemBertForMaskedLM", "rembert.encoder.layer.2", input_embedding_size=16, output_embedding_size=24),
    _encoder("LongformerForMaskedLM", "longformer.encoder.layer.2", attention_window=4, pad_token_id=1),
    text_case(
        "FunnelForMaskedLM",
        "encoder",
        _LANGUAGE,
        "funnel.decoder",
        vocab_size=128,
        block_sizes=[2, 2],
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
        num_decoder_layers=2,
    ),
    text_case(
        "XLNetLMHeadModel",
        "encoder",
        _LANGUAGE,
        "transformer.layer.2",
        vocab_size=128,
        d_model=32,
        n_layer=4,
        n_head=4,
        d_inner=64,
    ),
)

_SMALL_GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}

_DECODERS = (
    text_case("GPTJForCausalLM", "decoder", _LANGUAGE, "transformer.h.2", rotary_dim=4, **_SMALL_GPT, **_SPECIAL),
    text_case("GPTBigCodeForCausalLM", "decoder", _LANGUAGE, "transformer.h.2", **_SMALL_GPT, **_SPECIAL),
    text_case(
        "CodeGenForCausalLM", "decoder", _LANGUAGE, "transformer.h.2", rotary_dim=4, **_SMALL_GPT, **_SPECIAL
    ),
    text_case(
        "GPTNeoForCausalLM",
        "decoder",
        _LANGUAGE,
        "transformer.h.2",
        vocab_size=128,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=64,
        **_SPECIAL,
    ),
    text_case(
        "MptForCausalLM",
        "decoder",
        _LANGUAGE,
        "transformer.blocks.2",
        vocab_size=128,
        d_model=32,
        n_layers=4,
        n_heads=4,
        max_seq_len=64,
    ),
    _decoder("StableLmForCausalLM", "model.layers.2"),
    _decoder("Olmo2ForCausalLM", "model.layers.2"),
    _decoder("Phi3ForCausalLM", "model.layers.2"),
    _decoder("GraniteForCausalLM", "model.layers.2"),
    _decoder("CohereForCausalLM", "model.layers.2"),
    _decoder("Starcoder2ForCausalLM", "model.layers.2"),
    _decoder("Gemma2ForCausalLM", "model.layers.2", head_dim=8, sliding_window=4),
    _decoder("Gemma3ForCausalLM", "model.layers.2.mlp", head_dim=8, sliding_window=4),
    _decoder("GlmForCausalLM", "model.layers.2", head_dim=8),
    _decoder("NemotronForCausalLM", "model.layers.2.mlp"),
    _decoder("SmolLM3ForCausalLM", "model.layers.2"),
    text_case(
        "BioGptForCausalLM",
        "decoder",
        _LANGUAGE,
        "biogpt.layers.2",
        **ENCODER,
    ),
)

_ENCODER_DECODERS = (
    _sequence_to_sequence("MBartForConditionalGeneration"),
    _sequence_to_sequence("PegasusForConditionalGeneration", "model.encoder.layers.1"),
    _sequence_to_sequence("MarianMTModel", "model.decoder.layers.1"),
    _sequence_to_sequence("BlenderbotSmallForConditionalGeneration"),
    _sequence_to_sequence("M2M100ForConditionalGeneration", "model.decoder.layers.1.encoder_attn"),
    _sequence_to_sequence("LEDForConditionalGeneration", "led.decoder.layers.0", attention_window=4),
    text_case(
        "UMT5ForConditionalGeneration",
        "encoder-decoder",
        _LANGUAGE,
        "decoder.block.1",
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
)

_MIXTURE = "mixture of experts"

_MIXTURES = (
    _decoder(
        "Qwen2MoeForCausalLM",
        "model.layers.2",
        _MIXTURE,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    _decoder("OlmoeForCausalLM", "model.layers.2", _MIXTURE, num_experts=4, num_experts_per_tok=2),
    _decoder("GraniteMoeForCausalLM", "model.layers.2", _MIXTURE, num_local_experts=4),
    _decoder(
        "Qwen3MoeForCausalLM",
        "model.layers.2.mlp",
        _MIXTURE,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        output_router_logits=True,
    ),
    text_case(
        "SwitchTransformersForConditionalGeneration",
        _MIXTURE,
        _LANGUAGE,
        "decoder.block.0",
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        num_heads=4,
        decoder_start_token_id=0,
    ),
)

_STATE_SPACES = (
    text_case(
        "Mamba2ForCausalLM",
        "state space",
        _LANGUAGE,
        "backbone.layers.2",
        vocab_size=128,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=4,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        chunk_size=8,
        pad_token_id=0,
        **_SPECIAL,
    ),
    text_case(
        "FalconMambaForCausalLM",
        "state space",
        tokens("token", mask=False),
        "backbone.layers.2",
        vocab_size=128,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=4,
    ),
    text_case(
        "RwkvForCausalLM",
        "state space",
        tokens("token", mask=False),
        "rwkv.blocks.2",
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=4,
        context_length=64,
    ),
)

CASES = (*_ENCODERS, *_DECODERS, *_ENCODER_DECODERS, *_MIXTURES, *_STATE_SPACES)
