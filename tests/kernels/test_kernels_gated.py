"""act(gate) * up: the reference against torch, the kernel against the reference, and bit for bit on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specdec.kernels.linear import gated
from specdec.kernels.linear.gated import gelu_tanh_mul, silu_mul

interpreted = pytest.mark.interpreter
ACTIVATIONS = {silu_mul: F.silu, gelu_tanh_mul: lambda x: F.gelu(x, approximate="tanh")}
gated_by = pytest.mark.parametrize("kernel", ACTIVATIONS, ids=lambda kernel: kernel.__name__)
SHAPES = [(0, 8), (1, 2), (3, 34), (2, 5, 64), (2, 4100)]


def operand(shape, dtype=torch.float32, device="cpu"):
    return (4 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(device, dtype)


@gated_by
def test_reference_takes_the_gate_from_the_first_half(kernel):
    for shape in SHAPES:
        x = operand(shape)
        size = shape[-1] // 2
        assert torch.allclose(kernel(x), ACTIVATIONS[kernel](x[..., :size]) * x[..., size:], rtol=1e-6, atol=1e-5), (
            shape
        )


@interpreted
@gated_by
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_in_the_interpreter_equals_the_reference(dtype, kernel, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(gated.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    # float32: two exponentials; float16: one unit in the last place of the activation and of the
    # product. Absolute: 1 + tanh cancels where the gate is far below zero.
    rtol, atol = 2e-3 if dtype.itemsize == 2 else 1e-5, 2e-5

    for shape in SHAPES:
        x = operand(shape, dtype)
        assert torch.allclose(kernel(x, "triton"), kernel(x, "torch"), rtol=rtol, atol=atol), shape


def test_odd_halves_are_named():
    with pytest.raises(ValueError, match=r"gate_up \[3, 7\]"):
        silu_mul(torch.ones(3, 7))


@pytest.mark.gpu
@gated_by
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_on_a_gpu_are_those_of_torch(dtype, kernel):
    x = torch.randn(37, 2 * 12288, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).mul(3).to(dtype)
    assert torch.equal(kernel(x), kernel(x, "torch"))
