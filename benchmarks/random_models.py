"""Models of random weights, built on the device in seconds: large shapes, and families at a modest real size.

A family's model is made to write text that says something about equality and about drafts. As transformers draws
initial weights, a model repeats one token, which no rounding can change. Here weights are large enough for the context
to matter, and the output prefers an alphabet of a few hundred tokens, so that n-grams come back and prompt lookup has
something to propose, some of it wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from stand_in import Shape
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config

PAD = 0
FIRST_TOKEN = 3  # of the alphabet; those before it are special
OTHER_LOGITS = 0.25  # how much smaller the scores of tokens outside the alphabet are


@dataclass(frozen=True)
class Size:
    """alphabet: how many tokens a text mostly consists of."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    expert_size: int
    vocab_size: int
    max_positions: int
    alphabet: int


SIZES = {
    "real": Size(2048, 5632, 16, 16, 8, 128, 8, 1024, 32000, 2048, 64),
    "tiny": Size(64, 96, 2, 4, 2, 16, 4, 32, 128, 256, 16),
}

FULL, SLIDING = "full_attention", "sliding_attention"

# Options beyond those of `family_config`, and `four_times` where the feed-forward part has no gate.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": dict(four_times=True),
    "gpt2": {},
    "opt": dict(four_times=True),
    "falcon": dict(alibi=False, new_decoder_architecture=True),
    "phi": dict(four_times=True),
    "stablelm": {},
    "cohere": {},
    "starcoder2": dict(four_times=True),
    "olmo2": {},
    "granite": {},
    "gemma2": dict(windows=True),
    "gemma3_text": dict(windows=True),
    "qwen2": {},
    "qwen3": {},
    "mixtral": dict(experts=True),
    "qwen3_moe": dict(experts=True),
    # Not in a run that names none: sixteen take one call.
    "llama": {},
    "mistral": {},
    "phi3": {},
    "gpt_oss": dict(experts=True, windows=True),
    "bloom": {},
}
DEFAULT_FAMILIES = tuple(FAMILIES)[:16]


def family_config(family: str, size: Size) -> PreTrainedConfig:
    """The family's configuration at this size. Embeddings are never tied: tied ones of random weights repeat tokens."""
    options = dict(FAMILIES[family])
    is_moe, windows, four_times = (options.pop(name, False) for name in ("experts", "windows", "four_times"))
    inner = 4 * size.hidden_size if four_times else size.intermediate_size
    common: dict[str, Any] = dict(
        vocab_size=size.vocab_size, hidden_size=size.hidden_size, num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads, num_key_value_heads=size.num_kv_heads, num_kv_heads=size.num_kv_heads,
        head_dim=size.head_dim, intermediate_size=size.expert_size if is_moe else inner, ffn_dim=inner,
        moe_intermediate_size=size.expert_size, num_experts=size.num_experts, num_local_experts=size.num_experts,
        num_experts_per_tok=2, word_embed_proj_dim=size.hidden_size, max_position_embeddings=size.max_positions,
        sliding_window=size.max_positions // 2, query_pre_attn_scalar=size.head_dim, tie_word_embeddings=False,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    if windows:
        common["layer_types"] = [(SLIDING, FULL)[index % 2] for index in range(size.num_layers)]
    config_class = CONFIG_MAPPING[family]
    known = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    return config_class(**{**{name: value for name, value in common.items() if name in known}, **options})


def built(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """A model with transformers' own random weights, never elsewhere than on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def random_family(
    family: str, size: Size, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> PreTrainedModel:
    """The family's model with weights as the head of this file says."""
    torch.manual_seed(seed)
    return varied(built(family_config(family, size), dtype, device), size, seed)


@torch.no_grad()
def varied(model: PreTrainedModel, size: Size, seed: int) -> PreTrainedModel:
    generator = torch.Generator(device=model.device).manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=model.device, dtype=parameter.dtype)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:
            spread = 1.0 if id(parameter) in embeddings else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(spread * noise)
    scores = model.get_output_embeddings().weight  # [vocab, hidden]
    scores[:FIRST_TOKEN] *= OTHER_LOGITS
    scores[FIRST_TOKEN + size.alphabet :] *= OTHER_LOGITS
    return model


def random_prompts(rows: int, columns: int, size: Size, device: torch.device | str, seed: int = 0) -> Tensor:
    """[rows, columns] int64 token ids of the alphabet."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_TOKEN, FIRST_TOKEN + size.alphabet, (rows, columns), generator=generator)
    return ids.to(device)


def random_qwen3(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """A Qwen3 of a large shape, for its cost alone."""
    config = Qwen3Config(
        hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size, max_position_embeddings=32768, tie_word_embeddings=False,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return built(config, dtype, device)
