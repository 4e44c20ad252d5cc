"""Cases that once went wrong, or would without one particular line."""

from __future__ import annotations

import threading

import families
import pytest
import torch
from tiny import VOCAB, continuations, left_pad, plain_greedy, tiny_llama
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StoppingCriteriaList,
)
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import specdec
from specdec.draft import NO_TOKEN, Draft
from specdec.drafter import Drafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.synthetic import Synthetic

TARGET = tiny_llama(0, eos_token_id=None)
DRAFT = tiny_llama(1, eos_token_id=None)
PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16])]
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip


def same(model=TARGET, drafter=DRAFT, prompts=PROMPTS, **options):
    """Whether our batch equals transformers' one by one."""
    options = {"max_new_tokens": 16, "pad_token_id": 0, **options}
    expected = [plain_greedy(model, prompt, **options) for prompt in prompts]
    ids, mask = left_pad(prompts)
    out = specdec.generate(model, ids, mask, drafter=drafter, **options)
    return continuations(out, ids.shape[1], expected, 0) == expected


def test_a_rotation_that_switches_is_used_up_to_the_switch():
    """Drafts of a row that is ahead must not push the positions of the batch over it."""
    torch.manual_seed(0)
    model = families.randomise(
        Phi3ForCausalLM(
            Phi3Config(
                vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0,
                bos_token_id=1, eos_token_id=None, sliding_window=None, rope_parameters=LONG_ROPE,
            )
        ).eval(),
        0,
    )  # fmt: skip
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(3, 61, (length,), generator=generator) for length in (8, 4)]
        truth = [torch.tensor(plain_greedy(model, prompt, max_new_tokens=8)) for prompt in prompts]
        assert same(model, Synthetic(0.6, truth, seed), prompts, max_new_tokens=8)
    with pytest.raises(specdec.UnsupportedModelError, match="longrope"):
        specdec.generate(model, prompts[0][None], max_new_tokens=9)


