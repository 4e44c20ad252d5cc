"""Batch-invariant models: exact in any batch, restored behind it, refused by name where a part has no kernel."""

from __future__ import annotations

import gc

import pytest
import torch
from families import tiny as tiny_family
from tiny import continuations, left_pad, plain_greedy, tiny_llama
from torch import nn
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.bloom import BloomConfig, BloomForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import specdec
from specdec import batch_invariant, make_batch_invariant
from specdec.errors import ConfigError, InputError, UnsupportedModelError
from specdec.network.attention import ragged_mask
from specdec.network.choose import build_network
from specdec.network.fused import can_fuse
from specdec.network.invariant.attention import INVARIANT, span_mask
from specdec.network.invariant.guard import is_harmless
from specdec.network.invariant.network import InvariantNetwork
from specdec.network.invariant.norms import rms_norm_variant
from specdec.network.invariant.swap import invariant_forward, is_batch_invariant
from specdec.network.model_cache import cache_argument
from specdec.network.stock import StockNetwork

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
SERVED = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 7}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 7, "head_dim": 8}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
}
PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 7, 5, 9, 7, 5, 9], [11, 4, 8], [6, 13, 21, 34, 6, 13, 3, 8, 6, 13, 40])]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(name, **options):
    model, config, own = SERVED[name]
    torch.manual_seed(0)
    return model(config(**{**SIZES, **own, **options})).eval()


def state(model):
    """Everything a swap touches."""
    return [dict(module.__dict__) for module in model.modules()], model.config._attn_implementation


def test_the_model_is_restored_after_success_error_and_interrupt():
    model = tiny_llama()
    before = state(model)
    with batch_invariant(model):
        assert is_batch_invariant(model) and state(model) != before
    assert state(model) == before
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), batch_invariant(model):
            raise error
        assert state(model) == before


def test_an_interrupt_while_swapping_restores_the_model(monkeypatch):
    model = tiny_llama()
    before = state(model)

    def interrupted(*args):
        assert state(model) != before
        raise KeyboardInterrupt

    monkeypatch.setattr("specdec.network.invariant.swap.check_invariance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_batch_invariant(model)
    assert state(model) == before


def test_the_permanent_form_lasts_until_it_is_undone():
    model = tiny_llama()
    before = state(model)
    restore = make_batch_invariant(model)
    with batch_invariant(model):  # nothing to do, and nothing to undo
        pass
    assert is_batch_invariant(model)
    restore()
    assert state(model) == before


def test_the_permanent_form_does_not_end_with_the_function_it_returned():
    model = tiny_llama()
    make_batch_invariant(model)
    gc.collect()
    assert model.config._attn_implementation == INVARIANT and "forward" in model.lm_head.__dict__


@pytest.mark.parametrize("name", SERVED)
def test_logits_are_bitwise_equal_however_they_are_computed(name):
    """Prefill, decode, verify and left padding through transformers' cache; fails on the stock modules."""
    model = tiny(name)
    ids, mask = left_pad(PROMPTS)
    with batch_invariant(model), torch.no_grad():
        alone = [model(input_ids=prompt[None]).logits[0] for prompt in PROMPTS]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, logits in enumerate(alone):
            assert torch.equal(together[row, -len(logits) :], logits)
        cache = DynamicCache(config=model.config)
        longest = PROMPTS[2][None]
        pieces = [
            model(input_ids=longest[:, a:b], **cache_argument(model, cache)).logits[0]
            for a, b in ((0, 4), (4, 5), (5, 11))
        ]
        assert torch.equal(torch.cat(pieces), alone[2])


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("k", [1, 4])
def test_generate_equals_transformers_on_the_same_model(name, k):
    model, draft = tiny(name), tiny_llama(1)
    ids, mask = left_pad(PROMPTS)
    with batch_invariant(model):
        expected = [plain_greedy(model, prompt, max_new_tokens=16) for prompt in PROMPTS]
        padded = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
        assert continuations(padded, ids.shape[1], expected, 0) == expected
        for drafter in (draft, "prompt_lookup"):
            out = specdec.generate(
                model, ids, mask, drafter=drafter, num_speculative_tokens=k, max_new_tokens=16, pad_token_id=0
            )
            assert continuations(out, ids.shape[1], expected, 0) == expected


def test_generate_runs_the_swapped_modules():
    model = tiny_llama()
    assert can_fuse(model)
    calls = []
    with batch_invariant(model):
        assert not can_fuse(model)
        assert isinstance(build_network(model, 1, 32), InvariantNetwork)
        swapped = model.lm_head.forward
        model.lm_head.forward = lambda x: (calls.append(len(x)), swapped(x))[1]
        network = build_network(model, 1, 32)
        assert isinstance(network, StockNetwork) and network.attention == INVARIANT
        specdec.generate(model, PROMPTS[0][None], max_new_tokens=4)
        model.lm_head.forward = swapped
    assert calls and can_fuse(model)


def test_a_ragged_forward_gives_the_bits_of_transformers_cache():
    model = tiny("qwen3")
    prompt = PROMPTS[2]
    with batch_invariant(model), torch.no_grad():
        expected = model(input_ids=prompt[None]).logits[0]
        network = build_network(model, 2, 40)
        with network.running():
            first = network.forward(torch.stack([prompt[:5], PROMPTS[0][:5]]), torch.tensor([0, 0]), 5).logits[0]
            verified = network.forward(torch.stack([prompt[5:], prompt[:6]]), torch.tensor([5, 2]), 11).logits[0]
    assert torch.equal(torch.cat([first, verified]), expected)


def test_hooks_and_weights_stay_the_users_own():
    """A hook on a swapped module still runs, and new weights count at once."""
    model, seen = tiny_llama(), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    with batch_invariant(model), torch.no_grad():
        seen.clear()
        before = model(input_ids=PROMPTS[1][None]).logits
        assert seen == [61]
        model.lm_head.weight.mul_(2)
        torch.testing.assert_close(model(input_ids=PROMPTS[1][None]).logits, 2 * before)
    handle.remove()


@pytest.mark.parametrize(
    "norm, expected",
    [(LlamaRMSNorm, (False, True)), (Olmo2RMSNorm, (False, False)), (Gemma3RMSNorm, (True, False))],
)
def test_the_variant_of_an_rms_norm_is_recognised(norm, expected):
    module = norm(48, eps=1e-5).to(torch.bfloat16)
    weight = module.weight.clone()
    assert rms_norm_variant("norm", module) == (1e-5, *expected)
    assert torch.equal(module.weight, weight)


def test_an_rms_norm_that_computes_something_else_is_refused():
    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) * 0.5

    with pytest.raises(UnsupportedModelError, match=r"layers.3.norm \(HalfRMSNorm\)"):
        rms_norm_variant("layers.3.norm", HalfRMSNorm(48))


