"""The short forward of batch-invariant models gives the bits of the model's own modules with the kernels swapped in."""

from __future__ import annotations

import pytest
import torch
from families import tiny
from tiny import continuations, left_pad, plain_greedy, tiny_llama
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import specdec
from specdec import batch_invariant
from specdec.network.choose import build_network
from specdec.network.invariant import network as invariant_network
from specdec.network.invariant.network import InvariantNetwork, kept_invariant
from specdec.network.kept_forwards import kept_of
from specdec.network.stock import StockNetwork

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
MIXTURE = dict(SIZES, num_local_experts=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
MODELS = {
    "llama": lambda: tiny_llama(tie_word_embeddings=True),
    "llama with biases": lambda: tiny_llama(attention_bias=True),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=12, **SIZES)),
    "gemma": lambda: tiny_gemma("gemma"),
    "gemma2": lambda: tiny_gemma("gemma2"),
    "gemma3": lambda: tiny_gemma("gemma3_text", final_logit_softcapping=9.0, rope_parameters=LOCAL_AND_GLOBAL),
    "qwen3_moe, some layers dense": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(head_dim=12, mlp_only_layers=[1], norm_topk_prob=True, **MIXTURE)
    ),
    "mixtral, sliding window": lambda: MixtralForCausalLM(MixtralConfig(sliding_window=7, **MIXTURE)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(sliding_window=7, **SIZES)),
}
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}
PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 7, 5, 9, 7, 5, 9], [11, 4, 8], [6, 13, 21, 34, 6, 13, 3, 8, 6, 13, 40])]


