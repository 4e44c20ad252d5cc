"""Ragged attention: the reference against SDPA, the kernel against the reference, and bits on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.attention import ragged_attention as kernels
from specdec.kernels.attention.ragged_attention import BLOCK_KEYS, TREE_SLOTS, Tree, fitting, ragged_attention

interpreted = pytest.mark.interpreter


def operands(rows, heads, kv_heads, width, slots, dim, value_dim=None, dtype=torch.float32, device="cpu"):
    """Keys and values as a ragged cache hands them out: [rows, slots, heads, dim] seen as [rows, heads, slots, dim]."""
    generator = torch.Generator().manual_seed(slots + dim)
    query = torch.randn(rows, heads, width, dim, generator=generator)
    key = torch.randn(rows, slots, kv_heads, dim, generator=generator).transpose(1, 2)
    value = torch.randn(rows, slots, kv_heads, value_dim or dim, generator=generator).transpose(1, 2)
    return [tensor.to(device, dtype) for tensor in (query, key, value)]


def causal_spans(starts, width, window=None, origins=None, device="cpu"):
    """[rows, width, 3]: query j of a row sits at slot starts[row] + j and sees what lies before, within the window."""
    origin = torch.tensor(origins or [0] * len(starts), dtype=torch.int32)[:, None].expand(-1, width)
    high = torch.tensor(starts, dtype=torch.int32)[:, None] + torch.arange(1, width + 1, dtype=torch.int32)
    low = torch.zeros_like(high) if window is None else high - window
    low = torch.maximum(low, origin).clamp(min=0)
    return torch.stack([low, high, origin], -1).to(device).contiguous()


def dense(query, key, value, spans, scaling, softcap=None, sinks=None, tree=None):
    """All queries of a batch over all slots, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    slot = torch.arange(key.shape[2], device=key.device)
    visible = (slot >= spans[..., :1]) & (slot < spans[..., 1:2])
    if tree is not None:
        visible &= shown(tree, key.shape[2])
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(len(scores), -1, scores.shape[2], 1)], -1)
    weights = torch.softmax(scores, -1).nan_to_num()[..., : key.shape[2]]
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2)


CASES = [
    # rows, heads, kv_heads, width, slots, dim, value_dim, starts, window, origins
    (1, 1, 1, 1, 1, 16, 16, [0], None, None),
    (2, 4, 2, 3, 40, 16, 16, [37, 5], None, None),
    (3, 6, 2, 5, 70, 24, 24, [0, 65, 31], None, [0, 60, 7]),
    (2, 3, 1, 4, 50, 16, 32, [46, 20], 9, None),
    (2, 2, 1, 2, 33, 8, 8, [31, 12], 20, [-5, 3]),
    (1, 2, 2, 40, 40, 16, 16, [0], None, None),
    (2, 2, 1, 1, 200, 16, 16, [199, 130], None, None),
]


def case_operands(case, **options):
    rows, heads, kv_heads, width, slots, dim, value_dim, starts, window, origins = case
    tensors = operands(rows, heads, kv_heads, width, slots, dim, value_dim, **options)
    return tensors, causal_spans(starts, width, window, origins, options.get("device", "cpu"))


@pytest.mark.parametrize("case", CASES)
def test_reference_is_softmax_attention(case):
    (query, key, value), spans = case_operands(case)
    sinks = torch.linspace(-1, 1, query.shape[1])
    for options in ({}, {"softcap": 2.0}, {"sinks": sinks}):
        out = ragged_attention(query, key, value, spans, 0.3, **options)
        torch.testing.assert_close(out.double(), dense(query, key, value, spans, 0.3, **options), rtol=1e-5, atol=1e-5)


def test_causal_spans_are_causal_attention():
    query, key, value = operands(2, 4, 2, 7, 7, 16)
    out = ragged_attention(query, key, value, causal_spans([0, 0], 7), 0.25)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_reference_bits_depend_on_the_query_and_its_keys_alone():
    """One query alone, among others, in a longer buffer and behind padding."""
    query, key, value = operands(2, 4, 2, 6, 50, 16)
    spans = causal_spans([30, 44], 6)
    together = ragged_attention(query, key, value, spans, 0.25)
    alone = ragged_attention(query[1:, :, 2:3], key[1:], value[1:], spans[1:, 2:3].contiguous(), 0.25)
    assert torch.equal(alone[0, 0], together[1, 2])
    padded_key, padded_value = (F.pad(x, (0, 0, 11, 3)) for x in (key, value))
    shifted = ragged_attention(query, padded_key, padded_value, spans + 11, 0.25)
    assert torch.equal(shifted, together)


