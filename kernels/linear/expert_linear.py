"""The products of a mixture of experts, with bits that do not depend on which tokens chose the same expert.

As in the in-order linear, one program owns a tile of the result and goes through the inner dimension in ascending
order with one float32 accumulator. A tile holds rows of one expert, so each used expert's weights are read once per
block of rows. What a token's experts give is added in the order of their rank. There are no atomics, and nothing waits
for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.dispatch import kernel, shared_memory, triton, uses_triton
from specdec.kernels.linear.expert_groups import ExpertGroups
from specdec.kernels.linear.in_order_linear import DTYPES, in_order_linear_reference
from specdec.kernels.linear.linear_tiles import FLOAT32, Tile, fitted
from specdec.kernels.overlap import overlap_options

if triton is not None:
    import triton.language as tl

    from specdec.kernels.overlap import wait_for_previous_kernel

GROUP_BLOCKS = 8  # blocks that share a pass over the weights; those of one expert lie next to each other
# Per number of rows in a block. Few rows: the weights are the left operand, and many small tiles load at once.
TILES = {
    16: Tile(16, 32, 256, True, 4, 4),
    32: Tile(32, 64, 128, True, 4, 4),
    64: Tile(64, 64, 128, False, 4, 4),
    128: Tile(128, 128, 64, False, 4, 8),
}


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_ids: Tensor,
    groups: ExpertGroups | None = None,
    implementation: str = "auto",
    tile: Tile | None = None,
) -> Tensor:
    """[pairs, out]: row i is x W' + b of expert `expert_ids[i]`, summed in float32 and rounded once.

    x: [pairs / n, in], where each row serves n successive pairs. weight: [experts, out, in] with any strides (the
    transposed view of an [experts, in, out] tensor is read in place), bias: [experts, out], expert_ids: [pairs] int64.
    groups: of these expert_ids, `group_by_expert`; needed by the kernel alone. tile: for tuning; its block_rows must be
    those of the groups.
    """
    num_pairs = len(expert_ids)
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x {list(x.shape)} does not fit weight {list(weight.shape)}; need [n, in], [experts, out, in]"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}; need [experts, out]")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}; cast them to one dtype")
    if num_pairs % max(1, len(x)) or (num_pairs and not len(x)):
        raise ValueError(f"{num_pairs} pairs of {len(x)} rows; need a multiple")

    if not uses_triton(implementation, x):
        return expert_linear_reference(x, weight, bias, expert_ids)
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the kernel serves bfloat16, float16 and float32")
    if groups is None or len(groups.order) != num_pairs:
        raise ValueError("the kernel needs the groups of expert_ids; pass group_by_expert(expert_ids, num_experts)")
    return _expert_linear_triton(x.contiguous(), weight, bias, groups, tile)


def expert_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, expert_ids: Tensor) -> Tensor:
    """The same contract in plain torch, one product per pair."""
    per_row = len(expert_ids) // max(1, len(x))
    rows = [
        in_order_linear_reference(x[pair // per_row][None], weight[expert], None if bias is None else bias[expert])
        for pair, expert in enumerate(expert_ids.tolist())
    ]
    return torch.cat(rows) if rows else x.new_empty(0, weight.shape[1])


def _expert_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: ExpertGroups, tile: Tile | None
) -> Tensor:
    num_pairs, (_, size_out, size_in) = len(groups.order), weight.shape
    out = torch.empty(num_pairs, size_out, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if tile is None:
        is_wide = x.dtype == torch.float32
        tile = FLOAT32._replace(block_rows=groups.block_rows) if is_wide else TILES[groups.block_rows]
    tile = fitted(tile, x.element_size(), shared_memory(x.device))
    if tile.block_rows != groups.block_rows:
        raise ValueError(f"a tile of {tile.block_rows} rows for groups of {groups.block_rows}; need the same")
    _expert_linear_kernel[(len(groups.blocks) * triton.cdiv(size_out, tile.block_out),)](
        x,
        weight,
        bias,
        groups.order,
        groups.blocks,
        out,
        len(groups.blocks),
        num_pairs // len(x),
        size_out,
        size_in,
        *weight.stride(),
        HAS_BIAS=bias is not None,
        EVEN_IN=size_in % tile.block_in == 0,
        SWAPPED=tile.swapped,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_OUT=tile.block_out,
        BLOCK_IN=tile.block_in,
        GROUP=GROUP_BLOCKS,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **overlap_options(x),
    )
    return out


def add_experts(y: Tensor, weights: Tensor, implementation: str = "auto") -> Tensor:
    """y: [tokens * k, size], what each token's k experts give; weights: [tokens, k]. Returns [tokens, size] as y.

    The sum of y * weight in float32 from rank 0 on. Each product is rounded first where both are in half precision, as
    torch's own product is.
    """
    tokens, k = weights.shape
    if y.dim() != 2 or len(y) != tokens * k:
        raise ValueError(f"y {list(y.shape)} does not fit weights {list(weights.shape)}; need [tokens * k, size]")
    if not uses_triton(implementation, y):
        return add_experts_reference(y, weights)
    out = torch.empty(tokens, y.shape[1], dtype=y.dtype, device=y.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(y.shape[1]))
        _add_experts_kernel[(tokens, triton.cdiv(y.shape[1], block))](
            y.contiguous(),
            weights.contiguous(),
            out,
            k,
            y.shape[1],
            ROUNDS=torch.promote_types(y.dtype, weights.dtype) == y.dtype,
            BLOCK=block,
            enable_fp_fusion=False,  # the product is rounded before the sum
            **overlap_options(y),
        )
    return out


def add_experts_reference(y: Tensor, weights: Tensor) -> Tensor:
    tokens, k = weights.shape
    products = (y.view(tokens, k, y.shape[1]) * weights[..., None]).float()
    total = torch.zeros_like(products[:, 0])
    for rank in range(k):
        total = total + products[:, rank]
    return total.to(y.dtype)


if triton is not None:

    @kernel(do_not_specialize=["num_blocks"])
    def _expert_linear_kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        order_ptr,
        blocks_ptr,
        out_ptr,
        num_blocks,
        pairs_per_row,
        size_out,
        size_in,
        stride_expert,
        stride_out,
        stride_in,
        HAS_BIAS: tl.constexpr,
        EVEN_IN: tl.constexpr,
        SWAPPED: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_OUT: tl.constexpr,
        BLOCK_IN: tl.constexpr,
        GROUP: tl.constexpr,
        NUM_STAGES: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        program = tl.program_id(0)
        num_out_blocks = tl.cdiv(size_out, BLOCK_OUT)
        first = program // (GROUP * num_out_blocks) * GROUP
        group = tl.minimum(num_blocks - first, GROUP)
        within = program % (GROUP * num_out_blocks)
        entry = blocks_ptr + 3 * (first + within % group)
        column = (within // group * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
        wait_for_previous_kernel(OVERLAP)
        expert = tl.load(entry).to(tl.int64)
        begin = tl.load(entry + 1)
        end = tl.load(entry + 2)
        if begin < end:
            place = begin + tl.arange(0, BLOCK_ROWS)
            row_ok = place < end
            pair = tl.load(order_ptr + place, mask=row_ok, other=0).to(tl.int64)
            row = pair // pairs_per_row
            column_ok = column < size_out
            inner = tl.arange(0, BLOCK_IN)
            weight_ptr += expert * stride_expert
            if SWAPPED:
                total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
            else:
                total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
            for k in tl.range(0, size_in, BLOCK_IN, num_stages=NUM_STAGES):
                depth = (k + inner).to(tl.int64)
                if SWAPPED:
                    left = weight_ptr + column[:, None] * stride_out + depth[None, :] * stride_in
                    right = x_ptr + row[None, :] * size_in + depth[:, None]
                    left_ok = column_ok[:, None]
                    right_ok = row_ok[None, :]
                else:
                    left = x_ptr + row[:, None] * size_in + depth[None, :]
                    right = weight_ptr + column[None, :] * stride_out + depth[:, None] * stride_in
                    left_ok = row_ok[:, None]
                    right_ok = column_ok[None, :]
                if not EVEN_IN:
                    left_ok = left_ok & (depth < size_in)[None, :]
                    right_ok = right_ok & (depth < size_in)[:, None]
                a = tl.load(left, mask=left_ok, other=0.0)
                b = tl.load(right, mask=right_ok, other=0.0)
                total = tl.dot(a, b, total, input_precision="ieee")
            if HAS_BIAS:
                bias = tl.load(bias_ptr + expert * size_out + column, mask=column_ok, other=0.0).to(tl.float32)
                if SWAPPED:
                    total += bias[:, None]
                else:
                    total += bias[None, :]
            if SWAPPED:
                target = out_ptr + pair[None, :] * size_out + column[:, None]
                ok = row_ok[None, :] & column_ok[:, None]
            else:
                target = out_ptr + pair[:, None] * size_out + column[None, :]
                ok = row_ok[:, None] & column_ok[None, :]
            tl.store(target, total.to(out_ptr.dtype.element_ty), mask=ok)

    @kernel()
    def _add_experts_kernel(
        y_ptr,
        weights_ptr,
        out_ptr,
        k,
        size,
        ROUNDS: tl.constexpr,
        BLOCK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        wait_for_previous_kernel(OVERLAP)
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < size
        total = tl.zeros((BLOCK,), tl.float32)
        for rank in range(0, k):
            pair = token * k + rank
            product = tl.load(y_ptr + pair * size + column, mask=inside, other=0.0).to(tl.float32)
            product = product * tl.load(weights_ptr + pair).to(tl.float32)
            if ROUNDS:
                product = product.to(out_ptr.dtype.element_ty).to(tl.float32)
            total += product
        tl.store(out_ptr + token * size + column, total.to(out_ptr.dtype.element_ty), mask=inside)