def tiny_gemma(family, **changes):
    """Norms that are not 1, windows shorter than the texts, a scale of the scores other than the head's."""
    if family != "gemma":
        changes["query_pre_attn_scalar"] = 20
    # Sizes that fill a CPU's vector registers: the rest of a row would be rounded otherwise (test_invariant.py).
    sizes = dict(vocab_size=64, intermediate_size=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model = tiny(family, 3, **sizes, **changes)
    model.set_attn_implementation("eager")  # before 5.18 the default leaves Gemma 2's soft-caps out
    return model


def build(name):
    torch.manual_seed(3)
    return MODELS[name]().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_bits_of_the_models_own_modules(name, dtype):
    """Ragged prefill, a step of four tokens at different places, one of a single token; all hidden states."""
    model = build(name).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with batch_invariant(model), torch.no_grad():
        results = []
        for network in (StockNetwork(model, 3, 40), build_network(model, 3, 40)):
            rows = specdec.Rows(PROMPTS, 16, 5, model.device)
            generator.manual_seed(0)
            with network.running():
                found = [network.prefill(rows)]
                for width in (4, 1):
                    ids = torch.randint(3, 61, (3, width), generator=generator)
                    layers = (0, 1, -1)
                    out = network.forward(ids, rows.lengths - 1, rows.max_length - 1 + width, layers)
                    found += [out.logits, *out.hidden_states]
            results.append(found)
    assert isinstance(network, InvariantNetwork)
    for expected, ours in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_a_gemma_that_is_not_what_its_class_says_takes_its_own_modules(name):
    model = build(name)
    with batch_invariant(model):
        assert isinstance(build_network(model, 1, 32), InvariantNetwork)
        model.config.use_bidirectional_attention = True
        assert not invariant_network.can_shorten(model)
        model.config.use_bidirectional_attention = False
        model.model.layers[1].mlp.act_fn = torch.nn.SiLU()
        assert not invariant_network.can_shorten(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_generate_equals_transformers_on_the_same_model(name, dtype):
    model, draft = build(name).to(dtype), tiny_llama(1, vocab_size=build(name).config.vocab_size)
    ids, mask = left_pad(PROMPTS)
    with batch_invariant(model), batch_invariant(draft):
        expected = [plain_greedy(model, prompt, max_new_tokens=16) for prompt in PROMPTS]
        for drafter in (draft, model, "prompt_lookup"):
            out = specdec.generate(
                model, ids, mask, drafter=drafter, num_speculative_tokens=3, max_new_tokens=16, pad_token_id=0
            )
            assert continuations(out, ids.shape[1], expected, 0) == expected


def test_a_forward_is_kept_while_it_fits(monkeypatch):
    model = tiny_llama()
    with batch_invariant(model):
        with kept_invariant(model, 3, 40) as first, kept_invariant(model, 3, 40) as second:
            assert second is not first, "one that is in use must not be handed out"
        with kept_invariant(model, 2, 200) as again:
            assert again is first
        with kept_invariant(model, 2, 1000) as larger:
            assert larger is not first and larger.num_slots >= 1000
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        with kept_invariant(model, 2, 40) as other_weights:
            assert other_weights is not larger
        with pytest.raises(KeyboardInterrupt), kept_invariant(model, 2, 40) as broken:
            raise KeyboardInterrupt
        with kept_invariant(model, 2, 40) as after:
            assert after is not broken


def test_padding_rows_and_columns_change_no_bit_and_leave_no_trace():
    """What a captured step adds to fill its bucket: rows and columns behind the texts."""
    model = build("qwen3")
    with batch_invariant(model), torch.no_grad(), kept_invariant(model, 4, 40) as forward:
        for layer in forward.cache.layers:
            layer.keys.normal_(), layer.values.normal_()
        before = [(layer.keys.clone(), layer.values.clone()) for layer in forward.cache.layers]
        ids, starts = torch.tensor([[5, 6], [7, 8]]), torch.tensor([3, 9])
        expected = forward(ids, starts, 11, ()).logits
        text = [(layer.keys[:, : forward.num_slots].clone()) for layer in forward.cache.layers]
        for layer, (keys, values) in zip(forward.cache.layers, before, strict=True):
            layer.keys.copy_(keys), layer.values.copy_(values)
        padded_ids = torch.tensor([[5, 6, 0], [7, 8, 0], [0, 0, 0], [0, 0, 0]])
        padded_starts = torch.tensor([3, 9, forward.num_slots, forward.num_slots])
        out = forward(padded_ids, padded_starts, forward.num_slots, ()).logits
        assert torch.equal(out[:2, :2], expected)
        for layer, keys in zip(forward.cache.layers, text, strict=True):
            changed = (layer.keys[:, : forward.num_slots] != keys).any(-1).any(-1)
            assert changed.nonzero().tolist() == [[0, 5], [1, 11]], "only the padding column behind each draft"


def test_a_model_is_not_kept_alive():
    import gc
    import weakref

    model = tiny_llama()
    with batch_invariant(model):
        specdec.generate(model, PROMPTS[0][None], max_new_tokens=4)
    assert kept_of(model, InvariantNetwork) is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def check_rows_that_leave(device):
    """At other steps each: rows of the target's cache and of the draft's close up, and others take their places."""
    model, draft = build("qwen3").to(device), tiny_llama(1).to(device)
    prompts, limits = [PROMPTS[i % 3] + i // 3 for i in range(9)], [3, 17, 9, 5, 12, 2, 8, 20, 4]
    with batch_invariant(model), batch_invariant(draft):
        expected = [
            plain_greedy(model, prompt.to(device), max_new_tokens=limit)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        for drafter in (None, draft):
            done = specdec.generate_many(
                model, prompts, drafter=drafter, max_new_tokens=limits, max_rows=5, in_order=True, pad_token_id=0
            )
            assert [one.token_ids for one in done] == expected


def test_rows_that_leave():
    check_rows_that_leave("cpu")


@pytest.mark.gpu
def test_rows_that_leave_on_a_gpu():
    check_rows_that_leave("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_captured_steps_give_the_bits_of_transformers(name, dtype):
    model = build(name).to("cuda", dtype)
    with batch_invariant(model), torch.no_grad():
        prompts = [prompt.cuda() for prompt in PROMPTS]
        expected = [model(input_ids=prompt[None]).logits[0] for prompt in prompts]
        network = build_network(model, 3, 40)
        assert isinstance(network, InvariantNetwork)
        with network.running():
            for _ in range(2):  # captured, then replayed
                for begin, width in ((0, 2), (2, 1)):
                    ids = torch.stack([prompt[begin : begin + width] for prompt in prompts])
                    starts = torch.full((3,), begin, device="cuda")
                    logits = network.forward(ids, starts, begin + width).logits
                    for row in range(3):
                        assert torch.equal(logits[row], expected[row][begin : begin + width])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_generate_on_a_gpu_equals_transformers(name):
    model = build(name).to("cuda", torch.bfloat16)
    draft = tiny_llama(1, vocab_size=model.config.vocab_size).to("cuda", torch.bfloat16)
    ids, mask = (x.cuda() for x in left_pad(PROMPTS))
    with batch_invariant(model), batch_invariant(draft):
        expected = [plain_greedy(model, prompt.cuda(), max_new_tokens=40) for prompt in PROMPTS]
        for drafter in (draft, model, "prompt_lookup", None):
            out = specdec.generate(
                model, ids, mask, drafter=drafter, max_new_tokens=40, pad_token_id=0,
                num_speculative_tokens=None if drafter is None else 4,
            )  # fmt: skip
            assert continuations(out, ids.shape[1], expected, 0) == expected
