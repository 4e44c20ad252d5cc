"""Attention of a ragged batch with the same arithmetic for prefill, decoding one token and verifying several.

Every query sees an interval of its row's slots. Keys are read in tiles of BLOCK_KEYS and in splits of SPLIT_KEYS. Their
boundaries are positions in the row's own text, counted from its first token, wherever that token is stored: neither
left padding nor the length of other rows moves them. The splits of a query are merged in ascending order. A tile of
which a query sees nothing does not change the query's numbers, so its result depends only on the query and its keys.

In a tree, a query sees some of the step's own slots and not others (`Tree`). A hidden key scores -inf: it does not
affect the maximum, its weight is exp(-inf) = 0, and 0 times its value adds 0. So no bit depends on its content, as long
as that is finite. A chain written as a tree has the bits of the chain, and so has every query that sees its whole span.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.dispatch import triton, uses_triton
from specdec.kernels.overlap import overlap_options

if triton is not None:
    import triton.language as tl

    from specdec.kernels.overlap import wait_for_previous_kernel

# All four are part of the arithmetic: another value gives other bits.
BLOCK_QUERIES = 64  # (query, head of the group) pairs per program
BLOCK_KEYS = 64
SPLIT_KEYS = 256
NUM_WARPS = 4
TREE_SLOTS = 64  # slots per step: the bits of a mask
MAX_WORKSPACE = 1 << 28  # bytes of partial results; wider forwards run in pieces


class Tree(NamedTuple):
    """Hides some of a step's own slots.

    starts: [rows] int64, the first of each row's own slots in this step; earlier slots are seen as the spans say.
    mask: [rows, width] int64, contiguous: of its span's slots from starts[b] on, a query sees starts[b] + i if bit i is
    set, and none from starts[b] + 64 on.
    """

    starts: Tensor
    mask: Tensor


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tree: Tree | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Softmax attention, [rows, width, heads, value_dim].

    query: [rows, heads, width, dim]. key: [rows, kv_heads, slots, dim], value: [rows, kv_heads, slots, value_dim];
    any strides except that the last dimension is dense. spans: [rows, width, 3] int32, contiguous: the first slot that
    a query sees, the slot after the last, and the slot of the row's first token (negative if that was evicted), one per
    row. A query with an empty span gives zeros. softcap: scores become softcap * tanh(score / softcap). sinks: [heads],
    a score per head that takes part in the softmax and has no value. tree: hides some of the slots in the spans.
    """
    rows, num_heads, width, dim = query.shape
    if key.shape[0] != rows or value.shape[:3] != key.shape[:3] or key.shape[3] != dim:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit")
    if num_heads % key.shape[1]:
        raise ValueError(f"{num_heads} heads are not a multiple of {key.shape[1]} key heads")
    if spans.shape != (rows, width, 3) or spans.dtype != torch.int32 or not spans.is_contiguous():
        raise ValueError(f"spans is {list(spans.shape)} {spans.dtype}; need contiguous [{rows}, {width}, 3] int32")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}; cast them to one dtype")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks {list(sinks.shape)} does not fit {num_heads} heads")
    if tree is not None:
        if tree.mask.shape != (rows, width) or tree.mask.dtype != torch.int64 or not tree.mask.is_contiguous():
            raise ValueError(
                f"mask is {list(tree.mask.shape)} {tree.mask.dtype}; need contiguous [{rows}, {width}] int64"
            )
        if tree.starts.shape != (rows,) or tree.starts.dtype != torch.int64 or not tree.starts.is_contiguous():
            raise ValueError(f"starts is {list(tree.starts.shape)} {tree.starts.dtype}; need contiguous [{rows}] int64")
    if not uses_triton(implementation, query):
        return ragged_attention_reference(query, key, value, spans, scaling, softcap, sinks, tree)
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    return _ragged_attention_triton(query, key, value, spans, scaling, softcap, sinks, tree)