def test_a_rotation_per_layer_type_is_looked_at():
    rope = {"full_attention": LONG_ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    model = families.tiny("gemma3_text", 0, max_position_embeddings=64, rope_parameters=rope)
    with pytest.raises(specdec.UnsupportedModelError, match="longrope"):
        specdec.generate(model, PROMPTS[0][None], max_new_tokens=12)


def test_a_draft_model_of_nan_leaves_samples_alone():
    broken = tiny_llama(1, eos_token_id=None)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    ids = PROMPTS[0].expand(600, -1)
    options = {"do_sample": True, "max_new_tokens": 2, "top_k": 0, "temperature": 2.0, "seed": 5}
    counts = [
        torch.bincount(specdec.generate(TARGET, ids, drafter=drafter, **options)[:, -1], minlength=VOCAB).float() / 600
        for drafter in (None, broken)
    ]
    assert (counts[0] - counts[1]).abs().sum() / 2 < 0.25, "two samples of one distribution are this close"


def test_no_forbidden_token_where_the_draft_model_has_no_other():
    draft = tiny_llama(1, vocab_size=VOCAB - 3, eos_token_id=None)
    ids, mask = left_pad(PROMPTS)
    out = specdec.generate(
        TARGET, ids, mask, drafter=draft, do_sample=True, seed=5, max_new_tokens=12,
        suppress_tokens=list(range(VOCAB - 3)),
    )  # fmt: skip
    assert set(out[:, ids.shape[1] :].flatten().tolist()) <= {VOCAB - 3, VOCAB - 2, VOCAB - 1}


class Always(Drafter):
    """Proposes the same thing for every row."""

    name = "always"

    def __init__(self, *tokens, probs=None, make=None):
        self.tokens, self.probs, self.make = tokens, probs, make

    def propose(self, rows, max_tokens):
        if self.make is not None:
            return self.make(rows, max_tokens)
        ids = torch.tensor(self.tokens)[:max_tokens].expand(len(rows), -1)
        return Draft(ids, self.probs and torch.full((*ids.shape, VOCAB), self.probs))


@pytest.mark.parametrize("tokens", [(NO_TOKEN, 7), (-5, 7), (10**6, 7), (7, 10**6)])
def test_what_is_no_token_counts_as_not_drafted(tokens):
    assert same(drafter=Always(*tokens))
    ids = PROMPTS[0].expand(200, -1)
    options = {"do_sample": True, "seed": 1, "max_new_tokens": 6}
    out = specdec.generate(TARGET, ids, drafter=Always(*tokens), num_speculative_tokens=2, **options)
    assert out.min() >= 0 and out.max() < VOCAB
    if tokens[0] < 0 or tokens[0] > VOCAB:
        assert torch.equal(out, specdec.generate(TARGET, ids, **options)), "nothing was drafted, so nothing changes"


@pytest.mark.parametrize(
    "make",
    [
        lambda rows, k: None,
        lambda rows, k: torch.zeros(len(rows), k, dtype=torch.long),
        lambda rows, k: Draft(torch.zeros(len(rows) + 1, k, dtype=torch.long)),
        lambda rows, k: Draft(torch.zeros(k, dtype=torch.long)),
        lambda rows, k: Draft(torch.zeros(len(rows), k)),
        lambda rows, k: Draft(torch.zeros(len(rows), k + 1, dtype=torch.long)),
        lambda rows, k: Draft(torch.zeros(len(rows), k, dtype=torch.long), torch.ones(len(rows), k, 3)),
        lambda rows, k: Draft(torch.zeros(len(rows), k, dtype=torch.long), None, torch.zeros(len(rows), k)),
    ],
)
def test_a_draft_of_the_wrong_kind_is_the_drafters_error(make):
    ids, mask = left_pad(PROMPTS)
    with pytest.raises(specdec.DrafterError, match="always"):
        specdec.generate(TARGET, ids, mask, drafter=Always(make=make), max_new_tokens=8)


@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_probabilities_that_are_none_are_the_drafters_error(value):
    with pytest.raises(specdec.DrafterError, match="sum to 1"):
        specdec.generate(
            TARGET, PROMPTS[0][None], drafter=Always(7, 8, probs=value), do_sample=True, seed=0, max_new_tokens=8
        )


def test_a_users_processor_stands_in_for_the_built_in_one():
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(5.0)])
    assert same(repetition_penalty=1.1, logits_processor=penalty)
    ends = list(range(3, 30))
    minimum = LogitsProcessorList([MinLengthLogitsProcessor(14, torch.tensor(ends))])
    assert same(eos_token_id=ends, logits_processor=minimum)
    ids, mask = left_pad(PROMPTS[:1])
    options = {"max_new_tokens": 16, "repetition_penalty": 1.1, "logits_processor": penalty, "pad_token_id": 0}
    inside = TARGET.generate(ids, attention_mask=mask, custom_generate=specdec.speculative(DRAFT), **options)
    assert torch.equal(inside, TARGET.generate(ids, attention_mask=mask, **options))


@pytest.mark.parametrize("criterion", [MaxLengthCriteria(14), EosTokenCriteria(list(range(3, 20)))])
def test_a_users_criteria_of_a_built_in_type_are_asked(criterion):
    options = {"max_new_tokens": 24, "stopping_criteria": StoppingCriteriaList([criterion])}
    assert same(**options)
    ids, mask = left_pad(PROMPTS[:1])
    inside = TARGET.generate(
        ids, attention_mask=mask, custom_generate=specdec.speculative(DRAFT), pad_token_id=0, **options
    )
    assert torch.equal(inside, TARGET.generate(ids, attention_mask=mask, pad_token_id=0, **options))


