"""Products of experts: groups cover every pair once, the kernel equals the reference, a pair's bits are its own."""

from __future__ import annotations

import itertools

import pytest
import torch

from specdec.kernels.linear import expert_groups, expert_linear
from specdec.kernels.linear.expert_groups import (
    MAX_PAIRS,
    group_by_expert,
    group_by_expert_reference,
    most_blocks,
)
from specdec.kernels.linear.expert_linear import TILES, add_experts, add_experts_reference
from specdec.kernels.linear.expert_linear import expert_linear as linear
from specdec.kernels.linear.linear_tiles import FLOAT32, Tile

# tokens, experts, experts per token, out, in
SHAPES = [(1, 1, 1, 1, 1), (1, 8, 2, 33, 16), (5, 4, 3, 32, 40), (40, 3, 1, 17, 64), (0, 4, 2, 8, 8)]
# The same products in another order: float32 rounds at 6e-8, float16 results at 5e-4.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def routes(tokens, experts, k, seed=0, device="cpu"):
    """[tokens * k] int64, distinct within a token; low experts are chosen most."""
    generator = torch.Generator().manual_seed(seed + tokens)
    scores = torch.rand(tokens, experts, generator=generator) - torch.arange(experts) / (2 * experts)
    return scores.topk(k, -1)[1].flatten().to(device)


def operands(shape, dtype=torch.float32, device="cpu", bias=True, input_first=False):
    tokens, experts, k, size_out, size_in = shape
    generator = torch.Generator().manual_seed(size_out)
    x = torch.randn(tokens, size_in, generator=generator).to(device, dtype)
    weight = (torch.randn(experts, size_out, size_in, generator=generator) / size_in**0.5).to(device, dtype)
    if input_first:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    b = torch.randn(experts, size_out, generator=generator).to(device, dtype) if bias else None
    return x, weight, b, routes(tokens, experts, k, device=device)


def poison(monkeypatch, module):
    """Uninitialised memory holds what no kernel writes."""
    empty = torch.empty

    def filled(*shape, **options):
        out = empty(*shape, **options)
        return out.fill_(float("nan") if out.is_floating_point() else -7)

    monkeypatch.setattr(module.torch, "empty", filled)


def covered(groups):
    """The pairs of each block."""
    return [(expert, groups.order[begin:end].tolist()) for expert, begin, end in groups.blocks.tolist() if begin < end]


@pytest.mark.parametrize("block_rows", [1, 4, 16])
@pytest.mark.parametrize("tokens, experts, k", [(1, 1, 1), (1, 8, 2), (7, 4, 3), (50, 5, 1), (0, 4, 2), (9, 64, 8)])
def test_blocks_cover_each_pair_once_and_hold_one_expert(tokens, experts, k, block_rows):
    ids = routes(tokens, experts, k)
    groups = group_by_expert_reference(ids, experts, block_rows)
    assert len(groups.blocks) == most_blocks(len(ids), experts, block_rows)
    blocks = covered(groups)
    assert sorted(pair for _, pairs in blocks for pair in pairs) == list(range(len(ids)))
    assert all(len(pairs) <= block_rows and all(ids[pair] == expert for pair in pairs) for expert, pairs in blocks)


def test_every_expert_may_end_in_a_short_block():
    """The bound on the number of blocks is reached, and holds however the pairs are spread."""
    ids = torch.tensor([0] * 17 + [1] * 17 + [2] * 17)
    assert len(covered(group_by_expert_reference(ids, 3, 16))) == most_blocks(51, 3, 16) == 6
    for seed in range(20):
        ids = torch.randint(0, 7, (60,), generator=torch.Generator().manual_seed(seed)) ** 2 % 7
        assert sum(len(pairs) for _, pairs in covered(group_by_expert_reference(ids, 7, 4))) == 60


