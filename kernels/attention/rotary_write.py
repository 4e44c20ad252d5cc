"""The work between the query-key-value product and attention in one launch: head norms, rotation, the cache write."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.dispatch import kernel, triton, uses_triton
from specdec.kernels.linear.norms import rms_norm_reference
from specdec.kernels.overlap import overlap_options

if triton is not None:
    import triton.language as tl

    from specdec.kernels.overlap import wait_for_previous_kernel

MANY_TOKENS = 512  # from here on, starting a program for each head costs more than its work
MAX_HEADS = 8
WARP_BYTES = 512  # what a warp loads at once; a longer head would be divided among warps, in another order of its sum


class HeadNorm(NamedTuple):
    """RMSNorm over each query and key head, before the rotation. Weights: [head_dim]; the rest as for `rms_norm`."""

    query_weight: Tensor
    key_weight: Tensor
    eps: float
    unit_offset: bool = False
    round_first: bool = True


def rotary_write(
    qkv: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    head_norm: HeadNorm | None = None,
    places: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Rotate a step's queries and keys, and write its keys and values after each row's cached ones.

    qkv: [rows, width, (heads + 2 kv_heads) * head_dim]. starts: [rows] int64; column j of row b is written to slot
    starts[b] + j. places: [rows, width] int64, contiguous, the columns' positions; None if these are their slots. cos,
    sin: [positions, head_dim], in qkv's dtype. keys, values: [rows, slots, kv_heads, head_dim], contiguous except for
    the row; written in place.

    Returns the queries, [rows, width, heads, head_dim]. Bit for bit equal to transformers' modules one by one: the
    normalised head is rounded where its norm rounds it; both products and their sum are rounded to the dtype.
    """
    rows, width, _ = qkv.shape
    num_kv_heads, dim = keys.shape[2:]
    if qkv.shape[2] % dim or qkv.shape[2] // dim <= 2 * num_kv_heads or dim % 2:
        raise ValueError(f"qkv {list(qkv.shape)} does not fit {num_kv_heads} key heads of {dim}")
    if keys.shape != values.shape or len(keys) != rows or keys.stride()[1:] != values.stride()[1:]:
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} do not fit {rows} rows")
    if starts.shape != (rows,) or cos.shape != sin.shape or cos.shape[1] != dim:
        raise ValueError(f"starts {list(starts.shape)} or cos {list(cos.shape)} does not fit {rows} rows of {dim}")
    if places is not None and (places.shape != (rows, width) or not places.is_contiguous()):
        raise ValueError(f"places is {list(places.shape)}; need contiguous [{rows}, {width}]")
    if not qkv.dtype == keys.dtype == values.dtype == cos.dtype == sin.dtype:
        raise ValueError(f"qkv is {qkv.dtype}, keys {keys.dtype}, cos {cos.dtype}; cast them to one dtype")

    if not uses_triton(implementation, qkv):
        return rotary_write_reference(qkv, starts, cos, sin, keys, values, head_norm, places)

    num_heads = qkv.shape[2] // dim - 2 * num_kv_heads
    out = torch.empty(rows, width, num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    block = triton.next_power_of_2(dim)
    heads = _heads_per_program(rows * width, num_heads, num_kv_heads, block * qkv.element_size())
    _rotary_write_kernel[(rows * width, (num_heads + 2 * num_kv_heads) // heads)](
        qkv.contiguous(),
        starts,
        places,
        cos,
        sin,
        keys,
        values,
        out,
        head_norm.query_weight if head_norm else None,
        head_norm.key_weight if head_norm else None,
        head_norm.eps if head_norm else 0.0,
        width,
        keys.stride(0),
        values.stride(0),
        keys.stride(1),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        DIM=dim,
        BLOCK=block,
        HEADS=heads,
        HAS_PLACES=places is not None,
        HAS_NORM=head_norm is not None,
        UNIT_OFFSET=head_norm is not None and head_norm.unit_offset,
        ROUND_FIRST=head_norm is None or head_norm.round_first,
        # One warp a head, as in the RMSNorm of a row this short: the order of its sum depends on the number of warps.
        num_warps=heads,
        enable_fp_fusion=False,  # a fused multiply-add would skip a rounding
        **overlap_options(qkv),
    )

    return out


def _heads_per_program(num_tokens: int, num_heads: int, num_kv_heads: int, head_bytes: int) -> int:
    """Of one kind (queries, keys or values), each for a warp of its own."""
    if num_tokens < MANY_TOKENS or head_bytes > WARP_BYTES:
        return 1
    return math.gcd(num_heads, num_kv_heads, MAX_HEADS)


def rotary_write_reference(
    qkv: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    head_norm: HeadNorm | None = None,
    places: Tensor | None = None,
) -> Tensor:
    rows, width, _ = qkv.shape
    num_kv_heads, dim = keys.shape[2:]
    heads = qkv.view(rows, width, -1, dim)
    num_heads = heads.shape[2] - 2 * num_kv_heads
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], 2)
    if head_norm is not None:
        query = rms_norm_reference(query, head_norm.query_weight, *head_norm[2:])
        key = rms_norm_reference(key, head_norm.key_weight, *head_norm[2:])
    slots = starts[:, None] + torch.arange(width, device=starts.device)
    places = slots if places is None else places
    row = torch.arange(rows, device=starts.device)[:, None]
    keys[row, slots] = _rotate(key, cos[places, None], sin[places, None])
    values[row, slots] = value
    return _rotate(query, cos[places, None], sin[places, None])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