def test_inside_transformers_nothing_is_ignored():
    ids, mask = left_pad(PROMPTS[:1])
    loop = specdec.speculative(DRAFT)
    with pytest.raises(specdec.InputError, match="position_ids"):
        TARGET.generate(ids, attention_mask=mask, custom_generate=loop, position_ids=torch.arange(6)[None] * 3)
    for name in ("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size"):
        with pytest.raises(specdec.ConfigError, match=name):
            TARGET.generate(ids, attention_mask=mask, custom_generate=loop, max_new_tokens=4, **{name: 2})
    options = {
        "max_new_tokens": 4, "forced_eos_token_id": 2, "pad_token_id": 0,
        "prefix_allowed_tokens_fn": lambda row, text: list(range(3, VOCAB)),
    }  # fmt: skip
    model = tiny_llama(0)
    inside = model.generate(ids, attention_mask=mask, custom_generate=loop, **options)
    assert torch.equal(inside, model.generate(ids, attention_mask=mask, **options))


def test_a_trie_of_allowed_texts():
    """The function knows nothing of texts that drafts would lead to and that can never be written."""
    texts = [[5, 6, 7, 8, 9, 10, 2], [5, 6, 11, 12, 13, 14, 2], [15, 16, 17, 18, 19, 20, 2]]
    prompts = [torch.tensor([21, 22, 23, 24, 25, 26]), torch.tensor([27, 28, 29, 30, 31, 32])]

    def allowed(row, text):
        done = text.tolist()[6:]
        return sorted({t[len(done)] for t in texts if t[: len(done)] == done and len(t) > len(done)})

    model = tiny_llama(0)
    for drafter in (None, DRAFT, PromptLookup()):
        assert same(model, drafter, prompts, prefix_allowed_tokens_fn=allowed, max_new_tokens=10)
    out = specdec.generate(
        model, torch.stack(prompts), drafter=DRAFT, do_sample=True, seed=1, max_new_tokens=10,
        prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip
    assert all(row[6:].tolist() in texts for row in out)


def test_edited_attributes_are_noticed():
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, pad_token_id=0, sliding_window=4,
        )
    ).eval()  # fmt: skip
    assert same(model, "prompt_lookup")
    for window in (None, 3):
        model.config.sliding_window = window
        assert same(model, "prompt_lookup")
    model.model.layers[0].self_attn.scaling = 1.0
    assert same(model, "prompt_lookup")
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    assert same(model, "prompt_lookup")


def test_reordered_weights_are_noticed():
    model = tiny_llama(0, eos_token_id=None)
    for seed in range(8):
        weight = model.model.layers[0].self_attn.o_proj.weight.data
        weight.copy_(weight[:, torch.randperm(32, generator=torch.Generator().manual_seed(seed))])
        assert same(model, None, PROMPTS[:2], max_new_tokens=10)


def test_overlapping_calls_leave_the_model_as_it_was():
    model = families.tiny("gemma3_text", 0)
    own = model.config._attn_implementation
    ids, mask = left_pad(PROMPTS)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    first_in, second_out, refusals = threading.Event(), threading.Event(), []

    def first():
        specdec.generate(model, ids, mask, max_new_tokens=8, on_commit=lambda r: (first_in.set(), second_out.wait(20)))

    def second():
        first_in.wait(20)
        try:
            specdec.generate(model, ids, mask, max_new_tokens=8)
        except specdec.BusyError as error:
            refusals.append(str(error))
        second_out.set()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refusals) == 1 and "another engine is within a step of this Gemma3ForCausalLM" in refusals[0]
    assert model.config._attn_implementation == own
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), expected)


def test_transformers_can_be_called_from_a_callback():
    model = families.tiny("gemma3_text", 0)
    ids, mask = left_pad(PROMPTS)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected, seen = model.generate(ids, **options), []
    specdec.generate(
        model, ids, mask, max_new_tokens=3, on_commit=lambda r: seen.append(model.generate(ids, **options))
    )
    assert seen and all(torch.equal(out, expected) for out in seen)


