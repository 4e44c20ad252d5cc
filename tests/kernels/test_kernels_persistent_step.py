"""The step in one launch: the reference against transformers' models, the kernel against the reference."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from tiny import tiny_llama
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specdec.batch.cache import RaggedCache
from specdec.kernels.dispatch import triton
from specdec.kernels.persistent.step import (
    MAX_TOKENS,
    Constants,
    Numbers,
    PersistentStep,
    Pointers,
    Tuning,
    persistent_step_reference,
    refusal,
)
from specdec.network.invariant.one_launch import step_tensors

interpreted = pytest.mark.interpreter
SIZES = dict(
    vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
)  # fmt: skip
MODELS = {
    "llama": lambda: tiny_llama(tie_word_embeddings=True),
    "qwen2": lambda: with_biases(Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "hidden_size": 32}))),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=12, **SIZES)),
    "mistral, sliding window": lambda: MistralForCausalLM(
        MistralConfig(sliding_window=7, head_dim=16, **{**SIZES, "num_key_value_heads": 1})
    ),
}
TEXT_SLOTS, SLOTS, ROWS = 100, 110, 5  # more than one tile of keys
# rows, width; one row and token takes no tensor core, three rows pad a power of two
SHAPES = [(1, 1), (1, 3), (3, 1), (5, 2), (4, 8)]
# The interpreter takes seconds a case: all shapes of one model, and of the others what only they have.
INTERPRETED = [
    *(("qwen3", shape, torch.float32) for shape in SHAPES[:4]),
    ("qwen3", (3, 1), torch.float16),
    ("llama", (1, 3), torch.float32),
    ("qwen2", (3, 1), torch.float32),
    ("mistral, sliding window", (5, 2), torch.float32),
]


def with_biases(model):
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(linear.bias)
    return model


def build(name, dtype=torch.float32, device="cpu"):
    """A model and what its step reads; every call gives equal values in other memory."""
    torch.manual_seed(3)
    model = MODELS[name]().eval().to(device, dtype)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            torch.nn.init.normal_(module.weight, 1, 0.2)
    cache, block = RaggedCache(len(model.model.layers), ROWS, SLOTS, device), model.model.layers[0].self_attn
    head = torch.empty(1, block.k_proj.out_features // block.head_dim, 0, block.head_dim, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(5)
    for layer in cache.layers:
        layer.lazy_initialization(head, head)
        for buffer in (layer.keys, layer.values):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    positions = torch.arange(SLOTS, device=device)[None]
    cos, sin = (x[0].contiguous() for x in model.model.rotary_emb(model.model.embed_tokens.weight[:1], positions))
    tensors = step_tensors(model, cache, cos, sin, TEXT_SLOTS)
    assert tensors is not None and refusal(tensors) is None
    return model, tensors


def inputs(rows, width, device="cpu"):
    """The first row starts at nothing; the last of many rows pads the batch."""
    generator = torch.Generator().manual_seed(rows + width)
    ids = torch.randint(61, (rows, width), generator=generator)
    starts = torch.tensor([0 if rows > 1 else 71, 93, 5, 64, TEXT_SLOTS])[:rows]
    return ids.to(device), starts.to(device)


def new_keys(tensors, rows, width, starts):
    """What a step wrote for rows that do not pad, and what it must not have touched."""
    written, others = [], []
    for layer in tensors.layers:
        for buffer in (layer.keys, layer.values):
            is_new = torch.zeros(ROWS, SLOTS, dtype=torch.bool)
            for row, start in enumerate(starts.tolist()):
                is_new[row, start : start + width] = True
            others.append(buffer[~is_new.to(buffer.device)])
            is_new[rows - int((starts >= TEXT_SLOTS).sum()) :] = False
            written.append(buffer[is_new.to(buffer.device)])
    return written, others


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_reference_is_what_transformers_computes(name):
    """Token by token into an empty cache: the logits and last states of the model's own uncached forward."""
    model, tensors = build(name)
    ids = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
    out = model.model(input_ids=ids, use_cache=False).last_hidden_state
    begin = 0
    for width in (3, 1, 8, 1, 10):
        starts = torch.full((2,), begin)
        logits, hidden = PersistentStep(tensors)(ids[:, begin : begin + width], starts)
        torch.testing.assert_close(hidden, out[:, begin : begin + width], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, model.lm_head(out)[:, begin : begin + width], rtol=1e-4, atol=1e-4)
        begin += width


@torch.no_grad()
@interpreted
@pytest.mark.parametrize("name, shape, dtype", INTERPRETED)
def test_kernel_in_the_interpreter_equals_the_reference(name, shape, dtype):
    """One program, which owns all tiles in turn; small tiles make several chunks of everything."""
    tuning = Tuning(
        block_qkv=16, block_out=16, block_gate=16, block_down=16, block_keys=32, merged_elements=256,
        inner_elements=128, num_warps=2,
    )  # fmt: skip
    _, ours = build(name, dtype)
    _, theirs = build(name, dtype)
    ids, starts = inputs(*shape)
    step = PersistentStep(ours, "triton", tuning)
    for buffer in (step.hidden, step.qkv, step.partial, step.gated, step.weights):
        buffer.fill_(float("nan"))
    is_text = starts < TEXT_SLOTS
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=4e-2, atol=4e-2)
    for _ in range(2):
        for got, expected in zip(step(ids, starts), persistent_step_reference(ids, starts, theirs), strict=True):
            assert not got.isnan().any(), "something was read that no program wrote"
            torch.testing.assert_close(got[is_text], expected[is_text], **tolerance)
    written = [new_keys(tensors, *shape, starts) for tensors in (ours, theirs)]
    for got, expected in zip(written[0][0], written[1][0], strict=True):
        torch.testing.assert_close(got, expected, **tolerance)
    for got, expected in zip(written[0][1], written[1][1], strict=True):
        assert torch.equal(got, expected), "a slot that is not the step's own was written"