@pytest.mark.interpreter
@pytest.mark.parametrize("block_rows", [2, 16])
@pytest.mark.parametrize("tokens, experts, k", [(1, 1, 1), (1, 8, 2), (7, 4, 3), (700, 5, 3), (0, 4, 2), (9, 60, 8)])
def test_kernel_in_the_interpreter_groups_as_the_reference(tokens, experts, k, block_rows, monkeypatch):
    poison(monkeypatch, expert_groups)
    ids = routes(tokens, experts, k)
    found, expected = (
        group_by_expert(ids, experts, "triton", block_rows),
        group_by_expert(ids, experts, "torch", block_rows),
    )
    assert torch.equal(found.order, expected.order) and torch.equal(found.blocks, expected.blocks)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_a_linear_per_pair(shape):
    for bias, input_first in itertools.product((True, False), (True, False)):
        x, weight, b, ids = operands(shape, bias=bias, input_first=input_first)
        out = linear(x, weight, b, ids)
        rows = x.repeat_interleave(shape[2], 0)
        expected = torch.einsum("pi,poi->po", rows, weight[ids]) + (b[ids] if bias else 0)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_in_the_interpreter_equals_the_reference(shape, monkeypatch):
    poison(monkeypatch, expert_linear)
    tiles = [Tile(16, 16, 16, False, 2, 4), Tile(16, 32, 32, True, 3, 4)]
    for tile, dtype, bias, first in itertools.product(tiles, TOLERANCE, (True, False), (True, False)):
        if dtype == torch.bfloat16:
            continue
        x, weight, b, ids = operands(shape, dtype, bias=bias, input_first=first)
        out = linear(x, weight, b, ids, group_by_expert(ids, shape[1], "triton", 16), "triton", tile)
        expected = linear(x.float(), weight.float(), None if b is None else b.float(), ids)
        close = torch.allclose(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert close, (tile, dtype, bias, first)


@pytest.mark.interpreter
def test_kernel_in_the_interpreter_takes_one_row_per_pair():
    """The second product of an expert: its x has as many rows as there are pairs."""
    x, weight, b, ids = operands((12, 5, 1, 20, 24))
    groups = group_by_expert(ids, 5, "triton")
    torch.testing.assert_close(
        linear(x, weight, b, ids, groups, "triton"), linear(x, weight, b, ids), rtol=1e-5, atol=1e-5
    )


def test_experts_are_added_in_the_order_of_their_rank():
    """In float16, 2048 + 1 is 2048: rank 0 first keeps the ones, and products are rounded before they are added."""
    y = torch.tensor([[1.0], [1.0], [2048.0]], dtype=torch.float16)
    assert add_experts(y, torch.ones(1, 3, dtype=torch.float16)).item() == 2050
    third = torch.full((1, 1), 1 / 3).half()
    rounded = (torch.tensor([[3.0]]).half() * third).float()
    exact = torch.tensor([[3.0]]) * third.float()
    assert rounded != exact
    y = torch.tensor([[3.0], [-1.0]], dtype=torch.float16)
    weights = torch.stack([third[0], torch.ones(1).half()], -1)
    assert add_experts_reference(y, weights).item() == (rounded - 1).item()
    assert add_experts_reference(y, weights.float()).item() == (exact - 1).half().item()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]
)
def test_sum_in_the_interpreter_has_the_bits_of_the_reference(dtypes, monkeypatch):
    poison(monkeypatch, expert_linear)
    generator = torch.Generator().manual_seed(0)
    for tokens, k, size in ((1, 1, 1), (3, 2, 33), (2, 8, 1500), (0, 2, 4)):
        y = torch.randn(tokens * k, size, generator=generator).to(dtypes[0])
        weights = torch.rand(tokens, k, generator=generator).to(dtypes[1])
        assert torch.equal(add_experts(y, weights, "triton"), add_experts(y, weights))


def test_wrong_operands_are_named():
    x, weight, b, ids = operands((3, 4, 2, 5, 6))
    with pytest.raises(ValueError, match=r"x \[3, 5\] does not fit weight \[4, 5, 6\]"):
        linear(x[:, :5], weight, b, ids)
    with pytest.raises(ValueError, match=r"bias \[3, 5\]"):
        linear(x, weight, b[:3], ids)
    with pytest.raises(ValueError, match="cast them"):
        linear(x.half(), weight, b, ids)
    with pytest.raises(ValueError, match="5 pairs of 3 rows"):
        linear(x, weight, b, ids[:5])
    with pytest.raises(ValueError, match=r"expert_ids \[3, 2\]"):
        group_by_expert(ids.view(3, 2), 4)
    with pytest.raises(ValueError, match=r"y \[5, 6\] does not fit weights \[3, 2\]"):
        add_experts(torch.ones(5, 6), torch.ones(3, 2))


