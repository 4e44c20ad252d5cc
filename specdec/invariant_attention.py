"""Attention and masks of batch-invariant models, for transformers' caches and for ours.

The mask that transformers hands to every layer is reduced to what the kernel needs: per query the interval of slots
it sees, and per row the slot of its first token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from specdec.attention import visible_slots
from specdec.errors import InputError, UnsupportedModelError
from specdec.invariant_guard import own_arithmetic
from specdec.kernels.ragged_attention import ragged_attention

INVARIANT = "specdec_invariant"


def span_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor | int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor:
    """[rows, 1, q_length, 3] int32: first visible slot, the slot behind the last, the slot of the row's first token.

    attention_mask: [rows, positions] bool, False for padding. Slot i holds position kv_offset + i.

    Raises InputError if what a query sees is no interval: the attention mask has holes.
    """
    assert mask_function is not None
    visible = visible_slots(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, device)[:, 0]
    origin = torch.full((batch_size, 1), -kv_offset, dtype=torch.int32, device=device)
    if attention_mask is not None:
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
        real = F.pad(attention_mask.bool(), (0, missing))
        visible = visible & real[:, None, kv_offset : kv_offset + kv_length]
        origin = origin + real.int().argmax(1, keepdim=True)
    count = visible.sum(-1, dtype=torch.int32)
    low = visible.int().argmax(-1).int()
    spans = torch.stack([low, low + count, origin.expand(-1, q_length).int()], -1)
    # One look at the first forward is enough, since later ones only append: no later step waits for the device.
    if attention_mask is not None and q_length > 1:
        slot = torch.arange(kv_length, device=device)
        if not torch.equal(visible, (slot >= spans[..., :1]) & (slot < spans[..., 1:2])):
            raise InputError("attention_mask has holes; batch-invariant attention needs the padding at the sides")
    return spans[:, None]


def invariant_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query [rows, heads, width, dim], key and value [rows, kv_heads, slots, dim] -> [rows, width, heads, value_dim]"""
    name = type(module).__name__
    if attention_mask is None or attention_mask.dtype != torch.int32 or attention_mask.shape[-1] != 3:
        raise UnsupportedModelError(f"{name} does not pass on the mask it is given; it cannot be made batch-invariant")
    if position_bias is not None:
        raise UnsupportedModelError(f"{name} adds a position bias to its scores, which has no batch-invariant kernel")
    if dropout:
        raise UnsupportedModelError(f"{name} applies dropout {dropout}; call model.eval() first")
    spans = attention_mask[:, 0].expand(len(query), -1, -1).contiguous()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.no_grad(), own_arithmetic():
        return ragged_attention(query, key, value, spans, scaling, softcap, s_aux), None


@cache
def register() -> None:
    """Make transformers know the above; once a process."""
    AttentionInterface.register(INVARIANT, invariant_attention)
    AttentionMaskInterface.register(INVARIANT, span_mask)