@torch.no_grad()
@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_splits_of_the_keys_change_only_rounding_in_the_interpreter(shape, monkeypatch):
    """Several splits as a GPU has them; one program computes all."""
    results = []
    for splits in (1, 4):
        _, tensors = build("qwen3")
        step = PersistentStep(tensors, "triton", Tuning(block_keys=16, max_splits=splits))
        monkeypatch.setattr(type(step), "num_splits", lambda *_, splits=splits: splits)
        results.append(step(*inputs(*shape))[0])
    assert not torch.equal(*results), "the splits were not used"
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@interpreted
@pytest.mark.parametrize(
    "shape, change",
    [
        # one token, whose products are plain sums
        ((1, 1), dict(least_tokens=8)), ((1, 1), dict(block_gate=8, block_qkv=8)), ((1, 1), dict(inner_elements=256)),
        ((3, 3), dict(block_gate=24)), ((3, 3), dict(block_gate=8, block_qkv=8)), ((3, 3), dict(num_warps=16)),
        ((3, 3), dict(num_warps=1)), ((3, 3), dict(inner_elements=256)), ((3, 3), dict(block_head=32)),
        ((3, 3), dict(block_keys=128, attention_stages=1)),
    ],
    ids=str,
)  # fmt: skip
def test_tunings_change_only_rounding_in_the_interpreter(change, shape):
    """Tokens in two halves of a tile's rows, and tiles of rows that are no power of two."""
    _, ours = build("qwen3")
    _, theirs = build("qwen3")
    ids, starts = inputs(*shape)
    step = PersistentStep(ours, "triton", Tuning(**change))
    for buffer in (step.hidden, step.qkv, step.partial, step.gated, step.weights):
        buffer.fill_(float("nan"))
    for got, expected in zip(step(ids, starts), persistent_step_reference(ids, starts, theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(triton is None, reason="needs Triton")
def test_the_kernels_parameters_are_those_of_the_launch():
    """An argument that only one side knows would be an error on a GPU only."""
    from specdec.kernels.persistent import step_triton

    source = inspect.getsource(step_triton)
    [kernel] = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "persistent_step_kernel"]
    passed = [*Pointers._fields, *Numbers._fields, *Constants._fields]
    assert sorted(argument.arg for argument in kernel.args.args) == sorted(passed)


def test_wrong_operands_are_named():
    _, tensors = build("qwen3")
    step = PersistentStep(tensors)
    with pytest.raises(ValueError, match=f"1 to {MAX_TOKENS} tokens"):
        step(torch.zeros(5, 7, dtype=torch.long), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"starts \[2\] do not fit"):
        step(torch.zeros(3, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="6 rows exceed the cache's 5"):
        step(torch.zeros(6, 1, dtype=torch.long), torch.zeros(6, dtype=torch.long))
    layers = [*tensors.layers[:1], tensors.layers[1]._replace(head_norm=None)]
    with pytest.raises(ValueError, match="layers differ"):
        PersistentStep(tensors._replace(layers=layers))
    wide = tensors.layers[0]._replace(out=tensors.layers[0].out.double())
    with pytest.raises(ValueError, match="another dtype"):
        PersistentStep(tensors._replace(layers=[wide, *tensors.layers[1:]]))


def test_biases_that_the_kernel_does_not_add_are_refused():
    model = tiny_llama(attention_bias=True)
    cache = RaggedCache(2, 1, 8, "cpu")
    for layer in cache.layers:
        layer.lazy_initialization(torch.empty(1, 2, 0, 8), torch.empty(1, 2, 0, 8))
    assert step_tensors(model, cache, torch.ones(8, 8), torch.ones(8, 8), 8) is None


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernel_on_a_gpu_equals_the_reference(name, shape, dtype):
    """Grids of one program and of all; 200 launches give the same bits, so no program reads what is not yet there."""
    ids, starts = inputs(*shape, "cuda")
    is_text = starts < TEXT_SLOTS
    _, theirs = build(name, dtype, "cuda")
    expected = persistent_step_reference(ids, starts, theirs)
    # Two layers of roundings to the dtype, in another order.
    tolerance = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 4e-1}[dtype]
    for num_programs in (1, 7, None):
        _, ours = build(name, dtype, "cuda")
        step = PersistentStep(ours, tuning=Tuning(num_programs=num_programs))
        first = step(ids, starts)
        for got, want in zip(first, expected, strict=True):
            torch.testing.assert_close(got[is_text], want[is_text], rtol=tolerance, atol=tolerance)
        for _ in range(200):
            for got, want in zip(step(ids, starts), first, strict=True):
                assert torch.equal(got[is_text], want[is_text])


@torch.no_grad()
@pytest.mark.gpu
def test_replays_of_a_graph_follow_their_inputs():
    _, tensors = build("qwen3", torch.bfloat16, "cuda")
    step = PersistentStep(tensors)
    ids, starts = inputs(3, 2, "cuda")
    step(ids, starts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(ids, starts)
    for shift in range(5):
        ids.random_(61), starts.copy_(torch.tensor([shift, 80 - shift, 31]))
        graph.replay()
        got = [x.clone() for x in replayed]
        for ours, expected in zip(got, step(ids, starts), strict=True):
            assert torch.equal(ours, expected)