if triton is not None:

    @triton.jit
    def _weighted(x, weight, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr):
        """A normalised head times its weight, float32 that holds values of `dtype`."""
        if ROUND_FIRST:
            x = x.to(dtype).to(tl.float32)
            if UNIT_OFFSET:
                weight = (1.0 + weight).to(dtype).to(tl.float32)
        elif UNIT_OFFSET:
            weight = 1.0 + weight
        return (x * weight).to(dtype).to(tl.float32)

    @kernel()
    def _rotary_write_kernel(
        qkv_ptr,
        starts_ptr,
        places_ptr,
        cos_ptr,
        sin_ptr,
        keys_ptr,
        values_ptr,
        out_ptr,
        query_weight_ptr,
        key_weight_ptr,
        eps,
        width,
        keys_row,
        values_row,
        slot_stride,
        NUM_HEADS: tl.constexpr,
        NUM_KV_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        BLOCK: tl.constexpr,
        HEADS: tl.constexpr,
        HAS_PLACES: tl.constexpr,
        HAS_NORM: tl.constexpr,
        UNIT_OFFSET: tl.constexpr,
        ROUND_FIRST: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per token and HEADS heads of one kind; heads are queries, keys, values in this order."""
        wait_for_previous_kernel(OVERLAP)
        token = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * HEADS
        head = first + tl.arange(0, HEADS)[:, None]
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        row = token // width
        slot = tl.load(starts_ptr + row) + token % width
        place = slot
        if HAS_PLACES:
            place = tl.load(places_ptr + token)
        column = tl.arange(0, BLOCK)[None, :]
        inside = (column < DIM) & (head >= 0)
        here = qkv_ptr + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * DIM
        head_values = tl.load(here + column, mask=inside, other=0.0)
        if first >= NUM_HEADS + NUM_KV_HEADS:
            here = values_ptr + row * values_row + slot * slot_stride + (head - NUM_HEADS - NUM_KV_HEADS) * DIM
            tl.store(here + column, head_values, mask=inside)
        else:
            partner = (column + DIM // 2) % DIM
            sign = tl.where(column < DIM // 2, -1.0, 1.0)
            x = head_values.to(tl.float32)
            turned = tl.load(here + partner, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / DIM + eps)
                weight_ptr = query_weight_ptr if first < NUM_HEADS else key_weight_ptr
                in_head = column < DIM
                weight = tl.load(weight_ptr + column, mask=in_head, other=0.0).to(tl.float32)
                turned_weight = tl.load(weight_ptr + partner, mask=in_head, other=0.0).to(tl.float32)
                x = _weighted(x * scale, weight, dtype, UNIT_OFFSET, ROUND_FIRST)
                turned = _weighted(turned * scale, turned_weight, dtype, UNIT_OFFSET, ROUND_FIRST)
            cos = tl.load(cos_ptr + place * DIM + column, mask=column < DIM, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + place * DIM + column, mask=column < DIM, other=0.0).to(tl.float32)
            straight = (x * cos).to(dtype).to(tl.float32)
            crossed = (sign * turned * sin).to(dtype).to(tl.float32)
            rotated = (straight + crossed).to(dtype)
            if first < NUM_HEADS:
                tl.store(out_ptr + (token * NUM_HEADS + head) * DIM + column, rotated, mask=inside)
            else:
                here = keys_ptr + row * keys_row + slot * slot_stride + (head - NUM_HEADS) * DIM
                tl.store(here + column, rotated, mask=inside)
