"""RMSNorm and LayerNorm with one program per row, so that a row's bits do not depend on its neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.dispatch import kernel, triton, uses_triton
from specdec.kernels.overlap import overlap_options

if triton is not None:
    import triton.language as tl

    from specdec.kernels.overlap import wait_for_previous_kernel


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    unit_offset: bool = False,
    round_first: bool = True,
    implementation: str = "auto",
) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32. x: [..., size], weight: [size].

    unit_offset: the factor is 1 + weight, as in Gemma. round_first: the normalised x is rounded to x's dtype before the
    product with the weight (Llama), not after (Gemma, OLMo 2).
    """
    _check(x, weight, None)
    if not uses_triton(implementation, x):
        return rms_norm_reference(x, weight, eps, unit_offset, round_first)
    return _rms_norm_triton(x, None, weight, eps, unit_offset, round_first)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    unit_offset: bool = False,
    round_first: bool = True,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to x's dtype: bit for bit the two separate operations.

    residual: of x's shape and dtype. The other arguments are those of `rms_norm`.
    """
    _check(x, weight, None)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual {list(residual.shape)} {residual.dtype} does not fit x {list(x.shape)} {x.dtype}; need the same"
        )
    if not uses_triton(implementation, x):
        total = x + residual
        return rms_norm_reference(total, weight, eps, unit_offset, round_first), total
    return _rms_norm_triton(x, residual, weight, eps, unit_offset, round_first)


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False, round_first: bool = True
) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(sum_in_pairs(wide * wide) / x.shape[-1] + eps)
    if weight is None:
        return wide.to(x.dtype)
    if round_first:
        return wide.to(x.dtype) * (1 + weight if unit_offset else weight)
    return (wide * (1 + weight.to(wide.dtype) if unit_offset else weight.to(wide.dtype))).to(x.dtype)


def _rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, unit_offset: bool, round_first: bool
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    total = rows if residual is None else torch.empty_like(rows)
    if out.numel():
        block = triton.next_power_of_2(rows.shape[1])
        _rms_norm_kernel[(len(rows),)](
            rows,
            None if residual is None else residual.reshape(rows.shape).contiguous(),
            weight,
            out,
            total,
            rows.shape[1],
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            UNIT_OFFSET=unit_offset,
            ROUND_FIRST=round_first,
            BLOCK=block,
            num_warps=_num_warps(block),
            enable_fp_fusion=False,  # whether a compiler fuses a sum of squares must not change its bits
            **overlap_options(rows),
        )
    return out.view(x.shape), total.view(x.shape)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, implementation: str = "auto"
) -> Tensor:
    """(x - mean) / std * weight + bias over the last dimension, in float32. x: [..., size], weight and bias: [size].

    Or x: [..., groups, size] with a weight, and a bias, for each group (the norms per head of Cohere): [groups, size].
    """
    _check(x, weight, bias, may_be_grouped=True)
    if not uses_triton(implementation, x):
        return layer_norm_reference(x, weight, bias, eps)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    if out.numel():
        block = triton.next_power_of_2(rows.shape[1])
        _layer_norm_kernel[(len(rows),)](
            rows,
            weight,
            bias,
            out,
            rows.shape[1],
            1 if weight is None or weight.dim() == 1 else len(weight),
            eps,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            num_warps=_num_warps(block),
            enable_fp_fusion=False,  # whether a compiler fuses a sum of squares must not change its bits
            **overlap_options(rows),
        )
    return out.view(x.shape)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide - sum_in_pairs(wide) / x.shape[-1]
    wide = wide * torch.rsqrt(sum_in_pairs(wide * wide) / x.shape[-1] + eps)
    wide = wide if weight is None else wide * weight.to(wide.dtype)
    return (wide if bias is None else wide + bias.to(wide.dtype)).to(x.dtype)


def sum_in_pairs(x: Tensor) -> Tensor:
    """[..., size] -> [..., 1] by element-wise additions only, whose order does not depend on the batch."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = F.pad(x, (0, size - x.shape[-1]))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, may_be_grouped: bool = False) -> None:
    is_grouped = may_be_grouped and weight is not None and weight.dim() == 2 and x.dim() > 1
    need = x.shape[-2:] if is_grouped else x.shape[-1:]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != need:
            raise ValueError(f"{name} {list(parameter.shape)} does not fit x {list(x.shape)}; need {list(need)}")
        if parameter is not None and not parameter.is_contiguous():
            raise ValueError(f"{name} has strides {parameter.stride()}; make it contiguous")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; cast it to a floating-point dtype")


def _num_warps(block: int) -> int:
    # A function of the size only, as the order of a program's sum depends on its number of warps.
    return 1 if block <= 256 else 4 if block <= 2048 else 8


if triton is not None:

    @kernel()
    def _rms_norm_kernel(
        x_ptr,
        residual_ptr,
        weight_ptr,
        out_ptr,
        total_ptr,
        size,
        eps,
        HAS_RESIDUAL: tl.constexpr,
        HAS_WEIGHT: tl.constexpr,
        UNIT_OFFSET: tl.constexpr,
        ROUND_FIRST: tl.constexpr,
        BLOCK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        wait_for_previous_kernel(OVERLAP)
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < size
        x = tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * size + column, total, mask=inside)
            x = total.to(tl.float32)
        y = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
            if ROUND_FIRST:
                y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
                if UNIT_OFFSET:
                    weight = (1.0 + weight.to(tl.float32)).to(weight_ptr.dtype.element_ty)
                y = y * weight.to(tl.float32)
            elif UNIT_OFFSET:
                y = y * (1.0 + weight.to(tl.float32))
            else:
                y = y * weight.to(tl.float32)
        tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=inside)

    @kernel()
    def _layer_norm_kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        out_ptr,
        size,
        num_groups,
        eps,
        HAS_WEIGHT: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        BLOCK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        wait_for_previous_kernel(OVERLAP)
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < size
        x = tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - tl.sum(x, 0) / size, 0.0)
        y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / size + eps)
        place = row % num_groups * size + column
        if HAS_WEIGHT:
            y = y * tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y = y + tl.load(bias_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=inside)
