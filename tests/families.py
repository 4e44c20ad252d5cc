"""Tiny random models, one entry per model family of transformers, each with the features that its family is known for:
windows and chunks shorter than the generated text, several layer types, grouped heads, shared caches, sinks, biases.

`SERVED` must equal plain greedy decoding, `REFUSED` must raise the given words. Both are read by test_families.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

VOCAB = 97
WINDOW = 7  # shorter than any prompt with its continuation
FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"

# Every family takes those of these options that its config has.
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=False, is_decoder=True,
    use_cache=True, pad_token_id=0, bos_token_id=1, eos_token_id=None, sliding_window=WINDOW, use_sliding_window=True,
    num_experts=4, n_routed_experts=4, num_local_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_k=2,
    moe_intermediate_size=24, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_expand=2,
    encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4,
    decoder_attention_heads=4, scale_embedding=False,
)  # fmt: skip

MIXED = dict(layer_types=[SLIDING, FULL, SLIDING])
LATENT = dict(num_key_value_heads=4)  # latent attention has as many key heads as query heads
SHARED_KV = dict(
    num_hidden_layers=4, layer_types=[SLIDING, FULL, SLIDING, FULL], num_kv_shared_layers=2,
    vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
SMALL_TEXT = {
    name: COMMON[name]
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    )
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

DENSE: dict[str, dict] = {
    "llama": {},
    "qwen2": dict(layer_types=[FULL, SLIDING, FULL]),
    "qwen3": dict(layer_types=[FULL, SLIDING, FULL]),
    "mistral": {},
    "ministral": MIXED,
    "ministral3": {},
    "phi": {},
    "phi3": {},
    "gemma": {},
    "gemma2": dict(MIXED, attn_logit_softcapping=2.0, final_logit_softcapping=10.0),
    "gemma3_text": MIXED,
    "gemma3n_text": dict(
        SHARED_KV, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]
    ),
    "gemma4_text": SHARED_KV,
    "vaultgemma": dict(MIXED, attn_logit_softcapping=2.0),
    "starcoder2": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "granite": {},
    "cohere": {},
    "cohere2": MIXED,
    "glm": {},
    "glm4": {},
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "stablelm": {},
    "nemotron": {},
    "helium": {},
    "exaone4": dict(sliding_window_pattern=2),
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "arcee": {},
    "apertus": {},
    "llama4_text": dict(
        layer_types=[CHUNKED, FULL, CHUNKED], attention_chunk_size=WINDOW, no_rope_layers=[1, 0, 1], moe_layers=[1]
    ),
    "gpt2": {},
    "gpt_bigcode": dict(multi_query=True),
    "gpt_neox": {},
    "opt": {},
    "biogpt": {},
    "persimmon": {},
    "diffllama": {},
    "bitnet": {},
    "ctrl": {},
    "doge": dict(keep_window_size=WINDOW),
    "cwm": dict(layer_types=[SLIDING, FULL, SLIDING]),
    "jais2": {},
    "minicpm3": LATENT,
    "modernbert-decoder": {},
    "nanochat": {},
    "youtu": LATENT,
    "bert": {},
}

MOE: dict[str, dict] = {
    "mixtral": {},
    "gpt_oss": MIXED,
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "flex_olmo": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "dots1": dict(layer_types=[FULL, SLIDING, FULL]),
    "ernie4_5_moe": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "hunyuan_v1_moe": {},
    "phimoe": {},
    "jetmoe": {},
    "minimax_m2": {},
    "aria_text": {},
    "afmoe": {},
    "exaone_moe": dict(sliding_window_pattern=2),
    "cohere2_moe": MIXED,
}

# Their attention does not go through transformers' attention interface.
OWN_ATTENTION: dict[str, dict] = {
    "gptj": dict(rotary_dim=4),
    "codegen": dict(rotary_dim=4),
    "bloom": {},
    "mpt": {},
    "xglm": {},
    "falcon": dict(alibi=False, new_decoder_architecture=True),
    "falcon_alibi": dict(alibi=True, new_decoder_architecture=False),
}

# Checkpoints that also see or hear, given text alone.
MULTIMODAL: dict[str, dict] = {
    "llava": dict(
        text_config=dict(model_type="llama", **SMALL_TEXT),
        vision_config=dict(model_type="clip_vision_model", **VISION), image_token_index=96,
    ),
    "mistral3": dict(
        text_config=dict(model_type="mistral", sliding_window=WINDOW, **SMALL_TEXT),
        vision_config=dict(model_type="pixtral", **VISION), image_token_index=96,
    ),
    "gemma3": dict(
        text_config=dict(SMALL_TEXT, head_dim=8, sliding_window=WINDOW, **MIXED),
        vision_config=VISION, image_token_index=96, mm_tokens_per_image=4,
    ),
    "qwen2_vl": dict(
        text_config=dict(SMALL_TEXT, rope_parameters=MROPE),
        vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=8),
        image_token_id=96, video_token_id=95, vision_start_token_id=94,
    ),
    "qwen2_5_vl": dict(
        text_config=dict(SMALL_TEXT, rope_parameters=MROPE),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, out_hidden_size=32,
            fullatt_block_indexes=[0],
        ),
        image_token_id=96, video_token_id=95, vision_start_token_id=94,
    ),
    "qwen3_vl": dict(
        text_config=dict(SMALL_TEXT, head_dim=8, rope_parameters=MROPE),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, out_hidden_size=32,
            deepstack_visual_indexes=[0], num_position_embeddings=16,
        ),
        image_token_id=96, video_token_id=95, vision_start_token_id=94,
    ),
    "mllama": dict(
        text_config=dict(SMALL_TEXT, cross_attention_layers=[1]),
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_global_layers=1, attention_heads=2,
            image_size=16, patch_size=8, vision_output_dim=64, intermediate_layers_indices=[0],
        ),
    ),
    "llama4": dict(
        text_config=dict(
            SMALL_TEXT, head_dim=8, layer_types=[CHUNKED, FULL, CHUNKED], attention_chunk_size=WINDOW,
            no_rope_layers=[1, 0, 1], num_local_experts=2, moe_layers=[1], intermediate_size_mlp=48,
        ),
        vision_config=dict(VISION, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
        image_token_index=96,
    ),
    "chameleon": dict(SMALL_TEXT, vq_config=dict(
        embed_dim=8, num_embeddings=8, latent_channels=8, base_channels=32, resolution=16, channel_multiplier=[1],
        num_res_blocks=1,
    ), vocabulary_map={"<image>": 96, **{f"IMGIMG{letter}BZ": 80 + i for i, letter in enumerate("ABCDEFGH")}}),
    "idefics3": dict(
        text_config=dict(model_type="llama", **SMALL_TEXT), vision_config=VISION, image_token_id=96, scale_factor=1
    ),
}  # fmt: skip

RECURRENT = "keeps recurrent state"
ENCODER_DECODER = "encoder-decoder"
BIDIRECTIONAL = "is_decoder=False"
ONE_LENGTH = "one length per batch; pass layout='repad'"
OTHER_LOGITS = "gives other logits over a ragged cache"
NOTHING_CACHED = "keeps no keys and values in its cache"
MORE_STATE = "caches more than keys and values"
OWN_WINDOW = "slides a window over its cache but not over its masks"
CRASHES = "cannot run over a ragged cache"

# family: (words of the refusal, options)
REFUSED: dict[str, tuple[str, dict]] = {
    "gpt_neo": (ONE_LENGTH, dict(num_hidden_layers=2, attention_types=[[["global", "local"], 1]], window_size=WINDOW)),
    "mamba": (RECURRENT, {}),
    "mamba2": (RECURRENT, dict(num_heads=4, head_dim=16, expand=2, state_size=8, n_groups=1)),
    "falcon_mamba": (RECURRENT, {}),
    "recurrent_gemma": (RECURRENT, {}),
    "falcon_h1": (RECURRENT, dict(mamba_d_ssm=64)),
    "qwen3_next": (RECURRENT, {}),
    "qwen3_5_text": (RECURRENT, {}),
    "jamba": (RECURRENT, {}),
    "minimax": (RECURRENT, {}),
    "bamba": (RECURRENT, dict(attn_layer_indices=[1])),
    "granitemoehybrid": (RECURRENT, dict(layer_types=[LINEAR, FULL, LINEAR])),
    "zamba2": (RECURRENT, dict(layers_block_type=[LINEAR, "hybrid", LINEAR])),
    "nemotron_h": (RECURRENT, {}),
    "olmo_hybrid": (RECURRENT, {}),
    "rwkv": (RECURRENT, {}),
    "lfm2": (RECURRENT, dict(layer_types=["conv", FULL, "conv"])),
    "xlstm": (RECURRENT, {}),
    "bert_encoder": (BIDIRECTIONAL, dict(is_decoder=False)),
    "electra_encoder": (BIDIRECTIONAL, dict(is_decoder=False)),
    "t5": (ENCODER_DECODER, dict(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4)),
    "bart": (ENCODER_DECODER, dict(forced_eos_token_id=None)),
    "deepseek_v32": (MORE_STATE, LATENT),
    "minimax_m3_vl_text": (MORE_STATE, dict(layer_types=[FULL, "minimax_m3_sparse", FULL])),
    "moshi": (OWN_WINDOW, {}),
    "openai-gpt": (NOTHING_CACHED, {}),
    "xlm": ("use transformers' own generate", {}),  # its `cache` is of a kind of its own
    "roberta": (OTHER_LOGITS, {}),
    "roformer": (OTHER_LOGITS, {}),
    "paligemma": (OTHER_LOGITS, dict(
        text_config=dict(model_type="gemma", head_dim=8, **SMALL_TEXT),
        vision_config=dict(model_type="siglip_vision_model", **VISION), image_token_index=96, projection_dim=32,
    )),
    "gpt_neox_japanese": (CRASHES, {}),
    "cpmant": (CRASHES, dict(dim_head=8)),
}  # fmt: skip

# family: the versions of transformers whose own plain decoding of it fails or is wrong.
BROKEN = {"doge": "<5.18", "llama4": "==5.24.0"}

SERVED = {**DENSE, **MOE, **OWN_ATTENTION, **MULTIMODAL}
MODEL_TYPES = {"falcon_alibi": "falcon", "bert_encoder": "bert", "electra_encoder": "electra"}


def is_known(family: str) -> bool:
    """Whether the installed transformers has the family."""
    return MODEL_TYPES.get(family, family) in CONFIG_MAPPING


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The family's tiny model with random weights, in float32. `changes` are options of its config."""
    options = {**(SERVED[family] if family in SERVED else REFUSED[family][1]), **changes}
    config_class = CONFIG_MAPPING[MODEL_TYPES.get(family, family)]
    known = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    config = config_class(**{**{name: value for name, value in COMMON.items() if name in known}, **options})
    if config.is_encoder_decoder:
        auto_class = AutoModelForSeq2SeqLM
    else:
        sees = "vision_config" in options or "vq_config" in options
        auto_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return randomise(auto_class.from_config(config, dtype=torch.float32).eval(), seed)


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random norms, biases and sinks too, and matrices of a scale that keeps the output from repeating itself.

    Initial values as transformers draws them leave whole features (zero biases, unit norms) without an effect.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.2 * noise)
        else:
            spread = 1.0 if id(parameter) in embeddings else 2.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(spread * noise)
    return model
