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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.kernels.dispatch import shared_memory, triton, uses_triton
from specdec.kernels.overlap import overlap_options

if triton is not None:
    from specdec.kernels.attention.ragged_attention_triton import merge_kernel, split_kernel, wide_kernel

# All four are part of the arithmetic: another value gives other bits.
BLOCK_QUERIES = 64  # (query, head of the group) pairs per program
BLOCK_KEYS = 64
SPLIT_KEYS = 256
NUM_WARPS = 4
# Programs from which on splits are merged in registers: nearly one for each processor of an H200, though each walks all
# splits of its queries. With fewer, the splits have programs of their own, and memory between. The bits are the same.
FILLING_PROGRAMS = 128
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
    rows, num_heads, width, _ = query.shape
    num_kv_heads, num_slots, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group = num_heads // num_kv_heads
    if group > BLOCK_QUERIES:
        raise ValueError(f"{group} heads per key head exceed {BLOCK_QUERIES}")
    out = torch.empty(rows, width, num_heads, value_dim, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    if not num_slots:
        return out.zero_()
    num_programs = rows * num_kv_heads * triton.cdiv(width, BLOCK_QUERIES // group)
    if num_programs >= FILLING_PROGRAMS and tree is None:
        _merge_in_registers(query, key, value, spans, scaling, softcap, sinks, out)
    else:
        _merge_in_memory(query, key, value, spans, scaling, softcap, sinks, tree, out)
    return out


def _merge_in_registers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """For wide steps: a program walks all splits of its queries, and nothing but the result is written."""
    rows, num_heads, width, _ = query.shape
    num_kv_heads, num_slots = key.shape[1:3]
    options = _shared_options(query, key, value, softcap)
    blocks = triton.cdiv(width, options["BLOCK_QUERIES"] // (num_heads // num_kv_heads))
    wide_kernel[(blocks, rows * num_kv_heads)](
        query,
        key,
        value,
        spans,
        sinks,
        out,
        width,
        num_slots,
        scaling,
        softcap or 1.0,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        HAS_SINKS=sinks is not None,
        num_warps=NUM_WARPS,
        **options,
    )


def _merge_in_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    tree: Tree | None,
    out: Tensor,
) -> None:
    """For narrow steps: each split has its own program, and its partial results are merged by a second kernel."""
    rows, num_heads, width, _ = query.shape
    num_kv_heads, num_slots, value_dim = key.shape[1], key.shape[2], value.shape[3]
    # The first slot may lie anywhere within its split.
    num_splits = triton.cdiv(num_slots - 1, SPLIT_KEYS) + 1
    bytes_per_query = 4 * rows * num_heads * num_splits * (value_dim + 2)
    step = min(width, max(1, MAX_WORKSPACE // bytes_per_query))
    partial = torch.empty(rows * num_heads * step * num_splits, value_dim + 2, dtype=torch.float32, device=out.device)
    options = _shared_options(query, key, value, softcap)
    for begin in range(0, width, step):
        count = min(step, width - begin)
        blocks = triton.cdiv(count, options["BLOCK_QUERIES"] // (num_heads // num_kv_heads))
        split_kernel[(rows * num_kv_heads, blocks, num_splits)](
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
            IS_TREE=tree is not None,
            TREE_SLOTS=TREE_SLOTS,
            num_warps=NUM_WARPS,
            **options,
        )
        merge_kernel[(rows * count * num_heads,)](
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
            UNROLL=4,
            num_warps=1,
            **overlap_options(query),
        )


def fitting(block_dim: int, block_value: int, group: int, itemsize: int, shared: int) -> tuple[int, int]:
    """How many queries a program has and how many tiles of keys are in flight, as many as shared memory holds. Neither
    changes a query's bits.

    group: heads per key head, which stay together. shared: bytes that a program may take.
    """
    most = max(1, min(3, 1024 // (max(block_dim, block_value) * itemsize)))
    for num_stages in range(most, 0, -1):
        for queries in (BLOCK_QUERIES, BLOCK_QUERIES // 2, BLOCK_QUERIES // 4):
            elements = queries * (block_dim + BLOCK_KEYS)
            elements += max(1, num_stages - 1) * BLOCK_KEYS * (block_dim + block_value)
            if queries >= group and elements * itemsize <= shared:
                return queries, num_stages
    return BLOCK_QUERIES, 1


def _shared_options(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> dict[str, Any]:
    num_kv_heads, dim, value_dim = key.shape[1], query.shape[3], value.shape[3]
    block_dim, block_value = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    group, itemsize = query.shape[1] // num_kv_heads, query.element_size()
    block_queries, num_stages = fitting(block_dim, block_value, group, itemsize, shared_memory(query.device))
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "BLOCK_QUERIES": block_queries,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_DIM": block_dim,
        "BLOCK_VALUE": block_value,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_KEYS": BLOCK_KEYS,
        "SPLIT_KEYS": SPLIT_KEYS,
        "num_stages": num_stages,
        **overlap_options(query),
    }
