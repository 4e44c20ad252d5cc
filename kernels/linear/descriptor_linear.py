"""The in-order linear over tensor descriptors: whole tiles are fetched by Hopper's copy engine (TMA), not by threads.

The same sum in the same order as `in_order_linear`, so the same bits; faster where the products of the tensor cores and
not the weights' bytes are the limit. A program keeps up to three blocks of rows, which share every tile of weights.
Persistent programs go through several tiles, so that a tile's result is written while the next one's operands arrive.
Tiles that reach beyond an operand are filled with zeros and cut when written.

On an H200, bfloat16: 580 to 820 TFLOP/s for the layers of an 8B model at 512 to 16384 rows, 0.94 to 1.11 of cuBLAS's
speed in the same run, and 390 to 490 at 192 rows (`benchmarks/results/linear-tuning-h200-2026-11-28.json`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from specdec.kernels.dispatch import kernel, nvidia_capability, triton
from specdec.kernels.linear.linear_tiles import Tile
from specdec.kernels.overlap import overlap_options

if triton is not None:
    import triton.language as tl

    from specdec.kernels.overlap import wait_for_previous_kernel

    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:  # Triton before 3.4
        TensorDescriptor = None

MAX_WEIGHTS = 3
ALIGNMENT = 16  # bytes: the copy engine's demand on addresses and row strides


def fits_descriptors(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a Hopper GPU (or the interpreter) can read these operands by descriptors.

    x: [rows, in] and weights [out_i, in], contiguous. float32 products do not run on the tensor cores and gain nothing.
    On later GPUs nobody has compared the bits of the two kernels.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or not _serves(x.device):
        return False
    if not all(operand.is_contiguous() for operand in (x, *weights)):
        return False
    sizes = (x.shape[1], *(len(weight) for weight in weights))
    if any(size * x.element_size() % ALIGNMENT for size in sizes):
        return False
    return all(operand.data_ptr() % ALIGNMENT == 0 for operand in (x, *weights))


@cache
def _serves(device: torch.device) -> bool:
    if triton is None or TensorDescriptor is None:
        return False
    return device.type != "cuda" or nvidia_capability(device)[0] == 9


def descriptor_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], out: Tensor, tile: Tile
) -> None:
    """Write x W' + b of every weight side by side to out, [rows, out_1 + out_2 + ...]; see `in_order_linears`."""
    (num_rows, size_in), sizes = x.shape, [len(weight) for weight in weights]
    absent = MAX_WEIGHTS - len(weights)  # None, as every descriptor given costs the host some microseconds
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    outs = [out[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]
    written = tile.block_out // 2 if tile.halves else tile.block_out

    described = [TensorDescriptor.from_tensor(w, [tile.block_out, tile.block_in]) for w in weights]
    results = [TensorDescriptor.from_tensor(part, [tile.block_rows, written]) for part in outs]
    num_tiles = triton.cdiv(num_rows, tile.block_rows * tile.parts) * sum(triton.cdiv(s, tile.block_out) for s in sizes)
    num_programs = min(num_tiles, tile.persistent * _num_processors(x.device)) if tile.persistent else num_tiles

    _descriptor_linear_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tile.block_rows, tile.block_in]),
        *described,
        *[None] * absent,
        *biases,
        *[None] * absent,
        *results,
        *[None] * absent,
        num_rows,
        *sizes,
        *[0] * absent,
        size_in,
        NUM_WEIGHTS=len(weights),
        HAS_BIAS=biases[0] is not None,
        SWAPPED=tile.swapped,
        PERSISTENT=tile.persistent > 0,
        BLOCK_ROWS=tile.block_rows,
        PARTS=tile.parts,
        BLOCK_OUT=tile.block_out,
        BLOCK_IN=tile.block_in,
        HALVES=tile.halves,
        GROUP=tile.group,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **overlap_options(x),
    )


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


