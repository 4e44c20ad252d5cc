"""act(gate) * up, the gated activation of llama- (SiLU) and gemma-type layers (GELU by tanh), in one launch."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.dispatch import kernel, triton, uses_triton
from specdec.kernels.overlap import overlap_options

if triton is not None:
    import triton.language as tl
    from triton.language.extra import libdevice

    from specdec.kernels.overlap import wait_for_previous_kernel

FEW_ROWS = 512
BLOCK = 1024
BLOCK_OF_MANY = 2048  # of many rows, which fill the device anyway


def silu_mul(gate_up: Tensor, implementation: str = "auto") -> Tensor:
    """gate_up: [..., 2 * size], the gate's half first. Returns silu(gate) * up, [..., size].

    Bit for bit torch's two operations: silu in float32, rounded to the dtype before the product.
    """
    return _gated(gate_up, False, implementation)


def gelu_tanh_mul(gate_up: Tensor, implementation: str = "auto") -> Tensor:
    """Like `silu_mul`, but gelu(gate) by its tanh approximation, as computed by torch's `gelu(approximate="tanh")`."""
    return _gated(gate_up, True, implementation)


def _gated(gate_up: Tensor, is_gelu: bool, implementation: str) -> Tensor:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up {list(gate_up.shape)} cannot be halved; its last dimension must be even")
    if not uses_triton(implementation, gate_up):
        return gelu_tanh_mul_reference(gate_up) if is_gelu else silu_mul_reference(gate_up)
    rows = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
    size = rows.shape[1] // 2
    out = torch.empty(len(rows), size, dtype=rows.dtype, device=rows.device)
    if out.numel():
        block = BLOCK if len(rows) <= FEW_ROWS else BLOCK_OF_MANY
        grid = len(rows), triton.cdiv(size, block)
        _gated_kernel[grid](rows, out, size, IS_GELU=is_gelu, BLOCK=block, **overlap_options(rows))
    return out.view(*gate_up.shape[:-1], size)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.contiguous()) * up  # strided operands take another path on a CPU


def gelu_tanh_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate.contiguous(), approximate="tanh") * up


if triton is not None:
    if os.environ.get("TRITON_INTERPRET") == "1":

        @triton.jit
        def _exp(x):
            return tl.exp(x)

        @triton.jit
        def _tanh(x):
            return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)

    else:

        @triton.jit
        def _exp(x):
            # The exponential of CUDA's own library, as torch calls it; Triton's tl.exp is a different approximation.
            return libdevice.exp(x)

        @triton.jit
        def _tanh(x):
            return libdevice.tanh(x)

    @kernel()
    def _gated_kernel(in_ptr, out_ptr, size, IS_GELU: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
        wait_for_previous_kernel(OVERLAP)
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < size
        gate = tl.load(in_ptr + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(in_ptr + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
        if IS_GELU:
            # torch's compiler fuses this sum with its product; nothing else there can be fused.
            inner = tl.fma(gate * gate * gate, tl.full([BLOCK], 0.044715, tl.float32), gate) * 0.7978845608028654
            active = 0.5 * gate * (1.0 + _tanh(inner))
        else:
            active = tl.math.div_rn(gate, 1.0 + _exp(-gate))
        out = active.to(out_ptr.dtype.element_ty).to(tl.float32) * up
        tl.store(out_ptr + row * size + column, out.to(out_ptr.dtype.element_ty), mask=inside)
