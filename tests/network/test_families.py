"""Every model family is either served token for token or refused before the first token; none is served wrongly."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import chain, repeat

import families
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from families import BROKEN, REFUSED, SERVED, is_known, tiny
from packaging.specifiers import SpecifierSet
from refusals import assert_refused
from tiny import left_pad, plain_greedy, tiny_llama
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import specdec
from specdec.batch.cache import RaggedCache
from specdec.drafters.synthetic import Synthetic
from specdec.errors import SpecDecError, UnsupportedModelError
from specdec.network import base as network
from specdec.network import choose
from specdec.network.probe import probe, probe_tolerance, relative_difference
from specdec.network.refusals import check_lengths
from specdec.network.stock import StockNetwork

NEW_TOKENS = 14
FUSED = ("llama", "mistral", "qwen2", "qwen3")
# The families on which the design was tried; each must have an entry of its own.
NAMED = """
    llama qwen2 qwen3 mistral ministral phi phi3 gemma gemma2 gemma3_text gemma3n_text gemma4_text vaultgemma starcoder2
    olmo olmo2 olmo3 granite cohere cohere2 glm glm4 smollm3 stablelm nemotron helium exaone4 ernie4_5 hunyuan_v1_dense
    seed_oss arcee apertus llama4_text gpt2 gpt_bigcode gpt_neox opt biogpt persimmon mixtral gpt_oss qwen3_moe olmoe
    granitemoe deepseek_v3 dots1 ernie4_5_moe glm4_moe gptj codegen bloom mpt xglm falcon falcon_alibi gpt_neo doge
    mamba mamba2 recurrent_gemma falcon_h1 qwen3_next jamba minimax bamba zamba2 rwkv lfm2 xlstm t5 bart
