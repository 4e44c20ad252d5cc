"""Attention and masks of batch-invariant models, for transformers' caches and for ours.

The mask that transformers hands to every layer is reduced to what the kernel needs: per query the interval of slots
it sees, and per row the slot of its first token. The nodes of a tree (`specdec/batch/columns.py`) see more than one
interval. torch's own attention serves them, while the text next to them keeps its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from specdec.errors import InputError, UnsupportedModelError
from specdec.kernels.attention.ragged_attention import ragged_attention
from specdec.network import attention
from specdec.network.attention import tree_of_forward, visible_slots
from specdec.network.invariant.guard import own_arithmetic

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
    """[rows, 1, q_length, 3] int32: first visible slot, the slot after the last, the slot of the row's first token.

    In a tree the last dimension is 3 + kv_length: then 1 for every slot that the query sees and 0 for the others.

    attention_mask: [rows, positions] bool, False for padding. Slot i holds position kv_offset + i.

    Raises InputError if a query sees more than one interval: the attention mask has holes.
    """
    assert mask_function is not None
    visible = visible_slots(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, device)[:, 0]
    origin = torch.full((batch_size, 1), -kv_offset, dtype=torch.int32, device=device)
    if attention_mask is not None:
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
        real = F.pad(attention_mask.bool(), (0, missing))
        visible = visible & real[:, None, kv_offset : kv_offset + kv_length]
        origin = origin + real.int().argmax(1, keepdim=True)
    spans = torch.cat([interval(visible), origin.expand(-1, q_length)[..., None].int()], -1)
    if tree_of_forward() is not None:
        return torch.cat([spans, visible.int()], -1)[:, None]
    slot = torch.arange(kv_length, device=device)
    # One look at the first forward is enough, since later ones only append: no later step waits for the device. Our own
    # caches, which have an offset per row, pad at the front alone.
    is_ours = isinstance(q_offset, Tensor) and q_offset.dim() == 1
    is_checked = attention_mask is not None and q_length > 1 and not is_ours
    if is_checked and not torch.equal(visible, (slot >= spans[..., :1]) & (slot < spans[..., 1:2])):
        raise InputError("attention_mask has holes; batch-invariant attention needs the padding at the sides")
    return spans[:, None]


def interval(visible: Tensor) -> Tensor:
    """[rows, queries, slots] bool -> [rows, queries, 2] int32: the first visible slot, and the one after the last."""
    low = visible.int().argmax(-1).int()
    return torch.stack([low, low + visible.sum(-1, dtype=torch.int32)], -1)


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
    tree = tree_of_forward()
    size = 3 if tree is None else 3 + key.shape[2]
    if attention_mask is None or attention_mask.dtype != torch.int32 or attention_mask.shape[-1] != size:
        raise UnsupportedModelError(f"{name} does not pass on the mask it is given; it cannot be made batch-invariant")
    if position_bias is not None:
        raise UnsupportedModelError(f"{name} adds a position bias to its scores, which has no batch-invariant kernel")
    if dropout:
        raise UnsupportedModelError(f"{name} applies dropout {dropout}; call model.eval() first")
    spans = attention_mask[:, 0].expand(len(query), -1, -1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_text = query.shape[2] if tree is None else tree.num_text
    text = spans[:, :num_text, :3].contiguous()
    with torch.no_grad(), own_arithmetic():
        out = ragged_attention(query[:, :, :num_text], key, value, text, scaling, softcap, s_aux)
    if tree is None:
        return out, None
    visible = spans[:, None, num_text:, 3:].bool()
    nodes, _ = attention.ragged_attention(
        module, query[:, :, num_text:], key, value, visible, 0.0, scaling, softcap, s_aux
    )
    return torch.cat([out, nodes], 1), None


@cache
def register() -> None:
    """Make transformers know the above; once a process."""
    AttentionInterface.register(INVARIANT, invariant_attention)
    AttentionMaskInterface.register(INVARIANT, span_mask)
