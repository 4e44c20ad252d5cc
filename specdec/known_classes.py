"""The classes of transformers whose forward is written out here a second time, and how an instance shows that it is one
of them: by its type and the types of its parts, with nothing replaced, hooked or attached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

# Rotations that depend on the position alone; "dynamic" and "longrope" also depend on the longest sequence.
STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn")
FAMILIES = {
    LlamaForCausalLM: (modeling_llama, "Llama"),
    MistralForCausalLM: (modeling_mistral, "Mistral"),
    Qwen2ForCausalLM: (modeling_qwen2, "Qwen2"),
    Qwen3ForCausalLM: (modeling_qwen3, "Qwen3"),
}
# What the modules computed when this was imported: a class whose forward is patched later is known no more.
FORWARDS = {
    kind: kind.forward
    for kind in (nn.Linear, nn.Embedding, nn.SiLU, SiLUActivation, *(
        kind for module, _ in FAMILIES.values() for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    ))
}  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_known_class(model: PreTrainedModel) -> bool:
    """Whether a layer of `model` computes what this file's does."""
    if type(model) not in FAMILIES or model.model.rotary_emb.rope_type not in STATIC_ROTATIONS:
        return False
    return isinstance(model.lm_head, nn.Linear) and all(is_known_layer(model, layer) for layer in model.model.layers)


def is_known_layer(model: PreTrainedModel, layer: Any) -> bool:
    """Whether a layer has the parts that it was built with, by their types."""
    module, name = FAMILIES[type(model)]
    parts = {
        "self_attn": "Attention",
        "mlp": "MLP",
        "input_layernorm": "RMSNorm",
        "post_attention_layernorm": "RMSNorm",
    }
    if type(layer) is not getattr(module, f"{name}DecoderLayer"):
        return False
    if any(type(getattr(layer, part)) is not getattr(module, name + kind) for part, kind in parts.items()):
        return False
    block, mlp = layer.self_attn, layer.mlp
    linears = (block.q_proj, block.k_proj, block.v_proj, block.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not all(isinstance(linear, nn.Linear) for linear in linears):
        return False
    return isinstance(mlp.act_fn, nn.SiLU | SiLUActivation) and len(set(head_norm_eps(block))) <= 1


def head_norm_eps(block: Any) -> list[float]:
    """Of the norms of queries and keys, where there are such."""
    return [block.q_norm.variance_epsilon, block.k_norm.variance_epsilon] if hasattr(block, "q_norm") else []


def is_plain(module: nn.Module, may_be_replaced: bool = False) -> bool:
    """No hooks, its own or all modules', no replaced forward (accelerate, PEFT, compile; patched classes), no
    parametrisation, no Linear of another kind."""
    if any(getattr(module, hooks) or getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in HOOKS):
        return False
    if FORWARDS.get(type(module), type(module).forward) is not type(module).forward or (
        "forward" in module.__dict__ and not may_be_replaced
    ):
        return False
    if module._compiled_call_impl is not None or hasattr(module, "parametrizations"):
        return False
    if isinstance(module, nn.Linear | nn.Embedding):
        # Quantisers replace the module by a subclass (bitsandbytes) or its weight by one of Tensor (torchao).
        return type(module) in (nn.Linear, nn.Embedding) and type(module.weight) is nn.Parameter
    # Anything that is not transformers' or torch's own may do what this forward does not.
    return type(module).__module__.startswith(("transformers.models.", "transformers.activations", "torch.nn."))


def windows(model: PreTrainedModel) -> list[int | None]:
    """Each layer's sliding window, None for full attention."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if type(model) is MistralForCausalLM:
        return [window] * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]
