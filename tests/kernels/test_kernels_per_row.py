"""Softmax, sum and top-k of rows: references against torch, kernels against references, rows against each other."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels.linear import per_row
from specdec.kernels.linear.per_row import of_each_row, row_softmax, row_sum, row_top_k

SHAPES = [(0, 5), (1, 1), (3, 4), (2, 3, 33), (5, 128), (2, 300)]
DTYPES = [torch.float32, torch.float16]


def operand(shape, dtype=torch.float32, device="cpu"):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(device, dtype)


def poison(monkeypatch):
    empty = torch.empty

    def filled(*shape, **options):
        out = empty(*shape, **options)
        return out.fill_(float("nan") if out.is_floating_point() else -1)

    monkeypatch.setattr(per_row.torch, "empty", filled)


@pytest.mark.parametrize("shape", SHAPES)
def test_references_are_torchs(shape):
    x = operand(shape)
    torch.testing.assert_close(row_softmax(x), torch.softmax(x, -1))
    torch.testing.assert_close(row_sum(x), x.sum(-1, keepdim=True), rtol=1e-5, atol=1e-5)
    values, indices = row_top_k(x, min(3, shape[-1]))
    assert torch.equal(values, x.topk(min(3, shape[-1]), -1)[0])
    assert torch.equal(x.gather(-1, indices), values)


def test_half_precision_is_summed_in_float32_and_rounded_to_the_dtype_asked_for():
    x = torch.full((1, 4096), 0.5, dtype=torch.float16)
    x[0, 0] = 2048  # half precision would lose every later addend
    assert row_sum(x, torch.float32).item() == 2048 + 4095 * 0.5
    assert row_sum(x).dtype == torch.float16 and row_softmax(x, torch.float32).dtype == torch.float32


def test_ties_go_to_the_lowest_index():
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert row_top_k(x, 4)[1].tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_reference_rows_do_not_depend_on_their_batch():
    """Fails if a vectorised exponential runs over all rows: their tails are computed otherwise."""
    x = operand((37, 5))
    together = row_softmax(x)
    assert all(torch.equal(row_softmax(x[row : row + 1]), together[row : row + 1]) for row in range(len(x)))


def test_a_function_of_each_row_keeps_the_shape_in_front():
    x = operand((2, 3, 6))
    assert torch.equal(of_each_row(lambda row: row[..., ::2] * 2, x), x[..., ::2] * 2)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_in_the_interpreter_equal_the_references(shape, dtype, monkeypatch):
    poison(monkeypatch)
    x = operand(shape, dtype)
    # Two exponentials and two orders of a sum; half precision rounds once at the end.
    rtol = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(row_softmax(x, implementation="triton"), row_softmax(x), rtol=rtol, atol=1e-6)
    wide = row_softmax(x, torch.float32, "triton")
    torch.testing.assert_close(wide, row_softmax(x, torch.float32), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(row_sum(x, implementation="triton"), row_sum(x), rtol=rtol, atol=1e-4)
    for k in {1, shape[-1] // 2, min(shape[-1], 8)} - {0}:
        for found, expected in zip(row_top_k(x, k, "triton"), row_top_k(x, k), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.interpreter
def test_kernel_in_the_interpreter_chooses_an_index_whatever_the_row_holds():
    """Indices beyond the row would read experts that do not exist."""
    x = torch.tensor([[float("-inf")] * 5, [1.0, float("nan"), 3.0, float("inf"), float("nan")], [2.0] * 5])
    indices = row_top_k(x, 4, "triton")[1]
    assert indices.tolist() == [[0, 1, 2, 3], [1, 3, 4, 2], [0, 1, 2, 3]]


def test_wrong_operands_are_named():
    with pytest.raises(ValueError, match="k=6 of rows of 5"):
        row_top_k(torch.ones(2, 5), 6)
    with pytest.raises(ValueError, match="k=0"):
        row_top_k(torch.ones(2, 5), 0)


@pytest.mark.interpreter
def test_wrong_operands_of_the_kernels_are_named():
    with pytest.raises(ValueError, match="int64"):
        row_sum(torch.ones(2, 5).long(), implementation="triton")
    with pytest.raises(ValueError, match="rows of 40000 values; the kernel serves 1 to 32768"):
        row_softmax(torch.ones(1, 40000), implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [4, 32, 128, 384])
def test_bits_on_a_gpu_do_not_depend_on_the_batch(dtype, size):
    x = operand((300, size), dtype, "cuda")
    x[:, 1] = x[:, 0]  # a tie in every row
    functions = [
        row_softmax, row_sum, lambda x: row_softmax(x, torch.float32), lambda x: row_top_k(x, 4)[0],
        lambda x: row_top_k(x, 4)[1],
    ]  # fmt: skip
    for function in functions:
        together = function(x)
        for begin, end in ((0, 1), (7, 8), (20, 52), (1, 300)):
            assert torch.equal(function(x[begin:end]), together[begin:end])
    assert torch.equal(row_top_k(x, 4)[1], row_top_k(x, 4, "torch")[1])
    torch.testing.assert_close(row_softmax(x), torch.softmax(x.float(), -1).to(dtype))