class PackedLinear(nn.Linear):
    """What a quantised layer looks like from outside."""


@pytest.mark.parametrize("damage", ["subclass", "patched", "compiled", "parametrised"])
def test_modules_that_are_not_plain_are_refused_by_name(damage):
    model = tiny_llama()
    block = model.model.layers[1].mlp
    if damage == "subclass":
        block.up_proj = PackedLinear(32, 64, bias=False)
    elif damage == "patched":
        block.up_proj.forward = block.up_proj.forward
    elif damage == "compiled":
        block.up_proj.compile()
    else:
        nn.utils.parametrizations.weight_norm(block.up_proj)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj"), batch_invariant(model):
        pass
    assert state(model) == before


def test_parts_without_a_kernel_are_refused_by_name():
    jetmoe = tiny_family("jetmoe")
    before = state(jetmoe)
    with (
        pytest.raises(UnsupportedModelError, match=r"layers.0.self_attention \(JetMoeAttention\) runs aten.index_add"),
        batch_invariant(jetmoe),
    ):
        pass
    assert state(jetmoe) == before
    bloom = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM does not use"), batch_invariant(bloom):
        pass


class Mixing(nn.Module):
    """Products and sums in a module of nobody's."""

    def __init__(self, size=64):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(size, size) / size**0.5)

    def forward(self, x):
        return x @ self.matrix - x.mean(-1, keepdim=True) + torch.softmax(x, -1)


class Counting(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, -1)


class OverTokens(nn.Module):
    def forward(self, x):
        return x - x.mean(-2, keepdim=True)


def with_activation(module):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = module
    return model