def ragged_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tree: Tree | None = None,
) -> Tensor:
    """The same contract in plain torch: every query alone over a copy of the keys and values it sees."""
    rows, num_heads, width, dim = query.shape
    num_kv_heads = key.shape[1]
    out = value.new_zeros(rows, width, num_heads, value.shape[3])
    wide = torch.promote_types(query.dtype, torch.float32)
    for row, row_spans in enumerate(spans.tolist()):
        for column, (begin, end, _) in enumerate(row_spans):
            slots = torch.arange(begin, max(begin, end), device=key.device)
            if tree is not None:
                slots = slots[is_shown(tree.mask[row, column], slots - tree.starts[row])]
            if not len(slots):
                continue
            keys, values = (x[row].index_select(1, slots).to(wide) for x in (key, value))
            queries = query[row, :, column].reshape(num_kv_heads, -1, dim).to(wide, copy=True)
            scores = (queries @ keys.transpose(1, 2) * scaling).view(num_heads, len(slots))
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(wide)[:, None]], 1)
            weights = torch.softmax(scores, 1)[:, : len(slots)].reshape(num_kv_heads, -1, len(slots))
            out[row, column] = (weights @ values).view(num_heads, -1).to(out.dtype)
    return out


def is_shown(mask: Tensor, own: Tensor) -> Tensor:
    """Whether masks show slots, given their distances `own` from the first own slot (negative: before it).

    Shapes broadcast, int64 both.
    """
    return (own < 0) | ((own < TREE_SLOTS) & (mask >> own.clamp(0, TREE_SLOTS - 1) & 1).bool())