@pytest.mark.interpreter
def test_wrong_operands_of_the_kernel_are_named():
    x, weight, b, ids = operands((3, 4, 2, 5, 6))
    with pytest.raises(ValueError, match="needs the groups"):
        linear(x, weight, b, ids, None, "triton")
    with pytest.raises(ValueError, match="a tile of 32 rows for groups of 16"):
        linear(x.half(), weight.half(), b.half(), ids, group_by_expert(ids, 4), "triton", TILES[32])
    with pytest.raises(ValueError, match="float64"):
        linear(x.double(), weight.double(), b.double(), ids, group_by_expert(ids, 4), "triton")


def mlp(x, weights, biases, ids, groups, k, tile=None):
    """What an experts module does: up, a gate, down, the sum."""
    hidden = torch.tanh(linear(x, weights[0], biases[0], ids, groups, tile=tile))
    y = linear(hidden, weights[1], biases[1], ids, groups, tile=tile)
    return add_experts(y, torch.ones(len(x), k, device=x.device, dtype=x.dtype) / k)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("input_first", [False, True])
@pytest.mark.parametrize("experts, k, hidden, inner", [(128, 8, 512, 192), (8, 2, 256, 352), (32, 4, 360, 360)])
def test_bits_on_a_gpu_depend_neither_on_the_batch_nor_on_tiles(experts, k, hidden, inner, input_first, dtype):
    tokens = 300
    x, up, up_bias, ids = operands((tokens, experts, k, inner, hidden), dtype, "cuda", input_first=input_first)
    _, down, down_bias, _ = operands((1, experts, k, hidden, inner), dtype, "cuda", input_first=input_first)
    weights, biases = (up, down), (up_bias, down_bias)
    expected = mlp(x, weights, biases, ids, group_by_expert(ids, experts), k)
    for begin, end in ((0, 1), (5, 6), (0, 2), (10, 17), (40, 72), (100, 292), (1, 300)):
        some = ids.view(tokens, k)[begin:end].flatten()
        assert torch.equal(
            mlp(x[begin:end], weights, biases, some, group_by_expert(some, experts), k), expected[begin:end]
        )
    for rows, tile in TILES.items():
        tile = FLOAT32._replace(block_rows=rows) if dtype == torch.float32 else tile
        groups = group_by_expert(ids, experts, block_rows=rows)
        for swapped in (True, False):
            assert torch.equal(mlp(x, weights, biases, ids, groups, k, tile._replace(swapped=swapped)), expected)
    exact = linear(x.double(), up.double(), up_bias.double(), ids, implementation="torch")
    found = linear(x, up, up_bias, ids, group_by_expert(ids, experts))
    torch.testing.assert_close(found.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.gpu
def test_on_a_gpu_experts_are_grouped_alike_by_both_ways_and_captured():
    for tokens, experts, k in ((1, 128, 8), (192, 128, 8), (MAX_PAIRS // 2, 40, 2), (MAX_PAIRS, 40, 2)):
        ids = routes(tokens, experts, k, device="cuda")
        found = group_by_expert(ids, experts)
        expected = group_by_expert_reference(ids, experts, found.block_rows)
        assert torch.equal(found.order, expected.order) and torch.equal(found.blocks, expected.blocks)
    x, up, up_bias, ids = operands((6, 16, 4, 64, 64), torch.bfloat16, "cuda")
    linear(x, up, up_bias, ids, group_by_expert(ids, 16))
    graph, other = torch.cuda.CUDAGraph(), routes(6, 16, 4, seed=1, device="cuda")
    with torch.cuda.graph(graph):
        out = linear(x, up, up_bias, ids, group_by_expert(ids, 16))
    ids.copy_(other)  # other experts through the same graph
    graph.replay()
    assert torch.equal(out, linear(x, up, up_bias, other, group_by_expert(other, 16)))
