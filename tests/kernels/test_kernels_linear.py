"""The in-order linear: the reference against torch, the kernel against the reference, rows against each other."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from specdec.kernels.linear import in_order_linear as kernels
from specdec.kernels.linear.descriptor_linear import fits_descriptors
from specdec.kernels.linear.in_order_linear import in_order_linear, in_order_linears, is_input_first
from specdec.kernels.linear.linear_tiles import (
    BUCKETS,
    DEFAULTS,
    FLOAT32,
    MANY_ROWS,
    POINTER_TILES,
    TUNED,
    Tile,
    choose_tile,
    fitted,
)

# The same products in another order: float32 rounds at 6e-8, float16 results at 5e-4.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(0, 16, 16), (1, 1, 1), (1, 70, 33), (3, 16, 64), (17, 65, 100), (2, 5, 128), (40, 32, 31)]
TILES = [Tile(16, 16, 16, False, 2, 4), Tile(16, 32, 32, True, 3, 4)]
DESCRIBED = [
    Tile(16, 16, 16, False, 2, 4, descriptors=True),
    Tile(16, 32, 32, True, 3, 4, descriptors=True, parts=3, persistent=1),
    Tile(16, 32, 16, False, 2, 4, descriptors=True, parts=2, persistent=2, halves=True, group=2),
]


def operands(rows, size_out, size_in, dtype=torch.float32, device="cpu", bias=True):
    generator = torch.Generator().manual_seed(rows + size_out)
    tensors = [
        torch.randn(*shape, generator=generator) for shape in ((rows, size_in), (size_out, size_in), (size_out,))
    ]
    x, weight, b = (tensor.to(device, dtype) for tensor in tensors)
    return x, weight / size_in**0.5, b if bias else None


def poison(monkeypatch):
    """Uninitialised memory holds NaN, so that an element nobody wrote is seen."""
    empty = torch.empty
    monkeypatch.setattr(
        kernels.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")) if a else empty(*a, **k)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_a_linear(shape):
    for bias in (True, False):
        x, weight, b = operands(*shape, bias=bias)
        out, expected = in_order_linear(x, weight, b), F.linear(x, weight, b)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5), f"bias={bias}"


def test_reference_rows_do_not_depend_on_their_batch():
    """Fails if the rows are multiplied together: a BLAS orders its sums by the number of rows."""
    x, weight, b = operands(33, 130, 517)
    together = in_order_linear(x, weight, b)
    for row in range(len(x)):
        assert torch.equal(together[row], in_order_linear(x[row], weight, b))


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_in_the_interpreter_equals_the_reference(shape, monkeypatch):
    poison(monkeypatch)
    for tile, dtype, bias in itertools.product(TILES, (torch.float32, torch.float16), (True, False)):
        x, weight, b = operands(*shape, dtype, bias=bias)
        out = in_order_linear(x, weight, b, "triton", tile)
        expected = in_order_linear(x.float(), weight.float(), None if b is None else b.float())
        assert torch.allclose(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]), (tile, dtype, bias)


@pytest.mark.interpreter
def test_kernel_in_the_interpreter_takes_leading_dimensions_and_strides():
    x, weight, b = operands(12, 20, 24)
    out = in_order_linear(x.view(3, 4, 24).transpose(0, 1), weight, b, "triton", TILES[0])
    torch.testing.assert_close(out, F.linear(x, weight, b).view(3, 4, 20).transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0]])
def test_kernel_in_the_interpreter_reads_weights_that_lie_input_first_in_place(shape, monkeypatch):
    """The layout of GPT-2's Conv1D. Fails if the strides are mixed up, or if the weights are copied."""
    poison(monkeypatch)
    seen = set()
    for tile, dtype in itertools.product(TILES, (torch.float32, torch.float16)):
        x, weight, b = operands(*shape, dtype)
        expected = in_order_linear(x, weight, b, "triton", tile)
        transposed = weight.t().contiguous().t()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "is_input_first", lambda w: seen.add(w.data_ptr()) or is_input_first(w))
            assert torch.equal(in_order_linear(x, transposed, b, "triton", tile), expected), (tile, dtype)
        assert seen == {transposed.data_ptr()}
        seen.clear()
    pair = [transposed, transposed]
    assert torch.equal(in_order_linears(x, pair, [b, b], "triton", tile), torch.cat([expected, expected], -1))