def test_products_hidden_in_a_module_are_computed_in_order():
    """Fails on the module's own operations, whose order the library chooses by the number of rows."""
    model = with_activation(Mixing())
    before = state(model)
    prompt = PROMPTS[2][None]
    with torch.no_grad():
        stock = model(input_ids=prompt).logits
        with batch_invariant(model):
            logits = model(input_ids=prompt).logits
            torch.testing.assert_close(logits, stock, rtol=1e-3, atol=1e-3)
            rows = model(input_ids=prompt.expand(3, -1)).logits
            assert torch.equal(rows, logits.expand(3, -1, -1))
            assert torch.equal(model(input_ids=prompt[:, :5]).logits, logits[:, :5])
    assert state(model) == before


def test_a_module_that_is_put_in_after_the_check_is_found():
    """A model is checked once, but not for parts that it did not have then."""
    model = tiny_llama()
    with batch_invariant(model):
        pass
    model.model.layers[1].mlp.act_fn = Counting()
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.act_fn \(Counting\)"):
        make_batch_invariant(model)


def test_operations_without_an_order_are_found():
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.act_fn \(Counting\) runs aten.cumsum"):
        make_batch_invariant(with_activation(Counting()))


def test_a_sum_over_tokens_is_refused():
    with pytest.raises(UnsupportedModelError, match="dimension of 19, which is the number of tokens"):
        make_batch_invariant(with_activation(OverTokens()))


def test_settings_that_break_exactness_are_refused():
    with pytest.raises(UnsupportedModelError, match="float64"):
        make_batch_invariant(tiny_llama().double())
    model = tiny_llama()
    torch.set_num_threads(2)
    with pytest.raises(ConfigError, match="2 CPU threads"):
        make_batch_invariant(model)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ConfigError, match="TF32"):
            make_batch_invariant(model)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_plain_modules_get_a_forward_and_others_keep_theirs():
    assert invariant_forward("x", nn.Linear(3, 4)) is not None
    assert invariant_forward("x", nn.LayerNorm(4)) is not None
    assert invariant_forward("x", nn.Embedding(3, 4)) is None
    with pytest.raises(UnsupportedModelError, match="over the last dimension"):
        invariant_forward("x", nn.LayerNorm((3, 4)))


def causal(row, head, query, key):
    return key <= query


def test_spans_follow_padding_and_evicted_slots():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    spans = span_mask(2, 2, 7, 5, 0, causal, mask)[:, 0]
    assert spans.tolist() == [[[2, 6, 2], [2, 7, 2]], [[0, 6, 0], [0, 7, 0]]]
    window = span_mask(2, 1, 3, 6, 4, lambda b, h, q, k: (k <= q) & (k > q - 3), mask)[:, 0]
    assert window.tolist() == [[[0, 3, -2]], [[0, 3, -4]]]  # slot 0 holds position 4
    ragged = span_mask(2, 2, 9, torch.tensor([3, 7]), 0, causal)[:, 0]
    assert ragged.tolist() == [[[0, 4, 0], [0, 5, 0]], [[0, 8, 0], [0, 9, 0]]]
    dense = ragged_mask(2, 2, 9, torch.tensor([3, 7]), 0, causal)[:, 0]
    assert torch.equal(dense.sum(-1).int(), ragged[..., 1] - ragged[..., 0])


def test_holes_in_a_mask_are_an_input_error():
    with pytest.raises(InputError, match="holes"):
        span_mask(1, 4, 4, 0, 0, causal, torch.tensor([[True, False, True, True]]))


def test_harmless_operations():
    x = torch.ones(2, 3)
    assert is_harmless(torch.ops.aten.silu.default, (x,), {})
    assert is_harmless(torch.ops.aten.view.default, (x, [6]), {})
    assert is_harmless(torch.ops.aten.cumsum.default, (x.long(), 0), {})
    assert is_harmless(torch.ops.aten.polar.default, (x, x), {})
    assert is_harmless(torch.ops.aten.bmm.default, (torch.ones(1, 4, 1), torch.ones(1, 1, 5)), {})
    for func, args in (
        (torch.ops.aten.mm.default, (x, x.t())),
        (torch.ops.aten.cumsum.default, (x, 0)),
        (torch.ops.aten._softmax.default, (x, 1, False)),
        (torch.ops.aten.native_layer_norm.default, (x, [3], None, None, 1e-5)),
        (torch.ops.aten.sum.dim_IntList, (x, [1])),
        (torch.ops.aten.topk.default, (x, 1)),
    ):
        assert not is_harmless(func, args, {}), func
