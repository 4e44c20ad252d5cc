"""The transformers classes whose forward is reimplemented here, and the check that an instance is one of them: by its
type and the types of its parts, with nothing replaced, hooked or attached.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

# Rotations that depend only on the position; "dynamic" and "longrope" also depend on the longest sequence.
STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn")
SILU, GELU_TANH = (nn.SiLU, SiLUActivation), (GELUTanh,)
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Family(NamedTuple):
    """The parts of a class's models.

    modeling, prefix: the module file of its parts and the prefix of their names. activations: of the gated MLP. norms:
    of a layer, not counting those of the heads; with four, the outputs of attention and MLP are normalised too.
    caps_scores, caps_logits: whether the class applies the config's soft-caps of attention scores and logits, if set.
    """

    modeling: ModuleType
    prefix: str
    activations: tuple[type[nn.Module], ...] = SILU
    norms: tuple[str, ...] = PRE_NORMS
    caps_scores: bool = False
    caps_logits: bool = False


LLAMA_LIKE: dict[type, Family] = {
    LlamaForCausalLM: Family(modeling_llama, "Llama"),
    MistralForCausalLM: Family(modeling_mistral, "Mistral"),
    Qwen2ForCausalLM: Family(modeling_qwen2, "Qwen2"),
    Qwen3ForCausalLM: Family(modeling_qwen3, "Qwen3"),
}
# Scaled embeddings, norms whose factor is 1 + weight.
GEMMA_LIKE: dict[type, Family] = {
    GemmaForCausalLM: Family(modeling_gemma, "Gemma", GELU_TANH),
    Gemma2ForCausalLM: Family(modeling_gemma2, "Gemma2", GELU_TANH, SANDWICH_NORMS, caps_scores=True, caps_logits=True),
    Gemma3ForCausalLM: Family(modeling_gemma3, "Gemma3", GELU_TANH, SANDWICH_NORMS, caps_logits=True),
}
# Llama-like, with a mixture of experts in place of the MLP of some layers or all.
MIXTURES: dict[type, Family] = {
    MixtralForCausalLM: Family(modeling_mixtral, "Mixtral"),
    Qwen3MoeForCausalLM: Family(modeling_qwen3_moe, "Qwen3Moe"),
}
FAMILIES = {**LLAMA_LIKE, **GEMMA_LIKE, **MIXTURES}
ONE_WINDOW = (MistralForCausalLM, *MIXTURES)  # in all layers, if any
EMBEDDINGS = (
    nn.Embedding,
    *(getattr(family.modeling, f"{family.prefix}TextScaledWordEmbedding") for family in GEMMA_LIKE.values()),
)
# The forwards at import time: a class whose forward is patched later is no longer known.
FORWARDS = {
    kind: kind.forward
    for kind in (nn.Linear, nn.Embedding, nn.SiLU, SiLUActivation, GELUTanh, *(
        kind for family in FAMILIES.values() for kind in vars(family.modeling).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    ))
}  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_known_class(model: PreTrainedModel, families: dict[type, Family]) -> bool:
    """Whether `model` is of one of these classes and has the parts that its class gives it."""
    if type(model) not in families or getattr(model.config, "use_bidirectional_attention", False):
        return False
    rope_type = model.model.rotary_emb.rope_type
    if not set(rope_type.values() if isinstance(rope_type, dict) else [rope_type]) <= set(STATIC_ROTATIONS):
        return False
    return isinstance(model.lm_head, nn.Linear) and all(is_known_layer(model, layer) for layer in model.model.layers)


def is_known_layer(model: PreTrainedModel, layer: Any) -> bool:
    """Whether a layer has the parts that it was built with, by their types."""
    family = FAMILIES[type(model)]
    module, prefix = family.modeling, family.prefix
    parts = {"self_attn": "Attention", **dict.fromkeys(family.norms, "RMSNorm")}
    if type(layer) is not getattr(module, f"{prefix}DecoderLayer"):
        return False
    if any(type(getattr(layer, part)) is not getattr(module, prefix + kind) for part, kind in parts.items()):
        return False
    block = layer.self_attn
    if not all(isinstance(linear, nn.Linear) for linear in (block.q_proj, block.k_proj, block.v_proj, block.o_proj)):
        return False
    if len(set(head_norm_eps(block))) > 1:
        return False
    return is_known_mixture(model, layer.mlp) if is_mixture(model, layer.mlp) else is_known_mlp(family, layer.mlp)


def is_known_mlp(family: Family, mlp: Any) -> bool:
    if type(mlp) is not getattr(family.modeling, f"{family.prefix}MLP", None):
        return False
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return all(isinstance(linear, nn.Linear) for linear in linears) and isinstance(mlp.act_fn, family.activations)


def is_mixture(model: PreTrainedModel, mlp: Any) -> bool:
    """Whether a layer's MLP is the mixture of experts of the model's class."""
    family = MIXTURES.get(type(model))
    return family is not None and type(mlp) is getattr(family.modeling, f"{family.prefix}SparseMoeBlock")


def is_known_mixture(model: PreTrainedModel, mlp: Any) -> bool:
    family = MIXTURES[type(model)]
    parts = {"gate": "TopKRouter", "experts": "Experts"}
    if any(
        type(getattr(mlp, part)) is not getattr(family.modeling, family.prefix + kind) for part, kind in parts.items()
    ):
        return False
    weights = (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj)
    return all(type(weight) is nn.Parameter for weight in weights) and isinstance(
        mlp.experts.act_fn, family.activations
    )


def head_norm_eps(block: Any) -> list[float]:
    """The eps of the norms of queries and keys, if there are any."""
    norms = [block.q_norm, block.k_norm] if hasattr(block, "q_norm") else []
    return [norm.eps if hasattr(norm, "eps") else norm.variance_epsilon for norm in norms]


def is_plain(module: nn.Module, may_be_replaced: bool = False) -> bool:
    """Whether there are no hooks (its own or global ones), no replaced forward (accelerate, PEFT, compile, patched
    classes), no parametrisation and no other kind of Linear."""
    if any(getattr(module, hooks) or getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in HOOKS):
        return False
    if FORWARDS.get(type(module), type(module).forward) is not type(module).forward or (
        "forward" in module.__dict__ and not may_be_replaced
    ):
        return False
    if module._compiled_call_impl is not None or hasattr(module, "parametrizations"):
        return False
    if isinstance(module, nn.Linear | nn.Embedding):
        # Quantisers replace the module by a subclass (bitsandbytes) or its weight by a subclass of Tensor (torchao).
        return type(module) in (nn.Linear, *EMBEDDINGS) and type(module.weight) is nn.Parameter
    # Anything that is not transformers' or torch's own may do things that this forward does not.
    return type(module).__module__.startswith(("transformers.models.", "transformers.activations", "torch.nn."))


def windows(model: PreTrainedModel) -> list[int | None]:
    """Each layer's sliding window, None for full attention."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if type(model) in ONE_WINDOW:
        return [window] * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]
