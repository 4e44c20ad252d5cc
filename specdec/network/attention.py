"""Attention and masks that let a transformers model run its own modules over a `RaggedCache`.

Models that use transformers' attention interface are switched to the implementation "specdec_ragged", or to
"specdec_ragged_sdpa" if their own is "sdpa". The others choose their attention class by name, so there the stock
"eager" and "sdpa" mask functions are wrapped to understand one query offset per row; for any other cache the wrapped
functions are the stock ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)
from transformers.modeling_utils import AttentionInterface

from specdec.batch.columns import Columns

RAGGED = "specdec_ragged"
RAGGED_SDPA = "specdec_ragged_sdpa"

# transformers hands a mask function one offset per row, which is all that plain text needs; trees are found here.
_columns: ContextVar[Columns | None] = ContextVar("columns", default=None)


@contextmanager
def masks_of(columns: Columns) -> Iterator[None]:
    """Masks that are made inside are those of a forward over a ragged cache with these columns."""
    token = _columns.set(None if columns.is_chain else columns)
    try:
        yield
    finally:
        _columns.reset(token)


def tree_of_forward() -> Columns | None:
    """The columns of the forward that is running, None where they are plain text."""
    return _columns.get()


def visible_slots(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor | int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which slots each query sees, [rows, 1, q_length, kv_length] bool.

    q_offset: [rows] int64, the position of each row's first query. `mask_function(row, head, query, key)` is
    transformers' own (causal, sliding, chunked ...); its index arguments broadcast.
    """
    columns = tree_of_forward()
    if columns is None:
        if not isinstance(q_offset, Tensor):
            q_offset = torch.tensor(q_offset, device=device)
        columns = Columns.chain(q_offset.reshape(-1).expand(batch_size), q_length)
    return columns.mask_by(mask_function, kv_length, kv_offset)


def ragged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor | int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """The mask of a forward over a ragged cache; for any other (a concurrent call by the user) the stock mask."""
    if isinstance(q_offset, Tensor) and q_offset.dim() == 1:
        visible = visible_slots(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, device)
        if attention_mask is None:
            return visible
        # Rows that are padded on the left within the cache.
        return visible & attention_mask[:, None, None, kv_offset : kv_offset + kv_length].bool()
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )


def ragged_attention(
    module: torch.nn.Module,
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
    """query [rows, heads, width, dim], key and value [rows, kv_heads, slots, dim],
    mask [rows, 1 or heads, width, slots], bool or additive.

    Returns [rows, width, heads, value_dim]. Soft-capping, attention sinks (`s_aux`, [heads]) and additive position
    biases take the explicit path; everything else is one SDPA call with the queries of a key head packed together.
    """
    is_plain = softcap is None and s_aux is None and position_bias is None
    if attention_mask is None and is_plain:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, **kwargs)
    rows, num_heads, width, _ = query.shape
    if attention_mask is None:  # a concurrent call by the user, without a ragged cache
        attention_mask = query.new_ones(1, 1, width, key.shape[2], dtype=torch.bool)
        if kwargs.get("is_causal", getattr(module, "is_causal", True)):
            attention_mask = attention_mask.tril(key.shape[2] - width)
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    packed = query.reshape(rows, num_kv_heads, group * width, query.shape[-1])
    if is_plain:
        # One mask for all heads, or one per head if the model adds its own terms.
        mask_heads = 1 if attention_mask.shape[1] == 1 else num_kv_heads
        mask = attention_mask.expand(rows, mask_heads * group, width, -1).reshape(rows, mask_heads, group * width, -1)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
        return _heads_last(out.reshape(rows, num_heads, width, -1)), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (packed @ key.transpose(-1, -2)).view(rows, num_heads, width, -1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    scores = scores.masked_fill(~attention_mask, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(rows, -1, width, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    # Scores in half precision are summed in float32, as the stock eager attention does.
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = weights[..., : key.shape[2]].reshape(rows, num_kv_heads, group * width, -1)
    return _heads_last((weights @ value).view(rows, num_heads, width, -1)), None


def ragged_sdpa_attention(
    *args, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs
) -> tuple[Tensor, None]:
    """`ragged_attention` without the terms that transformers' own "sdpa" omits, as in Gemma 2 in transformers 5.17."""
    return ragged_attention(*args, **kwargs)


def _heads_last(out: Tensor) -> Tensor:
    """[rows, heads, width, dim] -> [rows, width, heads, dim], contiguous because some models `view` it."""
    return out.transpose(1, 2).contiguous()


def _understand_row_offsets(stock: Callable, additive: bool) -> Callable:
    @wraps(stock)
    def mask(*args, **kwargs):
        q_offset = kwargs.get("q_offset")
        if not isinstance(q_offset, Tensor) or q_offset.dim() == 0:
            return stock(*args, **kwargs)
        visible = ragged_mask(*args, **kwargs)
        assert visible is not None
        if not additive:
            return visible
        dtype = kwargs.get("dtype", torch.float32)
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    return mask


@cache
def register() -> None:
    """Register the above with transformers, once per process."""
    # The classmethods write the global mapping; assigning into ALL_* would only change the instance's local one.
    for name, function in ((RAGGED, ragged_attention), (RAGGED_SDPA, ragged_sdpa_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, ragged_mask)
    for name, additive in (("sdpa", False), ("eager", True)):
        AttentionMaskInterface.register(name, _understand_row_offsets(ALL_MASK_ATTENTION_FUNCTIONS[name], additive))


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run `model` with the attention implementation `name` and restore each submodel's own afterwards.

    Set on the configs directly: `set_attn_implementation` refuses models that choose their attention class once,
    when they are built, and these must still read the new name when they make their masks.
    """
    configs = configs_of(model)
    with _switch_lock:
        for config in configs:
            # Calls may overlap: the first in remembers the model's own implementation, the last out restores it.
            count, own = _switched.get(id(config), (0, config._attn_implementation_internal))
            _switched[id(config)] = (count + 1, own)
            config._attn_implementation_internal = name
    try:
        yield
    finally:
        with _switch_lock:
            for config in configs:
                count, own = _switched.pop(id(config))
                if count > 1:
                    _switched[id(config)] = (count - 1, own)
                else:
                    config._attn_implementation_internal = own


_switch_lock = threading.Lock()
_switched: dict[int, tuple[int, str | None]] = {}  # id of a config in use -> calls inside, its own implementation


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config from which some part of the model reads its attention implementation."""
    # The configs of all modules, because some models give their layers a copy of the model's config.
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    for config in list(configs.values()):
        for key in config.sub_configs:
            if (sub_config := getattr(config, key, None)) is not None:
                configs[id(sub_config)] = sub_config
    return list(configs.values())
