"""RMSNorm and LayerNorm: references against torch, kernels against references, rows against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specdec.kernels.linear import norms
from specdec.kernels.linear.norms import add_rms_norm, layer_norm, rms_norm, sum_in_pairs

interpreted = pytest.mark.interpreter
SHAPES = [(0, 16), (1, 1), (5, 33), (2, 3, 64), (4, 300)]


def operands(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = [torch.randn(*size, generator=generator) + 0.3 for size in (shape, shape[-1:], shape[-1:])]
    return [tensor.to(device, dtype) for tensor in tensors]


def poison(monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(norms.torch, "empty_like", lambda x: empty_like(x).fill_(float("nan")))


@pytest.mark.parametrize("shape", SHAPES)
def test_references_are_the_norms(shape):
    x, weight, bias = operands(shape)
    expected = F.rms_norm(x, x.shape[-1:], weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)
    expected = F.rms_norm(x, x.shape[-1:], 1 + weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, unit_offset=True, round_first=False), expected)
    torch.testing.assert_close(rms_norm(x, None, 1e-5), F.rms_norm(x, x.shape[-1:], None, 1e-5))
    expected = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), expected)


def test_reference_rows_do_not_depend_on_their_batch():
    x, weight, bias = operands((37, 301))
    for norm in (lambda x: rms_norm(x, weight, 1e-5), lambda x: layer_norm(x, weight, bias, 1e-5)):
        together = norm(x)
        for row in range(len(x)):
            assert torch.equal(norm(x[row : row + 1])[0], together[row])


def test_sum_in_pairs_adds_everything_once():
    for size in (1, 2, 3, 31, 64):
        x = torch.arange(2 * size, dtype=torch.float64).view(2, size)
        assert torch.equal(sum_in_pairs(x), x.sum(-1, keepdim=True))


def test_rounding_before_and_after_the_weight_differ_in_half_precision():
    x, weight, _ = operands((8, 64), torch.bfloat16)
    assert not torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5, round_first=False))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_and_norm_together_are_the_two_apart(shape, dtype):
    x, weight, _ = operands(shape, dtype)
    normed, total = add_rms_norm(x, 3 * x, weight, 1e-5)
    assert torch.equal(total, x + 3 * x) and torch.equal(normed, rms_norm(x + 3 * x, weight, 1e-5))


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sum_and_norm_in_the_interpreter(shape, dtype, monkeypatch):
    x, weight, _ = operands(shape, dtype)
    poison(monkeypatch)
    normed, total = add_rms_norm(x, 3 * x, weight, 1e-5, implementation="triton")
    assert torch.equal(total, x + 3 * x)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5, implementation="triton"))


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_in_the_interpreter_equal_the_references(shape, dtype, monkeypatch):
    x, weight, bias = operands(shape, dtype)
    poison(monkeypatch)
    # One unit in the last place: the sums run in another order.
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-3, atol=1e-3)
    for w in (weight, None):
        for offset in (False, True):
            for first in (False, True):
                out = rms_norm(x, w, 1e-5, offset, first, "triton")
                torch.testing.assert_close(out, rms_norm(x, w, 1e-5, offset, first), **tolerance)
    for w, b in ((weight, bias), (weight, None), (None, None)):
        torch.testing.assert_close(layer_norm(x, w, b, 1e-5, "triton"), layer_norm(x, w, b, 1e-5), **tolerance)


def test_wrong_operands_are_named():
    x, weight, _ = operands((3, 8))
    with pytest.raises(ValueError, match=r"weight \[7\] does not fit"):
        rms_norm(x, weight[:7], 1e-5)
    with pytest.raises(ValueError, match=r"strides \(2,\)"):
        rms_norm(x, torch.ones(16)[::2], 1e-5)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, x[:1], weight, 1e-5)
    with pytest.raises(ValueError, match="int64"):
        layer_norm(x.long(), None, None, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [64, 100, 384, 4096, 5000])
def test_bits_on_a_gpu_do_not_depend_on_the_rows(dtype, size):
    x, weight, bias = operands((130, size), dtype, "cuda")
    for norm, check in (
        (lambda x: rms_norm(x, weight, 1e-5), lambda x: F.rms_norm(x, x.shape[-1:], weight.double(), 1e-5)),
        (
            lambda x: layer_norm(x, weight, bias, 1e-5),
            lambda x: F.layer_norm(x, x.shape[-1:], weight.double(), bias.double(), 1e-5),
        ),
    ):
        together = norm(x)
        for rows in (1, 2, 33, 129):
            assert torch.equal(norm(x[-rows:]), together[-rows:])
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(together.double(), check(x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [100, 384, 4096])
def test_sum_and_norm_together_have_the_same_bits_on_a_gpu(dtype, size):
    x, weight, residual = operands((33, size), dtype, "cuda")[0], *operands((33, size), dtype, "cuda")[1:]
    residual = x.flip(0) * 3 + residual
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual) and torch.equal(normed, rms_norm(x + residual, weight, 1e-5))


def grouped(x, weight, bias):
    """The LayerNorm of each group alone."""
    parts = [layer_norm(x[..., i, :], weight[i], None if bias is None else bias[i], 1e-5) for i in range(len(weight))]
    return torch.stack(parts, -2)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 4, 8), (2, 5, 3, 33)])
def test_a_layer_norm_of_groups_gives_each_its_weight(shape):
    """As in the norms per head of Cohere. Fails if every group gets the first weight."""
    x, weight, bias = operands(shape)
    weight, bias = (p + torch.arange(shape[-2])[:, None] for p in (weight, bias))
    for b in (bias, None):
        assert torch.equal(layer_norm(x, weight, b, 1e-5), grouped(x, weight, b))


@interpreted
@pytest.mark.parametrize("shape", [(3, 4, 8), (2, 5, 3, 33)])
def test_a_layer_norm_of_groups_in_the_interpreter(shape, monkeypatch):
    x, weight, bias = operands(shape)
    weight, bias = (p + torch.arange(shape[-2])[:, None] for p in (weight, bias))
    poison(monkeypatch)
    for b in (bias, None):
        out = layer_norm(x, weight, b, 1e-5, "triton")
        torch.testing.assert_close(out, grouped(x, weight, b), rtol=1e-5, atol=1e-5)


def test_weights_of_groups_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"weight \[3, 8\] does not fit x \[2, 4, 8\]; need \[4, 8\]"):
        layer_norm(torch.ones(2, 4, 8), torch.ones(3, 8), None, 1e-5)
    with pytest.raises(ValueError, match=r"weight \[4, 8\] does not fit x \[2, 4, 8\]; need \[8\]"):
        rms_norm(torch.ones(2, 4, 8), torch.ones(4, 8), 1e-5)
