"""y = x W' + b with bits that do not depend on how many rows x has.

One program owns a tile of y and goes through the inner dimension in ascending order with one float32 accumulator; the
dimension is never split. So a row's result depends only on that row and on W, for any tile, warp count or operand order
(the GPU tests compare them all), and the tiles can be chosen per number of rows for speed. Several weights that share x
(query, key and value; gate and up) take one launch and are read in place: nothing is merged in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.dispatch import kernel, shared_memory, triton, uses_triton
from specdec.kernels.linear.descriptor_linear import MAX_WEIGHTS, descriptor_linears, fits_descriptors
from specdec.kernels.linear.linear_tiles import Tile, choose_tile, fitted, pointer_tile
from specdec.kernels.overlap import overlap_options

if triton is not None:
    import triton.language as tl

    from specdec.kernels.overlap import wait_for_previous_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def in_order_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, implementation: str = "auto", tile: Tile | None = None
) -> Tensor:
    """x: [..., in], weight: [out, in], bias: [out], one dtype: bfloat16, float16 or float32. Returns [..., out].

    The sum and the bias are float32 (never TF32) and rounded once. tile: for tuning; by default the table's.
    """
    return in_order_linears(x, (weight,), (bias,), implementation, tile)


def in_order_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    implementation: str = "auto",
    tile: Tile | None = None,
) -> Tensor:
    """One to three linears of the same x side by side, [..., out1 + out2 + ...]: each bit for bit as computed alone.

    weights: [out_i, in] each; biases: [out_i] each, or None for all of them. Transposed views of [in, out_i] tensors
    are read in place if all of them are such; other strides are copied.
    """
    if not 1 <= len(weights) <= MAX_WEIGHTS or len(biases) != len(weights):
        raise ValueError(f"{len(weights)} weights and {len(biases)} biases; need 1 to {MAX_WEIGHTS} of both")
    if len({bias is None for bias in biases}) > 1:
        raise ValueError("some weights have a bias and others do not; give the others a bias of zeros")

    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"x {list(x.shape)} does not fit weight {list(weight.shape)}; need [..., in] and [out, in]"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}; need [out]")
        if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
            raise ValueError(f"x is {x.dtype}, weight {weight.dtype}; cast them to one dtype")

    if not uses_triton(implementation, x):
        parts = [in_order_linear_reference(x, *pair) for pair in zip(weights, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the kernel serves bfloat16, float16 and float32")

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not all(is_input_first(weight) for weight in weights):
        weights = [weight.contiguous() for weight in weights]
    out = _in_order_linears_triton(rows, weights, biases, tile)
    return out.view(*x.shape[:-1], out.shape[-1])


def is_input_first(weight: Tensor) -> bool:
    """Whether the [out, in] weight lies in memory as [in, out] alone, as that of GPT-2's Conv1D does."""
    return weight.t().is_contiguous() and not weight.is_contiguous()


