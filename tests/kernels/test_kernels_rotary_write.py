"""Rotation and cache write: the reference against transformers' functions, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from specdec.kernels.attention import rotary_write as kernels
from specdec.kernels.attention.rotary_write import HeadNorm, rotary_write
from specdec.kernels.linear.norms import rms_norm

interpreted = pytest.mark.interpreter
SLOTS = 11
ARITHMETIC = {"qwen3": (False, True), "gemma3": (True, False)}  # unit_offset and round_first of the head norms
MODULES = {"qwen3": Qwen3RMSNorm, "gemma3": Gemma3RMSNorm}
# rows, width, heads, key heads, head dimension
SHAPES = [(1, 1, 1, 1, 2), (2, 3, 4, 2, 8), (3, 2, 3, 1, 6), (2, 5, 4, 4, 16)]


def operands(shape, normed, dtype=torch.float32, device="cpu"):
    rows, width, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    angle = torch.rand(SLOTS, dim // 2, generator=generator).repeat(1, 2) * 6
    cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
    starts = torch.randint(SLOTS - width + 1, (rows,), generator=generator).to(device)
    # The cache of a larger batch, of which these are some rows.
    keys, values = (randn(rows + 2, SLOTS, kv_heads, dim)[1 : rows + 1] for _ in range(2))
    norm = HeadNorm(randn(dim), randn(dim), 1e-6, *ARITHMETIC[normed]) if normed else None
    return randn(rows, width, (heads + 2 * kv_heads) * dim), starts, cos, sin, keys, values, norm


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normed", [None, *ARITHMETIC])
def test_reference_is_what_transformers_computes(shape, normed):
    rows, width, heads, kv_heads, dim = shape
    qkv, starts, cos, sin, keys, values, norm = operands(shape, normed)
    before = keys.clone(), values.clone()
    query, key, value = qkv.view(rows, width, -1, dim).split([heads, kv_heads, kv_heads], 2)
    if norm is not None:
        for x, weight in ((query, norm.query_weight), (key, norm.key_weight)):
            module = MODULES[normed](dim, norm.eps)
            module.weight.data = weight
            x.copy_(module(x).detach())
    place = starts[:, None] + torch.arange(width)
    expected = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos[place], sin[place])
    qkv, *_ = operands(shape, normed)
    out = rotary_write(qkv, starts, cos, sin, keys, values, norm)
    torch.testing.assert_close(out, expected[0].transpose(1, 2))
    for row in range(rows):
        here = slice(int(starts[row]), int(starts[row]) + width)
        torch.testing.assert_close(keys[row, here], expected[1].transpose(1, 2)[row])
        assert torch.equal(values[row, here], value[row])
        keys[row, here], values[row, here] = before[0][row, here], before[1][row, here]
    assert torch.equal(keys, before[0]), "a slot that is not the step's own was written"
    assert torch.equal(values, before[1])


def shuffled(starts, width):
    """[rows, width] int64, places other than the slots."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(SLOTS, (len(starts), width), generator=generator).to(starts.device)


def test_places_turn_and_slots_receive():
    qkv, starts, cos, sin, keys, values, norm = operands((2, 3, 4, 2, 8), None)
    places = shuffled(starts, 3)
    out = rotary_write(qkv, starts, cos, sin, keys, values, norm, places)
    for column in range(3):
        alone = keys.clone(), values.clone()
        turned = rotary_write(qkv[:, column : column + 1], places[:, column].contiguous(), cos, sin, *alone, norm)
        assert torch.equal(out[:, column], turned[:, 0])
        for row, (slot, place) in enumerate(zip(starts + column, places[:, column], strict=True)):
            assert torch.equal(keys[row, slot], alone[0][row, place])
            assert torch.equal(values[row, slot], alone[1][row, place])


@interpreted
@pytest.mark.parametrize("shape, dtype", [*((shape, torch.float32) for shape in SHAPES), (SHAPES[1], torch.float16)])
@pytest.mark.parametrize("normed", [None, *ARITHMETIC])
@pytest.mark.parametrize("many", [1, kernels.MANY_TOKENS])
def test_kernel_in_the_interpreter_equals_the_reference(shape, normed, dtype, many, monkeypatch):
    """With a program per head, and with one for several heads where their numbers have a common divisor."""
    monkeypatch.setattr(kernels, "MANY_TOKENS", many)
    empty = torch.empty
    monkeypatch.setattr(kernels.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    ours, reference = operands(shape, normed, dtype), operands(shape, normed, dtype)
    # The head norm's sum runs in another order.
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=4e-3, atol=4e-3)
    for places in (None, shuffled(ours[1], shape[1])):
        out = rotary_write(*ours, places, "triton")
        torch.testing.assert_close(out, rotary_write(*reference, places, "torch"), **tolerance)
        torch.testing.assert_close(ours[4], reference[4], **tolerance)
        assert torch.equal(ours[5], reference[5])


def test_wrong_operands_are_named():
    qkv, starts, cos, sin, keys, values, _ = operands((2, 3, 4, 2, 8), None)
    with pytest.raises(ValueError, match="does not fit 2 key heads of 8"):
        rotary_write(qkv[..., :33], starts, cos, sin, keys, values)
    with pytest.raises(ValueError, match="do not fit 2 rows"):
        rotary_write(qkv, starts, cos, sin, keys[:1], values)
    with pytest.raises(ValueError, match="float64"):
        rotary_write(qkv, starts, cos.double(), sin.double(), keys, values)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("normed", [None, *ARITHMETIC])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("many", [1, kernels.MANY_TOKENS])
def test_bits_on_a_gpu_are_those_of_the_operations_apart(dtype, normed, dim, many, monkeypatch):
    monkeypatch.setattr(kernels, "MANY_TOKENS", many)
    shape = (3, 4, 8, 2, dim)
    qkv, starts, cos, sin, keys, values, norm = operands(shape, normed, dtype, "cuda")
    query, key, value = qkv.view(3, 4, -1, dim).split([8, 2, 2], 2)
    if norm is not None:
        query, key = rms_norm(query, norm.query_weight, *norm[2:]), rms_norm(key, norm.key_weight, *norm[2:])
    place = starts[:, None] + torch.arange(4, device="cuda")
    expected = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos[place], sin[place])
    assert torch.equal(rotary_write(qkv, starts, cos, sin, keys, values, norm), expected[0].transpose(1, 2))
    for row, start in enumerate(starts.tolist()):
        assert torch.equal(keys[row, start : start + 4], expected[1].transpose(1, 2)[row])
        assert torch.equal(values[row, start : start + 4], value[row])