""".split()  # noqa: SIM905


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Operations of a few thousand elements only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str) -> PreTrainedModel:
    if not is_known(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if is_broken(family):
        pytest.skip(f"transformers {transformers.__version__} cannot decode {family} itself")
    return tiny(family)


def is_broken(family: str) -> bool:
    return family in BROKEN and transformers.__version__ in SpecifierSet(BROKEN[family])


def three_prompts(vocab_size: int = 80) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in (4, 9, 6)]


def check_equal(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, min_distinct: int = 4, layout: str = "ragged"
) -> None:
    """Plain and with drafts of which 0 to 3 are accepted, the second time with a prefill in several chunks."""
    prompts = three_prompts(min(80, model.get_input_embeddings().weight.shape[0]))
    ids, mask = left_pad(prompts)
    expected = [plain_greedy(model, prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]
    assert len({token for row in expected for token in row}) >= min_distinct, "degenerate output shows nothing"
    plain = specdec.generate(model, ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, layout=layout)
    assert plain[:, ids.shape[1] :].tolist() == expected
    monkeypatch.setitem(network.PREFILL_TOKENS, "cpu", 10)
    output = specdec.generate(
        model,
        ids,
        attention_mask=mask,
        drafter=Synthetic(0.6, [torch.tensor(row) for row in expected], seed=3),
        num_speculative_tokens=3,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        layout=layout,
    )
    assert output.sequences[:, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("family", SERVED)
def test_served_family_equals_plain_greedy(family, monkeypatch):
    check_equal(build(family), monkeypatch)


@pytest.mark.parametrize("family", ["gpt_neo", "falcon_alibi", "bloom", "gemma2", "gpt_oss", "llama4_text"])
def test_repad_serves_one_length_per_batch(family, monkeypatch):
    check_equal(build(family), monkeypatch, layout="repad")


@pytest.mark.slow
@pytest.mark.parametrize("family", SERVED)
def test_every_family_in_the_repad_layout(family, monkeypatch):
    check_equal(build(family), monkeypatch, layout="repad")


@pytest.mark.parametrize("family", FUSED)
def test_fused_families_run_on_their_own_modules_too(family, monkeypatch):
    monkeypatch.setattr(choose, "can_fuse", lambda model: False)
    check_equal(build(family), monkeypatch)


@pytest.mark.parametrize("family", REFUSED)
def test_other_family_is_refused_before_the_first_token(family):
    model, steps = build(family), []
    ids, mask = left_pad(three_prompts())
    with pytest.raises(UnsupportedModelError) as refusal:
        specdec.generate(model, ids, attention_mask=mask, max_new_tokens=4, on_commit=steps.append)
    assert REFUSED[family][0] in str(refusal.value)
    assert not steps


@pytest.mark.skipif(not is_broken("doge"), reason="this version of transformers masks doge causally")
def test_doge_is_refused_where_it_attends_to_later_tokens():
    ids, mask = left_pad(three_prompts())
    with pytest.raises(UnsupportedModelError, match="upgrade transformers"):
        specdec.generate(tiny("doge"), ids, attention_mask=mask, max_new_tokens=4)


def test_every_named_family_has_an_entry_and_enough_are_served():
    assert set(NAMED) <= set(SERVED) | set(REFUSED)
    assert not set(SERVED) & set(REFUSED)
    assert sum(is_known(family) for family in SERVED) >= 45


RECURRENT = [family for family, (words, _) in REFUSED.items() if words == families.RECURRENT]


@pytest.mark.parametrize("family", ["gpt_neo", "bert_encoder", "paligemma", *RECURRENT])
def test_probe_refuses_without_the_names(family, monkeypatch):
    monkeypatch.setattr(choose, "check_architecture", lambda *arguments: None)
    for dtype in (torch.float32, torch.bfloat16):
        model = build(family).to(dtype)
        assert_refused(UnsupportedModelError, "", choose.build_network, model, 2, 32)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3n_text", "gpt_oss", "bloom", "gpt2"])
def test_probe_accepts_bfloat16(family):
    choose.build_network(build(family).bfloat16(), 2, 32)


def state(model: PreTrainedModel) -> dict:
    """Every attribute of every module and config that can be compared, buffers included."""
    found = {}
    for name, module in model.named_modules():
        for key, value in {**vars(module), **vars(getattr(module, "config", None) or nn.Identity())}.items():
            if isinstance(value, torch.Tensor):
                found[name, key] = value.tolist()
            elif value is None or isinstance(value, bool | int | float | str):
                found[name, key] = value
        for key, buffer in module._buffers.items():
            found[name, "buffer", key] = None if buffer is None else buffer.tolist()
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            found[name, "attention"] = module.config._attn_implementation
    return found


ROTATIONS = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "gemma3n_text", "gpt2", "falcon", "gemma3", *ROTATIONS])
def test_generating_leaves_the_model_as_it_was(family):
    model = tiny_llama(rope_parameters=ROTATIONS[family]) if family in ROTATIONS else build(family)
    model.train()
    list(model.modules())[3].eval()
    ids, mask = left_pad(three_prompts(60))
    model(ids)  # some rotations keep what they compute at the first forward of any kind
    before = state(model)
    specdec.generate(model, ids, attention_mask=mask, max_new_tokens=4)
    assert state(model) == before


def test_model_in_training_mode_gives_the_same_tokens(monkeypatch):
    model = build("gpt2")
    assert model.transformer.drop.p > 0
    ids, mask = left_pad(three_prompts())
    expected = specdec.generate(model, ids, attention_mask=mask, max_new_tokens=NEW_TOKENS)
    model.train()
    assert specdec.generate(model, ids, attention_mask=mask, max_new_tokens=NEW_TOKENS).tolist() == expected.tolist()
    assert all(module.training for module in model.modules())


def test_model_with_accelerate_hooks(monkeypatch):
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model = build("llama")
    add_hook_to_module(model, Counting())
    add_hook_to_module(model.model.layers[1].mlp, Counting())
    check_equal(model, monkeypatch)
    assert Counting.calls


def test_model_with_a_wrapped_forward_and_an_adapter(monkeypatch):
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base, self.down = base, nn.Linear(base.in_features, 2)
            self.up = nn.Linear(2, base.out_features)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    model = build("qwen2")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    check_equal(model, monkeypatch)


@pytest.mark.parametrize("positions", [10, 16])
@pytest.mark.parametrize("make", [tiny_llama, lambda **options: tiny("gpt2", **options)], ids=["llama", "gpt2"])
def test_probe_of_a_very_small_model(make, positions):
    options = dict(vocab_size=17, num_hidden_layers=1, max_position_embeddings=positions)
    model = make(**options)
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([6])]
    ids, mask = left_pad(prompts)
    expected = [plain_greedy(model, prompt, max_new_tokens=6, eos_token_id=None) for prompt in prompts]
    output = specdec.generate(model, ids, attention_mask=mask, max_new_tokens=6, eos_token_id=None)
    assert output[:, 3:].tolist() == expected


@pytest.mark.parametrize(
    ("differences", "accepted"),
    [([0.5, 1e-7], True), ([float("nan"), 0.5, 1e-7], True), ([0.5] * 3, False), ([float("nan")] * 3, False)],
)
def test_one_near_tie_in_a_router_is_not_refused(differences, accepted, monkeypatch):
    answers = chain(differences, repeat(differences[-1]))  # of the other layout as well, when a remedy is sought
    monkeypatch.setattr(choose, "can_fuse", lambda model: False)
    monkeypatch.setattr("specdec.network.probe.probe", lambda *arguments: next(answers))
    with nullcontext() if accepted else pytest.raises(UnsupportedModelError, match="other logits"):
        choose.build_network(tiny_llama(), 2, 32)


def test_difference_of_masked_and_of_nan_logits():
    expected = torch.randn(3, 40)
    expected[:, :10] = torch.finfo(torch.float32).min
    shifted = expected.clone()
    shifted[1, 10:] = torch.randn(30)
    assert relative_difference(expected, expected) == 0
    assert relative_difference(shifted, expected) > 0.5
    assert relative_difference(expected, torch.full_like(expected, float("nan"))) == 0
    broken = expected.clone()
    broken[2, 30] = float("nan")
    assert not relative_difference(broken, expected) <= 1


MASK_OFFSETS = {
    "a rejected draft stays visible": lambda cache, layer_idx=0: cache.columns.starts + 1,
    "every row is as long as the longest": lambda cache, layer_idx=0: torch.full_like(
        cache.columns.starts, int(cache.columns.starts.max())
    ),
}


@pytest.mark.parametrize("fault", MASK_OFFSETS)
def test_probe_sees_wrong_masks_in_half_precision(fault, demo_pair, monkeypatch):
    model = copy.deepcopy(demo_pair.target).bfloat16()
    limit = probe_tolerance(model)
    assert probe(model, StockNetwork) < limit / 3
    monkeypatch.setattr(RaggedCache, "get_query_offset", MASK_OFFSETS[fault])
    assert min(probe(model, StockNetwork, seed) for seed in range(3)) > limit


def test_probe_sees_positions_of_the_longest_row(demo_pair, monkeypatch):
    run = StockNetwork._run

    def mistaken(self, token_ids, positions, *rest):
        return run(self, token_ids, positions.max(0, keepdim=True).values.expand_as(positions), *rest)

    monkeypatch.setattr(StockNetwork, "_run", mistaken)
    model = copy.deepcopy(demo_pair.target).bfloat16()
    assert min(probe(model, StockNetwork, seed) for seed in range(3)) > probe_tolerance(model)


def test_llama4_temperature_is_refused_where_it_would_mix_rows():
    model = build("llama4_text")
    model.config.attn_temperature_tuning, model.config.floor_scale = True, 64
    check_lengths(model, 30)
    with pytest.raises(SpecDecError, match="keep within 30 tokens"):
        check_lengths(model, 31)
