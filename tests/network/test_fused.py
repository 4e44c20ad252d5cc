"""The fused forward against the model's own modules."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny import VOCAB, left_pad, plain_greedy, tiny_llama
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import specdec
from specdec.batch.rows import Rows
from specdec.network import fused
from specdec.network.fused import FusedNetwork, can_fuse, fused_weights
from specdec.network.packed_linear import MergedLinear, can_pack

SHAPE = dict(
    vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def build(kind):
    torch.manual_seed(0)
    model = {
        "llama": lambda: tiny_llama(0, eos_token_id=None),
        "llama-bias": lambda: tiny_llama(0, eos_token_id=None, attention_bias=True, mlp_bias=True),
        "llama3-rope": lambda: tiny_llama(
            0, eos_token_id=None,
            rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        ),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
        "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "qwen2-window": lambda: Qwen2ForCausalLM(
            Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1)
        ),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
        "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)),
    }[kind]().eval()  # fmt: skip
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mistake with them would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


KINDS = [
    "llama",
    "llama-bias",
    "llama3-rope",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "qwen3-tied",
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_hidden_states_equal_the_models_own(kind, packed, monkeypatch):
    monkeypatch.setattr(fused, "can_pack", lambda weights: packed)
    model = build(kind)
    assert can_fuse(model)
    sequences = [torch.randint(0, 60, (20,)), torch.randint(0, 60, (15,))]
    rows = Rows([sequences[0][:12], sequences[1][:7]], 8, 0, torch.device("cpu"))
    network = FusedNetwork(model, 2, rows.capacity)
    own = [model(ids[None], output_hidden_states=True) for ids in sequences]
    prefilled = network.prefill(rows)
    torch.testing.assert_close(
        prefilled, torch.stack([own[0].logits[0, 11], own[1].logits[0, 6]]), rtol=1e-4, atol=1e-4
    )
    batch = torch.stack([sequences[0][12:20], sequences[1][7:15]])
    out = network.forward(batch, rows.lengths, 20, layers=(0, 2, -1))
    for row, (begin, end) in enumerate(((12, 20), (7, 15))):
        # 1e-4: float32 rounding through three layers with logits of order 10
        torch.testing.assert_close(out.logits[row], own[row].logits[0, begin:end], rtol=1e-4, atol=1e-4)
        for mine, layer in zip(out.hidden_states, (0, 2, -1), strict=True):
            torch.testing.assert_close(mine[row], own[row].hidden_states[layer][0, begin:end], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_plain_greedy(kind):
    model = build(kind)
    prompts = [torch.randint(0, 60, (length,)) for length in (11, 1, 6)]
    ids, mask = left_pad(prompts)
    expected = [plain_greedy(model, prompt, max_new_tokens=16) for prompt in prompts]
    draft = tiny_llama(3, vocab_size=model.config.vocab_size)
    out = specdec.generate(model, ids, mask, drafter=draft, num_speculative_tokens=3, max_new_tokens=16)
    assert out[:, 11:].tolist() == expected


def test_what_the_fused_forward_would_not_honour_is_left_to_the_modules():
    model = tiny_llama(0)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert not can_fuse(model)
    handle.remove()
    assert can_fuse(model)
    layer = model.model.layers[1].mlp
    layer.forward = lambda x: x  # as accelerate and PEFT do
    assert not can_fuse(model)
    del layer.forward

    class Adapter(torch.nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj = Adapter(32, 64, bias=False)
    assert not can_fuse(model)
    assert not can_fuse(tiny_llama(0, hidden_act="gelu"))


@pytest.mark.parametrize("name", ["global hook", "patched class", "identity", "projection", "head"])
def test_what_is_changed_behind_a_first_call_is_honoured(name, monkeypatch):
    """Each of these was known to be fused a call ago; transformers honours them all."""
    model = tiny_llama(0, eos_token_id=None)
    prompt = torch.tensor([[5, 6, 7, 8]])
    before = specdec.generate(model, prompt, max_new_tokens=12)
    handle, layer = None, model.model.layers[1]
    if name == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out: -out if module is layer.mlp else None
        )
    elif name == "patched class":
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: -self.down_proj(self.up_proj(x)))
    elif name == "identity":
        layer.mlp = torch.nn.Identity()
    elif name == "projection":
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj, torch.nn.Tanh())
    else:
        model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, VOCAB))
    try:
        assert not can_fuse(model)
        after = specdec.generate(model, prompt, drafter=model, max_new_tokens=12)
        assert torch.equal(after, model.generate(prompt, max_new_tokens=12)) and not torch.equal(after, before)
    finally:
        if handle is not None:
            handle.remove()


def test_edited_head_norms_are_noticed():
    model = build("qwen3")
    prompt = torch.tensor([[5, 6, 7, 8]])
    before = specdec.generate(model, prompt, max_new_tokens=12)
    for layer in model.model.layers:
        layer.self_attn.q_norm.variance_epsilon = layer.self_attn.k_norm.variance_epsilon = 9.0
    assert can_fuse(model)
    after = specdec.generate(model, prompt, max_new_tokens=12)
    assert torch.equal(after, model.generate(prompt, max_new_tokens=12)) and not torch.equal(after, before)
    model.model.layers[0].self_attn.k_norm.variance_epsilon = 1e-6
    assert not can_fuse(model), "queries and keys are normalised together"


@pytest.mark.parametrize("write", ["in place", "data", "replaced"])
def test_changed_weights_are_noticed(write):
    model = tiny_llama(0, eos_token_id=None)
    prompt = torch.tensor([[5, 6, 7, 8]])
    before = specdec.generate(model, prompt, max_new_tokens=12)
    weight = model.model.layers[0].mlp.down_proj.weight
    if write == "in place":
        with torch.no_grad():
            weight.mul_(-1)
    elif write == "data":
        weight.data.neg_()
    else:
        model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(-weight.detach())
    after = specdec.generate(model, prompt, max_new_tokens=12)
    assert torch.equal(after, model.generate(prompt, max_new_tokens=12))
    assert not torch.equal(after, before)


def test_packed_weights_live_as_long_as_the_model():
    model = tiny_llama(0)
    assert fused_weights(model) is fused_weights(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_merged_linear(bias, rows):
    linears = [torch.nn.Linear(24, size, bias=bias) for size in (16, 8, 40)]
    x = torch.randn(rows, 24)
    expected = torch.cat([linear(x) for linear in linears], -1)
    for pack in (False, can_pack([linear.weight for linear in linears])):
        merged = MergedLinear(linears, pack)
        torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged.add_to(expected, x), 2 * expected, rtol=1e-5, atol=1e-5)


def test_packing_leaves_memory(monkeypatch):
    monkeypatch.setattr("specdec.network.packed_linear.MAX_SHARE_OF_FREE_MEMORY", 0.0)
    assert not can_pack([torch.zeros(4, 4)])
    monkeypatch.undo()
    assert not can_pack([torch.zeros(4, 4, dtype=torch.float64)])
