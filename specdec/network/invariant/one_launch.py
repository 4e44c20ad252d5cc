"""A draft model's decode step as one launch: whether its model and device allow it, and the tensors that it reads.

Never a target's: the bits are not those of the model's modules (`kernels/persistent/step.py`). Served are llama-,
qwen2-, qwen3- and mistral-type models without biases outside of query, key and value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.cache import RaggedCache
from specdec.kernels.attention.rotary_write import HeadNorm
from specdec.kernels.dispatch import nvidia_capability, triton
from specdec.kernels.persistent.step import LayerTensors, PersistentStep, StepTensors, refusal
from specdec.network.known_classes import LLAMA_LIKE, is_known_class, windows

ROOMY_DEVICES = ((9, 0), (10, 0), (10, 3))  # 227 KB a program; most others have 99


def one_launch_step(
    model: PreTrainedModel, cache: RaggedCache, cos: Tensor, sin: Tensor, num_text_slots: int
) -> PersistentStep | None:
    """The step of a llama-like model over the cache's first rows, None where only the longer way serves.

    cos, sin: [slots, head_dim]. num_text_slots: no text is longer; rows that start there or later are padding.
    """
    if triton is None or not can_persist(model.device) or not is_known_class(model, LLAMA_LIKE):
        return None
    tensors = step_tensors(model, cache, cos, sin, num_text_slots)
    return PersistentStep(tensors) if tensors is not None and refusal(tensors) is None else None


def can_persist(device: torch.device) -> bool:
    """Whether a program may have the shared memory that the widest steps take."""
    return nvidia_capability(device) in ROOMY_DEVICES


def step_tensors(
    model: PreTrainedModel, cache: RaggedCache, cos: Tensor, sin: Tensor, num_text_slots: int
) -> StepTensors | None:
    """The weights where they lie and the cache; None for a model with biases that the kernel does not add."""
    parts, layers = model.model, []
    if model.lm_head.bias is not None:
        return None
    for layer, window, cached in zip(parts.layers, windows(model), cache.layers, strict=True):
        block, mlp = layer.self_attn, layer.mlp
        qkv = (block.q_proj, block.k_proj, block.v_proj)
        others = (block.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        biases = [linear.bias.detach() for linear in qkv if linear.bias is not None]
        if len(biases) not in (0, 3) or any(linear.bias is not None for linear in others):
            return None
        head_norm = None
        if hasattr(block, "q_norm"):
            weights = block.q_norm.weight.detach(), block.k_norm.weight.detach()
            head_norm = HeadNorm(*weights, block.q_norm.variance_epsilon)
        layers.append(
            LayerTensors(
                query=block.q_proj.weight.detach(),
                key=block.k_proj.weight.detach(),
                value=block.v_proj.weight.detach(),
                biases=tuple(biases) or None,
                out=block.o_proj.weight.detach(),
                gate=mlp.gate_proj.weight.detach(),
                up=mlp.up_proj.weight.detach(),
                down=mlp.down_proj.weight.detach(),
                attention_norm=layer.input_layernorm.weight.detach(),
                mlp_norm=layer.post_attention_layernorm.weight.detach(),
                head_norm=head_norm,
                window=window,
                keys=cached.keys,
                values=cached.values,
            )
        )
    return StepTensors(
        layers,
        embedding=parts.embed_tokens.weight.detach(),
        norm=parts.norm.weight.detach(),
        head=model.lm_head.weight.detach(),
        cos=cos,
        sin=sin,
        eps=parts.norm.variance_epsilon,
        scaling=parts.layers[0].self_attn.scaling,
        num_text_slots=num_text_slots,
    )