@pytest.mark.interpreter
def test_every_way_in_the_interpreter_reads_weights_that_lie_input_first():
    """By the tiles of the table, for few rows and for many. Fails if a way takes the weights for contiguous ones."""
    for rows, dtype in itertools.product((4, 600), (torch.float32, torch.float16)):
        x, weight, b = operands(rows, 64, 32, dtype)
        found = in_order_linear(x, weight.t().contiguous().t(), b, "triton")
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(found, in_order_linear(x, weight, b, "triton"), rtol=tolerance, atol=tolerance)


SIZES_TOGETHER = [(16, 16, 16), (33, 5), (40, 1, 17), (70, 70)]


@pytest.mark.parametrize("sizes", SIZES_TOGETHER)
@pytest.mark.parametrize("bias", [True, False])
def test_linears_of_one_input_are_each_alone_side_by_side(sizes, bias):
    operand = [operands(5, size, 24, bias=bias) for size in sizes]
    x = operand[0][0]
    expected = torch.cat([in_order_linear(x, weight, b) for _, weight, b in operand], -1)
    assert torch.equal(in_order_linears(x, [w for _, w, _ in operand], [b for *_, b in operand]), expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", SIZES_TOGETHER)
def test_kernel_of_several_weights_in_the_interpreter(sizes, monkeypatch):
    poison(monkeypatch)
    for tile, bias in itertools.product(TILES, (True, False)):
        operand = [operands(5, size, 24, bias=bias) for size in sizes]
        weights, biases = [w for _, w, _ in operand], [b for *_, b in operand]
        out = in_order_linears(operand[0][0], weights, biases, "triton", tile)
        expected = in_order_linears(operand[0][0], weights, biases)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5), (tile, bias)


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", [(8,), (40,), (16, 56), (72, 8, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_kernel_of_descriptors_in_the_interpreter(sizes, bias, monkeypatch):
    """Odd numbers of rows, sizes that are no multiple of a block, several weights side by side."""
    poison(monkeypatch)
    for tile, rows in itertools.product(DESCRIBED, (1, 33, 70)):
        operand = [operands(rows, size, 40, torch.float16, bias=bias) for size in sizes]
        x, weights, biases = operand[0][0], [w for _, w, _ in operand], [b for *_, b in operand]
        assert fits_descriptors(x, weights)
        out = in_order_linears(x, weights, biases, "triton", tile)
        expected = torch.cat([F.linear(x.float(), w.float(), b if b is None else b.float()) for _, w, b in operand], -1)
        assert torch.allclose(out.float(), expected, rtol=2e-3, atol=2e-3), (tile, rows)


@pytest.mark.interpreter
def test_what_descriptors_cannot_read():
    """Rows of 16 bytes' multiples at such addresses, in the tensor cores' dtypes."""
    x, weight, _ = operands(3, 16, 24, torch.float16)
    assert fits_descriptors(x, [weight])
    assert not fits_descriptors(x.float(), [weight.float()])
    assert not fits_descriptors(x[:, :20].contiguous(), [weight[:, :20].contiguous()])
    assert not fits_descriptors(x, [weight, weight[:15]])
    assert not fits_descriptors(x, [torch.empty(16 * 24 + 1, dtype=torch.float16)[1:].view(16, 24)])


@pytest.mark.interpreter
def test_operands_that_descriptors_cannot_read_take_the_other_kernel():
    x, weight, b = operands(5, 7, 20)
    out = in_order_linear(x, weight, b, "triton", DESCRIBED[0])
    torch.testing.assert_close(out, F.linear(x, weight, b), rtol=1e-5, atol=1e-5)