if triton is not None:

    @kernel(do_not_specialize=["num_rows"])
    def _descriptor_linear_kernel(
        x, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2,
        num_rows, size_0, size_1, size_2, size_in,
        NUM_WEIGHTS: tl.constexpr, HAS_BIAS: tl.constexpr, SWAPPED: tl.constexpr, PERSISTENT: tl.constexpr,
        BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
        HALVES: tl.constexpr, GROUP: tl.constexpr, NUM_STAGES: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS * PARTS)
        num_blocks_0 = tl.cdiv(size_0, BLOCK_OUT)
        num_blocks_1 = tl.cdiv(size_1, BLOCK_OUT)
        num_out_blocks = num_blocks_0 + num_blocks_1 + tl.cdiv(size_2, BLOCK_OUT)
        wait_for_previous_kernel(OVERLAP)
        if PERSISTENT:
            num_tiles = num_row_blocks * num_out_blocks
            for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
                _write_tile(
                    tile, x, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2,
                    num_row_blocks, num_blocks_0, num_blocks_1, num_out_blocks, size_0, size_1, size_2, size_in,
                    NUM_WEIGHTS, HAS_BIAS, SWAPPED, BLOCK_ROWS, PARTS, BLOCK_OUT, BLOCK_IN, HALVES, GROUP, NUM_STAGES,
                )  # fmt: skip
        else:
            _write_tile(
                tl.program_id(0), x, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2,
                num_row_blocks, num_blocks_0, num_blocks_1, num_out_blocks, size_0, size_1, size_2, size_in,
                NUM_WEIGHTS, HAS_BIAS, SWAPPED, BLOCK_ROWS, PARTS, BLOCK_OUT, BLOCK_IN, HALVES, GROUP, NUM_STAGES,
            )  # fmt: skip

    @triton.jit
    def _place(tile, num_row_blocks, num_out_blocks, GROUP: tl.constexpr):
        """The tile's row block and block of results: row blocks of a group first."""
        first = tile // (GROUP * num_out_blocks) * GROUP
        group = tl.minimum(num_row_blocks - first, GROUP)
        within = tile % (GROUP * num_out_blocks)
        return first + within % group, within // group

    @triton.jit
    def _write_tile(
        tile, x, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2,
        num_row_blocks, num_blocks_0, num_blocks_1, num_out_blocks, size_0, size_1, size_2, size_in,
        NUM_WEIGHTS: tl.constexpr, HAS_BIAS: tl.constexpr, SWAPPED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
        PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, HALVES: tl.constexpr,
        GROUP: tl.constexpr, NUM_STAGES: tl.constexpr,
    ):  # fmt: skip
        row_block, block = _place(tile, num_row_blocks, num_out_blocks, GROUP)
        row = row_block * (BLOCK_ROWS * PARTS)
        weight = weight_0
        bias = bias_0
        out = out_0
        size = size_0
        if NUM_WEIGHTS > 2:
            if block >= num_blocks_0 + num_blocks_1:
                weight = weight_2
                if HAS_BIAS:
                    bias = bias_2
                out = out_2
                size = size_2
                block -= num_blocks_0 + num_blocks_1
            elif block >= num_blocks_0:
                weight = weight_1
                if HAS_BIAS:
                    bias = bias_1
                out = out_1
                size = size_1
                block -= num_blocks_0
        elif NUM_WEIGHTS > 1:
            is_second = block >= num_blocks_0
            if is_second:
                weight = weight_1
                if HAS_BIAS:
                    bias = bias_1
                out = out_1
                size = size_1
                block -= num_blocks_0
        column = block * BLOCK_OUT
        if SWAPPED:
            total_0 = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
        else:
            total_0 = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        total_1 = total_0
        total_2 = total_0
        for k in tl.range(0, size_in, BLOCK_IN, num_stages=NUM_STAGES):
            weights = weight.load([column, k])
            total_0 = _add_product(x.load([row, k]), weights, total_0, SWAPPED)
            if PARTS > 1:
                total_1 = _add_product(x.load([row + BLOCK_ROWS, k]), weights, total_1, SWAPPED)
            if PARTS > 2:
                total_2 = _add_product(x.load([row + 2 * BLOCK_ROWS, k]), weights, total_2, SWAPPED)
        added = tl.zeros((BLOCK_OUT,), tl.float32)
        if HAS_BIAS:
            place = column + tl.arange(0, BLOCK_OUT)
            added = tl.load(bias + place, mask=place < size, other=0.0).to(tl.float32)
        _write_part(total_0, added, out, row, column, HAS_BIAS, SWAPPED, HALVES)
        if PARTS > 1:
            _write_part(total_1, added, out, row + BLOCK_ROWS, column, HAS_BIAS, SWAPPED, HALVES)
        if PARTS > 2:
            _write_part(total_2, added, out, row + 2 * BLOCK_ROWS, column, HAS_BIAS, SWAPPED, HALVES)

    @triton.jit
    def _add_product(x, weights, total, SWAPPED: tl.constexpr):
        if SWAPPED:
            return tl.dot(weights, x.T, total, input_precision="ieee")
        else:
            return tl.dot(x, weights.T, total, input_precision="ieee")

    @triton.jit
    def _write_part(
        total, added, out, row, column, HAS_BIAS: tl.constexpr, SWAPPED: tl.constexpr, HALVES: tl.constexpr
    ):
        if SWAPPED:
            total = total.T
        if HAS_BIAS:
            total += added[None, :]
        if HALVES:  # half the shared memory on the way out
            rows: tl.constexpr = total.shape[0]
            half: tl.constexpr = total.shape[1] // 2
            left, right = tl.split(tl.permute(tl.reshape(total, (rows, 2, half)), (0, 2, 1)))
            out.store([row, column], left.to(out.dtype))
            out.store([row, column + half], right.to(out.dtype))
        else:
            out.store([row, column], total.to(out.dtype))
