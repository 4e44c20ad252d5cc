"""Families under `batch_invariant`: mixtures of experts, Conv1D, unusual norms. Logits and tokens, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import COMMON, is_known, tiny
from tiny import continuations, left_pad, plain_greedy
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import specdec
from specdec import batch_invariant, make_batch_invariant
from specdec.errors import UnsupportedModelError
from specdec.network.invariant.choices import Choice, choices_given, choices_recorded, mean_share
from specdec.network.invariant.experts import check_agreement, experts_forward, is_experts
from specdec.network.invariant.in_order import forward_in_order
from specdec.network.invariant.swap import _conv_1d, _layer_norm, invariant_forward
from specdec.network.model_cache import cache_argument

# Sizes that fill a CPU's vector registers: a function of the rest of a row may round otherwise there. A GPU has no such
# registers, and its tests take the sizes as they are.
FULL_REGISTERS = dict(intermediate_size=64, moe_intermediate_size=32)
NEW_TOKENS = 12
MIXTURES = ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "olmoe", "deepseek_v2", "ernie4_5_moe", "llama4_text"]
DENSE = ["gpt2", "cohere", "cohere2", "stablelm", "phi", "olmo", "nemotron", "nanochat", "diffllama", "opt", "biogpt"]
OPTIONS = {
    "gpt2": dict(n_inner=64),
    "stablelm": dict(qk_layernorm=True),
    "cohere": dict(use_qk_norm=True),
    "qwen3_moe": dict(num_experts=8, norm_topk_prob=True),
    "llama4_text": dict(num_local_experts=32),
}
PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 7, 5, 9, 7, 5, 9], [11, 4, 8], [6, 13, 21, 34, 6, 13, 3, 8, 6, 13, 40])]
on_cpu = pytest.mark.parametrize("family", [family for family in MIXTURES + DENSE if is_known(family)])
on_gpu = pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "gpt2", "cohere", "stablelm", "phi"])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(family: str, **options) -> PreTrainedModel:
    sizes = {} if family == "gpt2" else FULL_REGISTERS
    return tiny(family, **{**sizes, **OPTIONS.get(family, {}), **options})


def modules_of(model: PreTrainedModel, suffix: str) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith(suffix)]


def differences(model: PreTrainedModel, prompts) -> int:
    """Logits that differ between a prompt alone, the prompts together, and a prompt in pieces through a cache."""
    ids, mask = (tensor.to(model.device) for tensor in left_pad(prompts))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    found = 0
    for row, prompt in enumerate(prompts):
        alone = model(input_ids=prompt[None].to(model.device), use_cache=False).logits[0]
        found += int((together[row, -len(prompt) :] != alone).sum())
    cache = DynamicCache(config=model.config)
    ends = [0, 4, 5, *range(10, len(prompt), 5), len(prompt)]
    pieces = [
        model(input_ids=prompt[None, begin:end].to(model.device), **cache_argument(model, cache)).logits[0]
        for begin, end in itertools.pairwise(ends)
    ]
    return found + int((torch.cat(pieces) != alone).sum())


@on_cpu
def test_logits_and_tokens_do_not_depend_on_the_batch_or_on_the_drafts(family):
    model = model_of(family)
    ids, mask = left_pad(PROMPTS)
    before = [dict(module.__dict__) for module in model.modules()]
    with batch_invariant(model), torch.no_grad():
        assert differences(model, PROMPTS) == 0
        expected = [plain_greedy(model, prompt, max_new_tokens=NEW_TOKENS) for prompt in PROMPTS]
        for k in (0, 5):
            drafter = "prompt_lookup" if k else None
            options = dict(drafter=drafter, max_new_tokens=NEW_TOKENS, pad_token_id=0)
            options |= dict(num_speculative_tokens=k) if k else {}
            out = specdec.generate(model, ids, mask, **options)
            assert continuations(out, ids.shape[1], expected, 0) == expected, f"K={k}, batch 3"
            for row, prompt in enumerate(PROMPTS):
                alone = specdec.generate(model, prompt[None], torch.ones_like(prompt[None]), **options)
                assert alone[0, len(prompt) :].tolist() == expected[row], f"K={k}, batch 1"
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_the_parts_get_their_kernels():
    """What runs in order instead would be exact, too, and slower: these kinds have kernels of their own."""
    with batch_invariant(model := model_of("gpt2")):
        functions = {module.__dict__["forward"].func for module in model.modules() if type(module) is Conv1D}
        assert functions == {_conv_1d}
    with batch_invariant(model := model_of("cohere")):
        norms = modules_of(model, "CohereLayerNorm")
        assert {norm.weight.dim() for norm in norms} == {1, 2}
        assert {norm.__dict__["forward"].func for norm in norms} == {_layer_norm}
    with batch_invariant(model := model_of("qwen3_moe")):
        assert {m.__dict__["forward"].func for m in modules_of(model, "MoeExperts")} == {experts_forward}
        assert {m.__dict__["forward"].func for m in modules_of(model, "TopKRouter")} == {forward_in_order}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "flex_olmo"])
def test_experts_give_what_transformers_gives(family):
    """Biases, transposed weights, interleaved gates and clamps included; two tokens choose the same experts."""
    model = model_of(family)
    experts = next(module for module in model.modules() if is_experts(module))
    generator = torch.Generator().manual_seed(1)
    x = 9 * torch.randn(7, COMMON["hidden_size"], generator=generator)
    weights, indices = torch.rand(7, experts.num_experts, generator=generator).topk(2, -1)
    indices[1] = indices[0]
    expected = experts(x, indices, weights)
    found = experts_forward(experts, x, indices, weights)
    # Sums of large terms in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    check_agreement("experts", experts)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_choices_of_experts_are_given_again(family):
    """With other choices the logits are others; with its own given again they are the same, bit for bit."""
    model, ids = model_of(family), PROMPTS[2][None]
    with torch.no_grad(), choices_recorded(model) as choices:
        logits = model(input_ids=ids).logits
    assert len(choices) == 3 and choices[0].indices.shape == (11, 2)
    with torch.no_grad(), choices_given(model, choices) as shares:
        assert torch.equal(model(input_ids=ids).logits, logits)
    assert mean_share(shares) == 1
    other = [Choice((choice.indices.roll(1, 0), *choice.args[1:]), {}) for choice in choices]
    with torch.no_grad(), choices_given(model, other) as shares:
        assert not torch.equal(model(input_ids=ids).logits, logits)
    assert mean_share(shares) < 1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_router_that_chooses_otherwise_is_refused(monkeypatch):
    model = model_of("qwen3_moe")

    def backwards(router, x):
        logits, weights, indices = forward_in_order(router, x)
        return logits, weights, router.num_experts - 1 - indices

    monkeypatch.setattr("specdec.network.invariant.swap.forward_in_order", backwards)
    with pytest.raises(UnsupportedModelError, match="chooses other experts with the invariant kernels"):
        make_batch_invariant(model)


KERNELS = ("in_order_linear", "expert_groups", "expert_linear", "per_row", "norms", "gated")


@pytest.mark.interpreter
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v2", "gpt2", "cohere"])
def test_the_kernels_in_the_interpreter_give_the_models_logits(family, monkeypatch):
    """The launches that a GPU sees, in their order and with their operands; attention by its reference."""
    model, ids = model_of(family), PROMPTS[0][None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        with batch_invariant(model):
            launched = []
            for name in KERNELS:
                where = f"specdec.kernels.linear.{name}.uses_triton"
                monkeypatch.setattr(where, lambda *args, name=name: launched.append(name) or True)
            found = model(input_ids=ids, use_cache=False).logits
    of_mixtures = {"expert_groups", "expert_linear", "per_row"} if family in MIXTURES else set()
    assert {"in_order_linear", "norms"} | of_mixtures <= set(launched)
    # Sums of large terms in another order.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_experts_that_compute_something_else_are_refused():
    model = model_of("gpt_oss")
    experts = model.model.layers[0].mlp.experts

    class Other(type(experts)):
        def forward(self, *args):
            return super().forward(*args) * 1.01

    experts.__class__ = Other
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.experts \(Other\) computes something else"):
        make_batch_invariant(model)


def test_experts_that_are_quantised_or_elsewhere_are_refused_by_name():
    experts = model_of("gpt_oss").model.layers[0].mlp.experts
    whole = experts.down_proj
    experts.down_proj = nn.Parameter(whole[:3])
    with pytest.raises(UnsupportedModelError, match=r"x \(GptOssExperts\) holds 3 of 4 experts"):
        invariant_forward("x", experts)
    del experts.down_proj
    experts.down_proj = whole.detach().char()  # as packed weights are kept
    with pytest.raises(UnsupportedModelError, match=r"keeps down_proj as Tensor.*quantised"):
        invariant_forward("x", experts)


def test_modules_of_quantisation_are_refused_by_name():
    integration = type("Mxfp4GptOssExperts", (nn.Module,), {"__module__": "transformers.integrations.mxfp4"})
    with pytest.raises(UnsupportedModelError, match=r"x \(transformers.integrations.mxfp4.Mxfp4GptOssExperts\)"):
        invariant_forward("x", integration())


def test_a_patched_or_parametrised_part_is_refused_by_name():
    model = model_of("gpt2")
    part = model.transformer.h[1].mlp.c_fc
    part.forward = part.forward
    with pytest.raises(UnsupportedModelError, match=r"h.1.mlp.c_fc \(Conv1D\) has a replaced forward"):
        make_batch_invariant(model)
    del part.forward
    nn.utils.parametrizations.weight_norm(part)
    with pytest.raises(UnsupportedModelError, match=r"h.1.mlp.c_fc .*parametrised"):
        make_batch_invariant(model)


def test_weights_in_two_half_precisions_are_refused():
    model = model_of("qwen3_moe").half()
    model.model.layers[0].mlp.gate.bfloat16()
    with pytest.raises(UnsupportedModelError, match=r"torch.bfloat16, torch.float16; batch_invariant serves one dtype"):
        make_batch_invariant(model)


def prompts_of(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, COMMON["vocab_size"], (5 + 3 * (i % 17),), generator=generator) for i in range(count)]


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_logits_and_tokens_do_not_depend_on_the_batch_or_on_the_drafts(family):
    """In bfloat16, where the stock modules do differ."""
    model = model_of(family, hidden_size=256, head_dim=64, intermediate_size=352, moe_intermediate_size=160)
    model = model.to("cuda", torch.bfloat16)
    prompts = prompts_of(32)
    ids, mask = (tensor.cuda() for tensor in left_pad(prompts))
    with torch.no_grad():
        assert differences(model, prompts) > 0
        with batch_invariant(model):
            assert differences(model, prompts) == 0
            expected = [plain_greedy(model, prompt.cuda(), max_new_tokens=24) for prompt in prompts]
            for k in (0, 5):
                drafter = "prompt_lookup" if k else None
                options = dict(drafter=drafter, max_new_tokens=24, pad_token_id=0)
                options |= dict(num_speculative_tokens=k) if k else {}
                out = specdec.generate(model, ids, mask, **options)
                assert continuations(out, ids.shape[1], expected, 0) == expected, f"K={k}, batch 32"
                for row in (0, 7, 31):
                    prompt = prompts[row][None].cuda()
                    alone = specdec.generate(model, prompt, torch.ones_like(prompt), **options)
                    assert alone[0, prompt.shape[1] :].tolist() == expected[row], f"K={k}, batch 1"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_on_a_gpu_a_mixture_is_captured(family):
    """A replay serves other tokens and other experts than those that it was captured with."""
    model = model_of(family, hidden_size=256, head_dim=64).to("cuda", torch.bfloat16)
    with batch_invariant(model), torch.no_grad():
        blocks = [
            module for module in model.modules() if type(module).__name__.endswith(("MoE", "MoeBlock", "Moe", "MLP"))
        ]
        block = next(module for module in blocks if any("xperts" in name for name, _ in module.named_children()))
        hidden = [torch.randn(4, 6, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        taken = hidden[0].clone()
        expected = [first_of(block(x.clone())) for x in hidden]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = first_of(block(taken))
        taken.copy_(hidden[1])
        graph.replay()
        assert torch.equal(out.view(4, 6, 256), expected[1].view(4, 6, 256))


def first_of(output):
    return output[0] if isinstance(output, tuple) else output