def test_every_number_of_rows_has_a_tile():
    assert all(len(tiles) in (len(BUCKETS) - 1, len(BUCKETS)) for tiles in (DEFAULTS, *TUNED.values()))
    assert choose_tile(1, 7, 7, torch.bfloat16) == DEFAULTS[0]
    assert choose_tile(17, 7, 7, torch.bfloat16) == DEFAULTS[2]
    assert choose_tile(256, 7, 7, torch.bfloat16) == DEFAULTS[-1]
    assert choose_tile(512, 6144, 4096, torch.bfloat16) == TUNED[6144, 4096][-1]
    assert choose_tile(10**6, 6144, 4096, torch.float32) == FLOAT32


@pytest.mark.parametrize(
    "rows, size_out, block",
    [(512, 4096, (128, 128)), (1024, 6144, (128, 128)), (1024, 1024, (64, 64)), (16384, 1024, (128, 256))],
)
def test_many_rows_take_the_largest_tile_that_fills_the_processors(rows, size_out, block):
    """1024 x 6144 in tiles of 128 x 256 would leave half the processors idle in the second of two waves."""
    assert choose_tile(rows, size_out, 96, torch.bfloat16)[:2] == block


def test_tiles_fit_a_hopper_processor():
    """Shared memory for the loads in flight and a result on its way out; float32 sums in the registers."""
    tiles = {*DEFAULTS, *POINTER_TILES, *(tile for tile, _ in MANY_ROWS), *itertools.chain(*TUNED.values())}
    for tile in tiles:
        in_flight = tile.num_stages * tile.block_in * (tile.block_rows * tile.parts + tile.block_out) * 2
        leaving = tile.block_rows * tile.block_out * 2 // (1 + tile.halves) if tile.persistent else 0
        assert (in_flight + leaving) * max(1, tile.persistent) <= 226 * 1024, tile
        assert tile.block_rows * tile.parts * tile.block_out <= 128 * 32 * tile.num_warps, tile
        assert tile.descriptors or tile[7:] == Tile(1, 1, 1, False, 1, 1)[7:], f"{tile}: only descriptors know these"
    assert not any(tile.descriptors for tile in POINTER_TILES)


def test_wrong_operands_are_named():
    x, weight, b = operands(3, 4, 5)
    with pytest.raises(ValueError, match=r"\[3, 5\] does not fit weight \[5, 4\]"):
        in_order_linear(x, weight.t())
    with pytest.raises(ValueError, match="bias"):
        in_order_linear(x, weight, b[:3])
    with pytest.raises(ValueError, match="cast them"):
        in_order_linear(x.double(), weight)
    with pytest.raises(ValueError, match="choose 'auto'"):
        in_order_linear(x, weight, implementation="cuda")
    with pytest.raises(ValueError, match="4 weights and 4 biases; need 1 to 3"):
        in_order_linears(x, [weight] * 4, [b] * 4)
    with pytest.raises(ValueError, match="others do not"):
        in_order_linears(x, [weight] * 2, [b, None])


def test_an_unavailable_kernel_is_not_replaced(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter takes CPU tensors
    x, weight, _ = operands(3, 4, 5)
    with pytest.raises(RuntimeError, match="needs"):
        in_order_linear(x, weight, implementation="triton")


GPU_TILES = [
    Tile(16, 32, 128, True, 3, 4),
    Tile(16, 64, 64, True, 4, 4),
    Tile(32, 64, 64, False, 3, 4),
    Tile(64, 64, 32, False, 2, 4),
    Tile(64, 128, 64, True, 3, 8),
    Tile(128, 128, 64, False, 3, 8),
]


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_bits_on_a_gpu_of_several_weights_are_those_of_each(bias):
    operand = [operands(40, size, 512, torch.bfloat16, "cuda", bias) for size in (384, 100, 130)]
    x = operand[0][0]
    for count in (2, 3):
        for rows in (1, 8, 40):
            expected = torch.cat([in_order_linear(x[:rows], w, b) for _, w, b in operand[:count]], -1)
            weights, biases = [w for _, w, _ in operand[:count]], [b for *_, b in operand[:count]]
            assert torch.equal(in_order_linears(x[:rows], weights, biases), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(384, 1024), (1000, 97)])