def in_order_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same contract in plain torch: one product per row, so that every row goes through the same call."""
    rows = x.reshape(-1, 1, x.shape[-1])
    if not len(rows):
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    # A copy puts every row at the same alignment, on which the BLAS may choose its code path.
    return torch.cat([F.linear(row.clone(), weight, bias) for row in rows]).view(*x.shape[:-1], -1)


def _in_order_linears_triton(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], tile: Tile | None
) -> Tensor:
    (num_rows, size_in), sizes = x.shape, [len(weight) for weight in weights]
    out = torch.empty(num_rows, sum(sizes), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out

    tile = tile or choose_tile(num_rows, sum(sizes), size_in, x.dtype)
    if tile.descriptors and fits_descriptors(x, weights):
        descriptor_linears(x, weights, biases, out, tile)
        return out
    tile = pointer_tile(num_rows, x.dtype) if tile.descriptors else tile
    tile = fitted(tile, x.element_size(), shared_memory(x.device))

    num_out_blocks = sum(triton.cdiv(size, tile.block_out) for size in sizes)
    absent = MAX_WEIGHTS - len(weights)

    _in_order_linear_kernel[(triton.cdiv(num_rows, tile.block_rows) * num_out_blocks,)](
        x,
        *weights,
        *[weights[0]] * absent,
        *biases,
        *[biases[0]] * absent,
        out,
        num_rows,
        *sizes,
        *[0] * absent,
        size_in,
        NUM_WEIGHTS=len(weights),
        HAS_BIAS=biases[0] is not None,
        EVEN_IN=size_in % tile.block_in == 0,
        SWAPPED=tile.swapped,
        INPUT_FIRST=is_input_first(weights[0]),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_OUT=tile.block_out,
        BLOCK_IN=tile.block_in,
        GROUP=tile.group,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **overlap_options(x),
    )
    return out


if triton is not None:

    @kernel(do_not_specialize=["num_rows"])
    def _in_order_linear_kernel(
        x_ptr,
        weight_ptr,
        weight_1_ptr,
        weight_2_ptr,
        bias_ptr,
        bias_1_ptr,
        bias_2_ptr,
        out_ptr,
        num_rows,
        size_out,
        size_1,
        size_2,
        size_in,
        NUM_WEIGHTS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        EVEN_IN: tl.constexpr,
        SWAPPED: tl.constexpr,
        INPUT_FIRST: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_OUT: tl.constexpr,
        BLOCK_IN: tl.constexpr,
        GROUP: tl.constexpr,
        NUM_STAGES: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        program = tl.program_id(0)
        num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
        num_blocks_0 = tl.cdiv(size_out, BLOCK_OUT)
        num_blocks_1 = tl.cdiv(size_1, BLOCK_OUT)
        num_out_blocks = num_blocks_0 + num_blocks_1 + tl.cdiv(size_2, BLOCK_OUT)
        out_stride = size_out + size_1 + size_2
        first = program // (GROUP * num_out_blocks) * GROUP
        group = tl.minimum(num_row_blocks - first, GROUP)
        within = program % (GROUP * num_out_blocks)
        row = ((first + within % group) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        block = within // group
        out_begin = 0
        if NUM_WEIGHTS > 1:
            if block >= num_blocks_0 + num_blocks_1:
                weight_ptr = weight_2_ptr
                if HAS_BIAS:
                    bias_ptr = bias_2_ptr
                block -= num_blocks_0 + num_blocks_1
                out_begin = size_out + size_1
                size_out = size_2
            elif block >= num_blocks_0:
                weight_ptr = weight_1_ptr
                if HAS_BIAS:
                    bias_ptr = bias_1_ptr
                block -= num_blocks_0
                out_begin = size_out
                size_out = size_1
        column = (block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
        wait_for_previous_kernel(OVERLAP)
        inner = tl.arange(0, BLOCK_IN)
        row_ok = row < num_rows
        weight_row = column if INPUT_FIRST else column * size_in
        column_ok = column < size_out
        if SWAPPED:  # few rows: the weights fill the tensor core's longer side
            total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
        else:
            total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for k in tl.range(0, size_in, BLOCK_IN, num_stages=NUM_STAGES):
            place = k + inner
            weight_column = place.to(tl.int64) * size_out if INPUT_FIRST else place
            if SWAPPED:
                left = weight_ptr + weight_row[:, None] + weight_column[None, :]
                right = x_ptr + row[None, :] * size_in + place[:, None]
                left_ok = column_ok[:, None]
                right_ok = row_ok[None, :]
            else:
                left = x_ptr + row[:, None] * size_in + place[None, :]
                right = weight_ptr + weight_row[None, :] + weight_column[:, None]
                left_ok = row_ok[:, None]
                right_ok = column_ok[None, :]
            if not EVEN_IN:
                left_ok = left_ok & (place < size_in)[None, :]
                right_ok = right_ok & (place < size_in)[:, None]
            a = tl.load(left, mask=left_ok, other=0.0)
            b = tl.load(right, mask=right_ok, other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        if SWAPPED:
            place_out = out_ptr + row[None, :] * out_stride + out_begin + column[:, None]
            ok = row_ok[None, :] & column_ok[:, None]
            if HAS_BIAS:
                total += tl.load(bias_ptr + column, mask=column_ok, other=0.0).to(tl.float32)[:, None]
        else:
            place_out = out_ptr + row[:, None] * out_stride + out_begin + column[None, :]
            ok = row_ok[:, None] & column_ok[None, :]
            if HAS_BIAS:
                total += tl.load(bias_ptr + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
        tl.store(place_out, total.to(out_ptr.dtype.element_ty), mask=ok)