def test_a_query_that_sees_nothing_gives_zeros():
    query, key, value = operands(1, 2, 1, 2, 5, 16)
    spans = torch.tensor([[[3, 3, 3], [3, 4, 3]]], dtype=torch.int32)
    out = ragged_attention(query, key, value, spans, 0.25)
    assert out[0, 0].eq(0).all() and torch.equal(out[0, 1], value[0, :, 3].expand(2, -1))


def shown(tree, num_slots):
    """[rows, width, num_slots] bool, bit by bit."""
    rows, width = tree.mask.shape
    out = torch.zeros(rows, width, num_slots, dtype=torch.bool)
    for row, start in enumerate(tree.starts.tolist()):
        for column, mask in enumerate(tree.mask[row].tolist()):
            own = [slot for slot in range(start, min(num_slots, start + TREE_SLOTS)) if mask >> (slot - start) & 1]
            out[row, column, [*range(min(start, num_slots)), *own]] = True
    return out.to(tree.mask.device)


def chain(starts, width, device="cpu"):
    """Every query sees those before it and itself, written as a tree."""
    mask = torch.tensor([-1 if j == TREE_SLOTS - 1 else (1 << (j + 1)) - 1 for j in range(width)], device=device)
    return Tree(torch.tensor(starts, device=device), mask.expand(len(starts), -1).contiguous())


def random_tree(starts, width, seed, device="cpu"):
    """Each query has a parent before it, or none, and sees its ancestors and itself."""
    generator, mask = torch.Generator().manual_seed(seed), torch.zeros(len(starts), width, dtype=torch.long)
    for row in range(len(starts)):
        for j in range(width):
            parent = int(torch.randint(-1, j, (1,), generator=generator)) if j else -1
            mask[row, j] = (1 << j if j < TREE_SLOTS - 1 else -(1 << j)) | (mask[row, parent] if parent >= 0 else 0)
    return Tree(torch.tensor(starts, device=device), mask.to(device))


TREES = [
    # rows, heads, kv_heads, width, slots, starts, window, origins
    (1, 2, 1, 63, 80, [16], None, None),
    (3, 6, 2, 9, 70, [0, 61, 31], None, [0, 60, 7]),
    (2, 3, 1, 12, 60, [46, 20], 3, None),
    (1, 2, 1, 64, 64, [0], None, None),
    (2, 2, 2, 1, 40, [39, 0], None, None),
]


def tree_operands(case, **options):
    rows, heads, kv_heads, width, slots, starts, window, origins = case
    device = options.get("device", "cpu")
    return operands(rows, heads, kv_heads, width, slots, 16, **options), (
        causal_spans(starts, width, window, origins, device),
        random_tree(starts, width, slots, device),
        chain(starts, width, device),
    )


@pytest.mark.parametrize("case", TREES)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}])
def test_reference_of_a_tree(case, options):
    """What the mask shows and no more; a chain has the bits of the spans alone, whatever hidden slots hold."""
    (query, key, value), (spans, tree, a_chain) = tree_operands(case)
    plain = ragged_attention(query, key, value, spans, 0.3, **options)
    assert torch.equal(ragged_attention(query, key, value, spans, 0.3, **options, tree=a_chain), plain)
    out = ragged_attention(query, key, value, spans, 0.3, **options, tree=tree)
    expected = dense(query, key, value, spans, 0.3, **options, tree=tree)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=3),
    st.integers(1, TREE_SLOTS),
    st.integers(0, 999),
    st.sampled_from([None, 1, 9]),
)
def test_random_trees(starts, width, seed, window):
    query, key, value = operands(len(starts), 2, 1, width, max(starts) + width, 8)
    spans, tree = causal_spans(starts, width, window), random_tree(starts, width, seed)
    out = ragged_attention(query, key, value, spans, 0.3, tree=tree)
    torch.testing.assert_close(out.double(), dense(query, key, value, spans, 0.3, tree=tree), rtol=1e-5, atol=1e-5)