def test_bits_on_a_gpu_depend_neither_on_rows_nor_on_tiles(dtype, shape):
    x, weight, b = operands(300, *shape, dtype, "cuda")
    expected = in_order_linear(x, weight, b)
    for rows in (1, 2, 7, 16, 17, 64, 65, 299):
        assert torch.equal(in_order_linear(x[:rows], weight, b), expected[:rows])
    for tile in GPU_TILES if dtype != torch.float32 else [Tile(16, 32, 16, False, 2, 4), Tile(32, 32, 32, True, 2, 4)]:
        assert torch.equal(in_order_linear(x, weight, b, tile=tile), expected), tile
    transposed = weight.t().contiguous().t()
    for rows in (1, 17, 300):
        assert torch.equal(in_order_linear(x[:rows], transposed, b), expected[:rows])
    exact = F.linear(x.double(), weight.double(), b.double())
    torch.testing.assert_close(expected.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


GPU_DESCRIBED = [
    Tile(16, 16, 256, True, 4, 4, descriptors=True, persistent=2),
    Tile(16, 64, 128, True, 6, 4, descriptors=True, persistent=1),
    Tile(32, 64, 128, True, 4, 4, descriptors=True, parts=3),
    Tile(64, 64, 64, False, 6, 4, descriptors=True, parts=3),
    Tile(64, 128, 128, False, 3, 4, descriptors=True, parts=2, persistent=1, halves=True),
    Tile(128, 128, 64, False, 4, 4, descriptors=True, persistent=1, halves=True),
    Tile(128, 256, 64, False, 3, 8, descriptors=True, persistent=1),
    Tile(128, 256, 64, False, 4, 8, descriptors=True, persistent=1, halves=True, group=16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1024,), (1000,), (384, 200), (520, 8, 136)])
@pytest.mark.parametrize("bias", [True, False])
def test_bits_on_a_gpu_of_descriptors_are_those_of_pointers(dtype, sizes, bias, monkeypatch):
    """1000 and 1032 are multiples of no block: every program at an edge reads and writes past it if it can."""
    poison(monkeypatch)
    for size_in, rows in ((1032, 300), (4096, 1000)):
        operand = [operands(rows, size, size_in, dtype, "cuda", bias) for size in sizes]
        x, weights, biases = operand[0][0], [w for _, w, _ in operand], [b for *_, b in operand]
        expected = in_order_linears(x, weights, biases, tile=Tile(16, 32, 128, True, 3, 4))
        for tile in GPU_DESCRIBED:
            for count in (1, 17, 192, rows):
                out = in_order_linears(x[:count], weights, biases, tile=tile)
                assert torch.equal(out, expected[:count]), (tile, count, size_in)


@pytest.mark.gpu
def test_descriptors_in_a_captured_graph_read_what_stands_in_their_tensors_now():
    x, weight, _ = operands(200, 512, 1024, torch.bfloat16, "cuda")
    tile = GPU_DESCRIBED[3]
    in_order_linear(x, weight, tile=tile)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = in_order_linear(x, weight, tile=tile)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, in_order_linear(x, weight, tile=GPU_TILES[0]))


SHARED_MEMORY = {"Hopper": 232448, "A100": 166912, "most others": 101376}


@pytest.mark.parametrize("shared", SHARED_MEMORY.values(), ids=SHARED_MEMORY)
def test_tiles_fit_into_shared_memory(shared):
    """At most one stage of operands per load in flight; nothing else of a tile changes, nor anything on Hopper."""
    tiles = {*DEFAULTS, *POINTER_TILES, *(tile for row in TUNED.values() for tile in row)}
    for tile in (tile for tile in tiles if not tile.descriptors):
        chosen = fitted(tile, 2, shared)
        assert chosen.num_stages * 2 * chosen.block_in * (chosen.block_rows + chosen.block_out) <= shared
        assert 2 <= chosen.num_stages <= tile.num_stages and chosen._replace(num_stages=tile.num_stages) == tile
        assert shared < SHARED_MEMORY["Hopper"] or chosen == tile
    assert fitted(FLOAT32, 4, 49152) == FLOAT32