def _ragged_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    tree: Tree | None,
) -> Tensor:
    rows, num_heads, width, dim = query.shape
    num_kv_heads, num_slots, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group = num_heads // num_kv_heads
    if group > BLOCK_QUERIES:
        raise ValueError(f"{group} heads per key head exceed {BLOCK_QUERIES}")
    out = torch.empty(rows, width, num_heads, value_dim, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    if not num_slots:
        return out.zero_()
    # The first slot may lie anywhere within its split.
    num_splits = triton.cdiv(num_slots - 1, SPLIT_KEYS) + 1
    bytes_per_query = 4 * rows * num_heads * num_splits * (value_dim + 2)
    step = min(width, max(1, MAX_WORKSPACE // bytes_per_query))
    block_dim = max(16, triton.next_power_of_2(max(dim, value_dim)))
    partial = torch.empty(rows * num_heads * step * num_splits, value_dim + 2, dtype=torch.float32, device=out.device)
    for begin in range(0, width, step):
        count = min(step, width - begin)
        _split_kernel[(rows * num_kv_heads, triton.cdiv(count, BLOCK_QUERIES // group), num_splits)](
            query,
            key,
            value,
            spans,
            None if tree is None else tree.starts,
            None if tree is None else tree.mask,
            partial,
            begin,
            count,
            width,
            num_slots,
            scaling,
            softcap or 1.0,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            DIM=dim,
            VALUE_DIM=value_dim,
            BLOCK_DIM=max(16, triton.next_power_of_2(dim)),
            BLOCK_VALUE=max(16, triton.next_power_of_2(value_dim)),
            HAS_SOFTCAP=softcap is not None,
            IS_TREE=tree is not None,
            TREE_SLOTS=TREE_SLOTS,
            BLOCK_QUERIES=BLOCK_QUERIES,
            BLOCK_KEYS=BLOCK_KEYS,
            SPLIT_KEYS=SPLIT_KEYS,
            num_warps=NUM_WARPS,
            # As many tiles in flight as fit into shared memory; the arithmetic is the same.
            num_stages=max(1, min(3, 1024 // (block_dim * query.element_size()))),
            **overlap_options(query),
        )
        _merge_kernel[(rows * count * num_heads,)](
            partial,
            spans,
            sinks,
            out,
            begin,
            count,
            width,
            num_splits,
            NUM_HEADS=num_heads,
            VALUE_DIM=value_dim,
            BLOCK_VALUE=triton.next_power_of_2(value_dim),
            HAS_SINKS=sinks is not None,
            IS_TREE=tree is not None,
            SPLIT_KEYS=SPLIT_KEYS,
            num_warps=1,
            **overlap_options(query),
        )
    return out


if triton is not None:

    @triton.jit(do_not_specialize=["begin", "count", "width", "num_slots"])
    def _split_kernel(
        query_ptr,
        key_ptr,
        value_ptr,
        spans_ptr,
        tree_starts_ptr,
        tree_mask_ptr,
        partial_ptr,
        begin,
        count,
        width,
        num_slots,
        scaling,
        softcap,
        query_row,
        query_head,
        query_column,
        key_row,
        key_head,
        key_slot,
        value_row,
        value_head,
        value_slot,
        NUM_KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_VALUE: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        IS_TREE: tl.constexpr,
        TREE_SLOTS: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_KEYS: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """partial: [rows, heads, count, splits, value_dim + 2]: the sum of weighted values, the maximum, the sum."""
        wait_for_previous_kernel(OVERLAP)
        COLUMNS: tl.constexpr = BLOCK_QUERIES // GROUP
        row = (tl.program_id(0) // NUM_KV_HEADS).to(tl.int64)
        kv_head = (tl.program_id(0) % NUM_KV_HEADS).to(tl.int64)
        pair = tl.arange(0, BLOCK_QUERIES)
        column = tl.program_id(1) * COLUMNS + pair // GROUP
        head = kv_head * GROUP + pair % GROUP
        pair_ok = (pair < COLUMNS * GROUP) & (column < count)
        span = spans_ptr + (row * width + begin + column) * 3
        low = tl.load(span, mask=pair_ok, other=0)
        high = tl.load(span + 1, mask=pair_ok, other=0)
        origin = tl.load(spans_ptr + row * width * 3 + 2)
        sees = high > low
        lowest = tl.min(tl.where(sees, low, num_slots), 0)
        highest = tl.max(tl.where(sees, high, 0), 0)
        split = tl.program_id(2) + tl.maximum(-origin, 0) // SPLIT_KEYS
        first = tl.maximum(split * SPLIT_KEYS, (lowest - origin) // BLOCK_KEYS * BLOCK_KEYS)
        end = tl.minimum((split + 1) * SPLIT_KEYS, highest - origin)
        if first < end:
            dim = tl.arange(0, BLOCK_DIM)
            value_dim = tl.arange(0, BLOCK_VALUE)
            dim_ok = dim < DIM
            value_ok = value_dim < VALUE_DIM
            query_at = row * query_row + head * query_head + (begin + column).to(tl.int64) * query_column
            query = tl.load(
                query_ptr + query_at[:, None] + dim[None, :], mask=pair_ok[:, None] & dim_ok[None, :], other=0.0
            )
            if IS_TREE:
                own_begin = tl.load(tree_starts_ptr + row)
                own_mask = tl.load(tree_mask_ptr + row * width + begin + column, mask=pair_ok, other=0)
            highest_score = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_QUERIES], tl.float32)
            values = tl.zeros([BLOCK_QUERIES, BLOCK_VALUE], tl.float32)
            for position in range(first, end, BLOCK_KEYS):
                slot = position + origin + tl.arange(0, BLOCK_KEYS)
                slot_ok = (slot >= lowest) & (slot < highest)
                key_at = row * key_row + kv_head * key_head + slot.to(tl.int64) * key_slot
                key = tl.load(
                    key_ptr + key_at[None, :] + dim[:, None], mask=slot_ok[None, :] & dim_ok[:, None], other=0.0
                )
                score = tl.dot(query, key, input_precision="ieee") * scaling
                if HAS_SOFTCAP:
                    score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
                visible = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
                if IS_TREE:
                    own = slot.to(tl.int64) - own_begin
                    bit = tl.minimum(tl.maximum(own, 0), TREE_SLOTS - 1)
                    is_set = ((own_mask[:, None] >> bit[None, :]) & 1) != 0
                    visible = visible & ((own < 0)[None, :] | ((own < TREE_SLOTS)[None, :] & is_set))
                score = tl.where(visible, score, float("-inf"))
                new_highest = tl.maximum(highest_score, tl.max(score, 1))
                # Until a query has seen a key its maximum stays -inf; using 0 instead avoids NaN.
                finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
                weight = tl.exp(score - finite[:, None])
                scale = tl.exp(highest_score - finite)
                total = total * scale + tl.sum(weight, 1)
                value_at = row * value_row + kv_head * value_head + slot.to(tl.int64) * value_slot
                value = tl.load(
                    value_ptr + value_at[:, None] + value_dim[None, :],
                    mask=slot_ok[:, None] & value_ok[None, :],
                    other=0.0,
                )
                values = values * scale[:, None]
                values = tl.dot(weight.to(value.dtype), value, values, input_precision="ieee")
                highest_score = new_highest
            num_splits = tl.num_programs(2)
            place = ((row * NUM_KV_HEADS * GROUP + head) * count + column) * num_splits + tl.program_id(2)
            place = place * (VALUE_DIM + 2)
            tl.store(
                partial_ptr + place[:, None] + value_dim[None, :], values, mask=pair_ok[:, None] & value_ok[None, :]
            )
            tl.store(partial_ptr + place + VALUE_DIM, highest_score, mask=pair_ok)
            tl.store(partial_ptr + place + VALUE_DIM + 1, total, mask=pair_ok)

    @triton.jit(do_not_specialize=["begin", "count", "width", "num_splits"])
    def _merge_kernel(
        partial_ptr,
        spans_ptr,
        sinks_ptr,
        out_ptr,
        begin,
        count,
        width,
        num_splits,
        NUM_HEADS: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        BLOCK_VALUE: tl.constexpr,
        HAS_SINKS: tl.constexpr,
        IS_TREE: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per query and head; it reads only the splits of which the query sees any slot."""
        wait_for_previous_kernel(OVERLAP)
        head = tl.program_id(0) % NUM_HEADS
        column = tl.program_id(0) // NUM_HEADS % count
        row = (tl.program_id(0) // NUM_HEADS // count).to(tl.int64)
        span = spans_ptr + (row * width + begin + column) * 3
        low = tl.load(span)
        high = tl.load(span + 1)
        origin = tl.load(spans_ptr + row * width * 3 + 2)
        value_dim = tl.arange(0, BLOCK_VALUE)
        value_ok = value_dim < VALUE_DIM
        values = tl.zeros([BLOCK_VALUE], tl.float32)
        if HAS_SINKS:
            highest_score = tl.load(sinks_ptr + head).to(tl.float32)
            total = 1.0
        else:
            highest_score = float("-inf")
            total = 0.0
        skipped = tl.maximum(-origin, 0) // SPLIT_KEYS
        first = (low - origin) // SPLIT_KEYS - skipped
        last = tl.where(high > low, (high - 1 - origin) // SPLIT_KEYS - skipped, first - 1)
        place = ((row * NUM_HEADS + head) * count + column) * num_splits
        for split in range(first, last + 1):
            at = partial_ptr + (place + split) * (VALUE_DIM + 2)
            split_highest = tl.load(at + VALUE_DIM)
            new_highest = tl.maximum(highest_score, split_highest)
            finite = new_highest
            if IS_TREE:  # every slot of a split may be hidden
                finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            scale = tl.exp(highest_score - finite)
            split_scale = tl.exp(split_highest - finite)
            total = total * scale + tl.load(at + VALUE_DIM + 1) * split_scale
            values = values * scale + tl.load(at + value_dim, mask=value_ok, other=0.0) * split_scale
            highest_score = new_highest
        values = values / tl.where(total == 0.0, 1.0, total)
        place_out = ((row * width + begin + column) * NUM_HEADS + head) * VALUE_DIM
        tl.store(out_ptr + place_out + value_dim, values.to(out_ptr.dtype.element_ty), mask=value_ok)