@pytest.mark.parametrize("name", ["gemma2", "vaultgemma", "gpt_oss", "llama"])
def test_the_target_can_be_called_and_draft_for_itself_meanwhile(name):
    """Without a ragged cache its attention keeps its soft-caps and sinks."""
    model = families.tiny(name, 0)
    model.set_attn_implementation("eager")
    options = dict(max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    ids, during = torch.tensor([[5, 9, 7, 12]]), []
    with torch.no_grad():
        before = model(ids, use_cache=False).logits

    def look(report):
        with torch.no_grad():
            during.append(model(ids, use_cache=False).logits)

    expected = plain_greedy(model, ids[0], max_new_tokens=8)
    out = specdec.generate(model, ids, drafter=model, num_speculative_tokens=3, on_commit=look, **options)
    assert out[0, 4:].tolist() == expected
    assert during and all(torch.allclose(logits, before, atol=1e-4) for logits in during)


def test_a_drafter_at_work_is_not_used_twice():
    drafter, another = PromptLookup(), tiny_llama(5)
    ids = PROMPTS[0][None]

    def again(report):
        specdec.generate(another, ids, drafter=drafter, max_new_tokens=4)

    with pytest.raises(specdec.DrafterError, match="already at work"):
        specdec.generate(TARGET, ids, drafter=drafter, max_new_tokens=4, on_commit=again)
    assert same(drafter=drafter)


class NanBehind55(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores * torch.where(input_ids[:, -1:] == 55, float("nan"), 1.0)


def test_nan_behind_a_rejected_draft_does_not_matter():
    processors = LogitsProcessorList([NanBehind55()])
    assert 55 not in plain_greedy(TARGET, PROMPTS[0], max_new_tokens=16)
    assert same(drafter=Always(55, 55), prompts=PROMPTS[:1], logits_processor=processors)
    with pytest.raises(specdec.NumericalError):
        specdec.generate(TARGET, torch.tensor([[5, 55]]), logits_processor=processors, max_new_tokens=4)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny_llama(0, eos_token_id=None)
    assert same(model)


def test_autocast_around_generate():
    """The fused forward's packed weights are in the model's dtype; under autocast the model's own modules run."""
    model, draft = tiny_llama(0, eos_token_id=None), tiny_llama(5, eos_token_id=None)
    prompt = torch.tensor([[3, 4, 5, 6, 7]])
    outside = plain_greedy(model, prompt[0], max_new_tokens=20)
    for drafter in ("prompt_lookup", draft):
        assert specdec.generate(model, prompt, drafter=drafter, max_new_tokens=20)[0, 5:].tolist() == outside
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain_greedy(model, prompt[0], max_new_tokens=20)
        for drafter in ("prompt_lookup", draft):
            found = specdec.generate(
                model, prompt, drafter=drafter, max_new_tokens=20, return_dict_in_generate=True, output_logits=True
            )
            assert found.sequences[0, 5:].tolist() == expected
            assert torch.equal(found.logits[0], found.logits[0].bfloat16().float()), "computed in autocast's dtype"
    assert specdec.generate(model, prompt, drafter=draft, max_new_tokens=20)[0, 5:].tolist() == outside


@pytest.mark.parametrize("fill", [float("nan"), float("-inf")])
def test_a_processor_that_leaves_nothing_is_named(fill):
    """The weights are not to blame."""

    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, fill)

    with pytest.raises(specdec.NumericalError, match="a logits processor returned NaN or left no token possible"):
        specdec.generate(
            TARGET, PROMPTS[0][None], logits_processor=LogitsProcessorList([Broken()]), max_new_tokens=3,
            do_sample=True, top_k=0,
        )  # fmt: skip


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])  # the fused forward, and the model's own modules
def test_training_mode_is_put_back(hidden_act):
    model = tiny_llama(0, eos_token_id=None, attention_dropout=0.5, hidden_act=hidden_act)
    expected = plain_greedy(model, PROMPTS[0], max_new_tokens=12)
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    out = specdec.generate(model, PROMPTS[0][None], drafter="prompt_lookup", max_new_tokens=12)
    assert out[0, len(PROMPTS[0]) :].tolist() == expected
    assert [module.training for module in model.modules()] == modes
