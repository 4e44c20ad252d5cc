"""Softmax, sum and top-k over the last dimension, one program per row: a row's bits do not depend on its neighbours.

For the short rows of routers (one value per expert). Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.kernels.dispatch import kernel, triton, uses_triton
from specdec.kernels.linear.norms import sum_in_pairs
from specdec.kernels.overlap import overlap_options

if triton is not None:
    import triton.language as tl

    from specdec.kernels.overlap import wait_for_previous_kernel

MAX_SIZE = 1 << 15  # a row lies in one program's registers


def row_softmax(x: Tensor, dtype: torch.dtype | None = None, implementation: str = "auto") -> Tensor:
    """x: [..., size], floating point. Softmax over the last dimension in float32, rounded to `dtype` (x's own)."""
    dtype = dtype or x.dtype
    if not uses_triton(implementation, x):
        return of_each_row(lambda row: _softmax_reference(row, dtype), x)
    rows, out = _rows(x), torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel():
        size, block = rows.shape[1], _block(rows)
        _softmax_kernel[(len(rows),)](
            rows, out, size, BLOCK=block, num_warps=_num_warps(block), enable_fp_fusion=False, **overlap_options(rows)
        )
    return out


def row_sum(x: Tensor, dtype: torch.dtype | None = None, implementation: str = "auto") -> Tensor:
    """x: [..., size], floating point. The float32 sum over the last dimension, [..., 1], rounded to `dtype` (x's)."""
    dtype = dtype or x.dtype
    if not uses_triton(implementation, x):
        return sum_in_pairs(x.float()).to(dtype)
    rows, out = _rows(x), torch.empty(*x.shape[:-1], 1, dtype=dtype, device=x.device)
    if out.numel():
        size, block = rows.shape[1], _block(rows)
        _sum_kernel[(len(rows),)](rows, out, size, BLOCK=block, num_warps=_num_warps(block), **overlap_options(rows))
    return out


def row_top_k(x: Tensor, k: int, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """x: [..., size] of at least k. The k largest values in descending order, and their indices in int64, [..., k]."""
    if not 0 < k <= x.shape[-1]:
        raise ValueError(f"k={k} of rows of {x.shape[-1]}; need 1 to {x.shape[-1]}")
    if not uses_triton(implementation, x):
        values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
        return values[..., :k].contiguous(), indices[..., :k].contiguous()
    rows = _rows(x)
    values = torch.empty(*x.shape[:-1], k, dtype=x.dtype, device=x.device)
    indices = torch.empty(values.shape, dtype=torch.long, device=x.device)
    if values.numel():
        size, block = rows.shape[1], _block(rows)
        _top_k_kernel[(len(rows),)](
            rows, values, indices, size, k, BLOCK=block, num_warps=_num_warps(block), **overlap_options(rows)
        )
    return values, indices


def of_each_row(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The function of each row, [1, size], alone: on a CPU a vectorised function's bits depend on where a row lies."""
    rows = x.reshape(-1, 1, x.shape[-1])
    if not len(rows):
        return function(x)
    out = torch.cat([function(row.clone()) for row in rows])
    return out.view(*x.shape[:-1], out.shape[-1])


def _softmax_reference(row: Tensor, dtype: torch.dtype) -> Tensor:
    wide = row.float()
    wide = torch.exp(wide - wide.amax(-1, keepdim=True))
    return (wide / sum_in_pairs(wide)).to(dtype)


def _rows(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; cast it to a floating-point dtype")
    if not 0 < x.shape[-1] <= MAX_SIZE:
        raise ValueError(f"rows of {x.shape[-1]} values; the kernel serves 1 to {MAX_SIZE}")
    return x.reshape(-1, x.shape[-1]).contiguous()


def _block(rows: Tensor) -> int:
    return triton.next_power_of_2(rows.shape[1])


def _num_warps(block: int) -> int:
    # A function of the size only, as the order of a program's sum depends on its number of warps.
    return 1 if block <= 256 else 4 if block <= 2048 else 8


if triton is not None:

    @kernel()
    def _softmax_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
        wait_for_previous_kernel(OVERLAP)
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < size
        x = tl.load(x_ptr + row * size + column, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.exp(x - tl.max(x, 0))
        out = x / tl.sum(x, 0)
        tl.store(out_ptr + row * size + column, out.to(out_ptr.dtype.element_ty), mask=inside)

    @kernel()
    def _sum_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
        wait_for_previous_kernel(OVERLAP)
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * size + column, mask=column < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + row, tl.sum(x, 0).to(out_ptr.dtype.element_ty))

    @kernel()
    def _top_k_kernel(x_ptr, values_ptr, indices_ptr, size, k, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
        wait_for_previous_kernel(OVERLAP)
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        left = column < size
        x = tl.load(x_ptr + row * size + column, mask=left, other=float("-inf")).to(tl.float32)
        x = tl.where(x != x, float("inf"), x)  # NaN counts as the largest, so that every choice is an index
        for rank in range(0, k):
            best = tl.max(tl.where(left, x, float("-inf")), 0)
            chosen = tl.min(tl.where(left & (x == best), column, BLOCK), 0)
            tl.store(values_ptr + row * k + rank, tl.load(x_ptr + row * size + chosen))
            tl.store(indices_ptr + row * k + rank, chosen.to(tl.int64))
            left = left & (column != chosen)