def hidden_slots_changed(key, value, spans, tree):
    """Keys and values with other numbers wherever the first query of each row sees nothing."""
    visible = shown(tree, key.shape[2])[:, 0]
    slot = torch.arange(key.shape[2], device=key.device)
    visible = visible & (slot >= spans[:, 0, :1]) & (slot < spans[:, 0, 1:2])
    noise = torch.linspace(-50, 50, key.shape[2], device=key.device, dtype=key.dtype)[:, None].expand_as(key)
    return [torch.where(visible[:, None, :, None], x, noise) for x in (key, value)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Splits of 32 keys, so that few slots already make several, and NaN in uninitialised memory."""
    monkeypatch.setattr(kernels, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(kernels, "BLOCK_KEYS", 16)
    monkeypatch.setattr(kernels, "SPLIT_KEYS", 32)
    empty = torch.empty
    monkeypatch.setattr(kernels.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@interpreted
@pytest.mark.parametrize(
    "case, dtype", [*((case, torch.float32) for case in CASES), *((case, torch.float16) for case in CASES[1:4:2])]
)
def test_kernel_in_the_interpreter_equals_the_reference(case, dtype, small_blocks):
    (query, key, value), spans = case_operands(case, dtype=dtype)
    sinks = torch.linspace(-1, 1, query.shape[1]).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3  # float16 weights and results
    for options in ({}, {"softcap": 2.0}, {"sinks": sinks}):
        out = ragged_attention(query, key, value, spans, 0.3, **options, implementation="triton")
        expected = dense(query, key, value, spans, 0.3, **options)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_merge_in_registers_in_the_interpreter(case, small_blocks, monkeypatch):
    """Fails if a split is merged for a query that sees nothing of it, or left out for one that does."""
    monkeypatch.setattr(kernels, "FILLING_PROGRAMS", 1)
    (query, key, value), spans = case_operands(case)
    spans[0, 0, 1] = spans[0, 0, 0]  # a query that sees nothing among others that do
    for options in ({}, {"softcap": 2.0}, {"sinks": torch.linspace(-1, 1, query.shape[1])}):
        out = ragged_attention(query, key, value, spans, 0.3, **options, implementation="triton")
        expected = dense(query, key, value, spans, 0.3, **options)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_kernel_in_the_interpreter_serves_empty_spans_pieces_and_no_rows(small_blocks, monkeypatch):
    query, key, value = operands(1, 2, 1, 3, 70, 16)
    spans = torch.tensor([[[69, 69, 0], [0, 70, 0], [40, 41, 0]]], dtype=torch.int32)
    expected = dense(query, key, value, spans, 0.25)
    monkeypatch.setattr(kernels, "MAX_WORKSPACE", 1)
    out = ragged_attention(query, key, value, spans, 0.25, implementation="triton")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert out[0, 0].eq(0).all()
    out = ragged_attention(query[:0], key[:0], value[:0], spans[:0], 0.25, implementation="triton")
    assert out.shape == (0, 3, 2, 16)


@interpreted
@pytest.mark.parametrize("case, options", [*((case, {}) for case in TREES), (TREES[2], {"softcap": 2.0})])
def test_trees_in_the_interpreter(case, options, small_blocks):
    (query, key, value), (spans, tree, a_chain) = tree_operands(case)

    def run(*operands, **more):
        return ragged_attention(*operands, spans, 0.3, **options, **more, implementation="triton")

    assert torch.equal(run(query, key, value, tree=a_chain), run(query, key, value))
    out = run(query, key, value, tree=tree)
    expected = dense(query, key, value, spans, 0.3, **options, tree=tree)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    changed = run(query, *hidden_slots_changed(key, value, spans, tree), tree=tree)
    assert torch.equal(changed[:, 0], out[:, 0]), "a hidden slot changed a number"


@interpreted
def test_splits_of_hidden_slots_in_the_interpreter(small_blocks):
    """The first splits of a query's span show it nothing, and all of another's."""
    query, key, value = operands(1, 2, 1, 2, 64, 16)
    spans = torch.tensor([[[0, 64, 0], [0, 64, 0]]], dtype=torch.int32)
    tree = Tree(torch.tensor([0]), torch.tensor([[-(1 << 63), 0]]))
    out = ragged_attention(query, key, value, spans, 0.3, tree=tree, implementation="triton")
    assert torch.equal(out[0, 0], value[0, :, 63].expand(2, -1)) and out[0, 1].eq(0).all()
    assert torch.equal(ragged_attention(query, key, value, spans, 0.3, tree=tree), out)


def test_wrong_operands_are_named():
    query, key, value = operands(2, 4, 2, 3, 10, 16)
    spans = causal_spans([4, 5], 3)
    with pytest.raises(ValueError, match="int32"):
        ragged_attention(query, key, value, spans.long(), 0.25)
    with pytest.raises(ValueError, match="do not fit"):
        ragged_attention(query, key[:1], value[:1], spans, 0.25)
    with pytest.raises(ValueError, match="multiple of 2"):
        ragged_attention(query[:, :3], key, value, spans, 0.25)
    with pytest.raises(ValueError, match="sinks"):
        ragged_attention(query, key, value, spans, 0.25, sinks=torch.zeros(3))
    tree = chain([4, 5], 3)
    with pytest.raises(ValueError, match=r"mask is \[2, 2\]"):
        ragged_attention(query, key, value, spans, 0.25, tree=Tree(tree.starts, tree.mask[:, :2]))
    with pytest.raises(ValueError, match=r"starts is \[1\]"):
        ragged_attention(query, key, value, spans, 0.25, tree=Tree(tree.starts[:1], tree.mask))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads, kv_heads, dim, window", [(6, 2, 64, None), (32, 8, 128, None), (4, 4, 80, 300)])
def test_trees_on_a_gpu(dtype, heads, kv_heads, dim, window):
    """A chain has the bits of the spans alone; in a tree no hidden slot changes a bit, and the numbers are right."""
    starts, width, slots = [0, 250, 612], TREE_SLOTS, 700
    query, key, value = operands(3, heads, kv_heads, width, slots, dim, dtype=dtype, device="cuda")
    spans, scaling = causal_spans(starts, width, window, device="cuda"), dim**-0.5
    for softcap in (None, 20.0):
        plain = ragged_attention(query, key, value, spans, scaling, softcap)
        assert torch.equal(
            ragged_attention(query, key, value, spans, scaling, softcap, tree=chain(starts, width, "cuda")), plain
        )
        tree = random_tree(starts, width, 3, "cuda")
        out = ragged_attention(query, key, value, spans, scaling, softcap, tree=tree)
        expected = dense(query, key, value, spans, scaling, softcap, tree=tree)
        tolerance = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        changed = hidden_slots_changed(key, value, spans, tree)
        again = ragged_attention(query, *changed, spans, scaling, softcap, tree=tree)
        assert torch.equal(again[:, 0], out[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads, kv_heads, dim, window", [(6, 2, 64, None), (32, 8, 128, None), (4, 4, 80, 300)])
def test_bits_on_a_gpu_depend_on_the_query_and_its_keys_alone(dtype, heads, kv_heads, dim, window):
    """Prefill, verify, decode, another batch, a longer buffer and left padding."""
    length = 700
    query, key, value = operands(3, heads, kv_heads, length, length, dim, dtype=dtype, device="cuda")
    scaling = dim**-0.5
    spans = causal_spans([0, 0, 0], length, window, device="cuda")
    expected = ragged_attention(query, key, value, spans, scaling)
    tolerance = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        expected.double(), dense(query, key, value, spans, scaling), rtol=tolerance, atol=tolerance
    )
    for begin, width in ((0, 1), (255, 1), (256, 2), (300, 6), (511, 9), (699, 1)):
        columns = slice(begin, begin + width)
        for rows in (slice(0, 1), slice(1, 3)):
            out = ragged_attention(
                query[rows, :, columns], key[rows], value[rows], spans[rows, columns].contiguous(), scaling
            )
            assert torch.equal(out, expected[rows, columns])
            padded = [F.pad(x[rows], (0, 0, 37, 5), value=3.0) for x in (key, value)]
            shifted = ragged_attention(
                query[rows, :, columns], *padded, (spans[rows, columns] + 37).contiguous(), scaling
            )
            assert torch.equal(shifted, out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "heads, kv_heads, dim, value_dim, window",
    [(6, 2, 64, 64, None), (32, 8, 128, 128, None), (4, 4, 80, 80, 300), (8, 1, 256, 256, None), (5, 5, 96, 128, 70)],
)
def test_bits_on_a_gpu_do_not_depend_on_where_splits_are_merged(
    dtype, heads, kv_heads, dim, value_dim, window, monkeypatch
):
    """Fails if a compiler fuses another product into the sums of one of the kernels."""
    starts, origins, width = [0, 613, 250], [0, 130, -300], 333
    query, key, value = operands(3, heads, kv_heads, width, 950, dim, value_dim, dtype, "cuda")
    spans = causal_spans(starts, width, window, origins, "cuda")
    spans[1, 5, 1] = spans[1, 5, 0]
    sinks = torch.linspace(-1, 1, heads, device="cuda", dtype=dtype)
    for options in ({}, {"softcap": 20.0}, {"sinks": sinks}):
        results = []
        for filling in (1, 10**9):
            monkeypatch.setattr(kernels, "FILLING_PROGRAMS", filling)
            results.append(ragged_attention(query, key, value, spans, dim**-0.5, **options))
        assert torch.equal(*results), options.keys()


@pytest.mark.parametrize("shared", [232448, 166912, 101376])
@pytest.mark.parametrize(
    ("dims", "group"), [((64, 64), 7), ((128, 128), 4), ((256, 256), 2), ((256, 128), 16), ((16, 16), 1)]
)
def test_blocks_fit_into_shared_memory(dims, group, shared):
    """What `metadata.shared` says of the compiled kernels: queries, scores, and the keys and values in flight."""
    for itemsize in (2, 4):
        queries, stages = fitting(*dims, group, itemsize, shared)
        elements = queries * (dims[0] + BLOCK_KEYS) + max(1, stages - 1) * BLOCK_KEYS * sum(dims)
        assert group <= queries <= 64 and 1 <= stages <= 3
        assert elements * itemsize <= shared or (itemsize, dims[0], shared) == (4, 256, 101376)
    assert fitting(128, 128, 4, 2, 232448) == (64, 3) and fitting(256, 256, 2, 2, 232448) == (64, 2)
    assert fitting(256, 256, 2, 2, 101376) == (32, 2)
