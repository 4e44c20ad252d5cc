"""The next forward, launched before a step's report is read: the same tokens and counts, whatever ends or leaves."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running_ahead import running_ahead
from tiny import VOCAB, continuations, left_pad, plain_greedy, tiny_llama

import specdec
from specdec.draft import Shown
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.look_ahead import LookAhead, LookAheadEmbeddings
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.engine.target import Target
from specdec.policies.by_estimate import Confidence
from specdec.policies.cost_model import CostModel
from specdec.policy import LengthPolicy

TARGET, OTHER, CLOSE = map(tiny_llama, (0, 1, 0))
with torch.no_grad():
    for parameter in CLOSE.parameters():  # right now and then
        parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
for model in (TARGET, OTHER, CLOSE):
    specdec.make_batch_invariant(model)

DRAFTERS = {
    "none": lambda: None,
    "lookup": PromptLookup,
    "other": lambda: DraftModel(OTHER),
    "close": lambda: DraftModel(CLOSE),
    "itself": lambda: DraftModel(TARGET),
}


def run(prompts, drafter, k=3, **options):
    ids, mask = left_pad(prompts)
    built = DRAFTERS[drafter]()
    options = {"pad_token_id": 0, "return_dict_in_generate": True, **options}
    if built is not None:
        options["num_speculative_tokens"] = k
    reports = []
    out = specdec.generate(TARGET, ids, mask, drafter=built, on_commit=reports.append, **options)
    return out, reports


def some_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def check_alike(prompts, drafter, k=3, **options):
    """Ahead and not: the same tokens, step by step. Returns the output and the counts of `running_ahead`."""
    expected, steps = run(prompts, drafter, k, **options)
    with running_ahead() as counts:
        out, reports = run(prompts, drafter, k, **options)
    assert torch.equal(out.sequences, expected.sequences)
    ours, theirs = out.speculation, expected.speculation
    for name in ("num_new_tokens", "num_target_calls", "num_accepted_draft_tokens", "acceptance_histogram"):
        if drafter == "none" or drafter == "lookup" or name == "num_new_tokens":
            assert getattr(ours, name) == getattr(theirs, name), name
    assert len(reports) == len(steps) or drafter not in ("none", "lookup")
    return out, counts


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    drafter=st.sampled_from(sorted(DRAFTERS)),
    k=st.integers(1, 6),
    new_tokens=st.integers(1, 24),
    ends=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_tokens_are_plain_greedy_ones(lengths, drafter, k, new_tokens, ends, seed):
    prompts = some_prompts(*lengths, seed=seed)
    options = {"max_new_tokens": new_tokens, "pad_token_id": 0, "eos_token_id": None}
    if ends:  # tokens that the rows do write, so that they leave at different steps
        options["eos_token_id"] = sorted({plain_greedy(TARGET, prompt, **options)[-1] for prompt in prompts[:2]})
    expected = [plain_greedy(TARGET, prompt, **options) for prompt in prompts]
    out, _ = check_alike(prompts, drafter, k, **options)
    assert continuations(out.sequences, max(lengths), expected, 0) == expected


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_steps_begin_ahead_until_all_rows_may_end(drafter):
    out, counts = check_alike(some_prompts(5, 3, 9), drafter, max_new_tokens=30, eos_token_id=None)
    assert counts["begun"] == counts["used"] > 5
    # The first step follows the prefill; the last ones may reach every row's limit, of three drafts and one token each.
    assert counts["used"] >= out.speculation.num_target_calls - 6
    assert counts["drafts"] == 0


def test_a_draft_models_first_forward_begins_ahead():
    out, counts = check_alike(some_prompts(5, 3, 9), "close", max_new_tokens=30, eos_token_id=None)
    assert counts["begun"] == 0 and 3 < counts["drafts"] < out.speculation.num_target_calls
    assert out.speculation.num_accepted_draft_tokens > 0


@pytest.mark.parametrize("drafter", ["lookup", "close", "none"])
@pytest.mark.parametrize("verification", ["token", "block"])
def test_samples_do_not_depend_on_it(drafter, verification):
    check_alike(
        some_prompts(5, 3, 9, 2), drafter, max_new_tokens=24, do_sample=True, temperature=0.8, top_k=20, seed=7,
        verification=verification, eos_token_id=[5, 9],
    )  # fmt: skip


def test_whoever_keeps_logits_does_not_begin_ahead():
    prompts = some_prompts(5, 3)
    for options in ({"output_logits": True}, {"output_scores": True}, {"repetition_penalty": 1.3}):
        _, counts = check_alike(prompts, "lookup", max_new_tokens=12, eos_token_id=None, **options)
        assert counts["begun"] == 0
    expected, _ = run(prompts, "none", max_new_tokens=12, eos_token_id=None, output_logits=True)
    with running_ahead():
        out, _ = run(prompts, "none", max_new_tokens=12, eos_token_id=None, output_logits=True)
    assert all(map(torch.equal, out.logits, expected.logits))


class Alternating(LengthPolicy):
    """Says in advance what it does not keep to: a forward that was begun for something else is not used."""

    name = "alternating"

    def start(self, target, drafter, max_tokens):
        self.num_steps = 0

    def widths(self, rows, max_tokens):
        self.num_steps += 1
        return (rows.row_ids + self.num_steps) % 3

    def next_width(self, max_tokens):
        return max_tokens if self.num_steps % 2 else 0


@pytest.mark.parametrize("drafter", ["lookup", "close", "itself"])
def test_a_broken_promise_costs_a_forward_and_no_token(drafter):
    prompts = some_prompts(5, 3, 9)
    expected, _ = run(prompts, "none", max_new_tokens=24, eos_token_id=None)
    with running_ahead() as counts:
        out, reports = run(prompts, drafter, max_new_tokens=24, eos_token_id=None, length_policy=Alternating())
    assert torch.equal(out.sequences, expected.sequences)
    assert counts["begun"] > counts["used"]
    assert all((report.num_drafted <= 2).all() for report in reports)


@pytest.mark.parametrize("policy", ["heuristic", "confidence", "cost_model"])
def test_policies(policy):
    chosen = Confidence(0.3) if policy == "confidence" else policy
    prompts = some_prompts(5, 3, 9)
    expected, _ = run(prompts, "none", max_new_tokens=60, eos_token_id=None)
    with running_ahead() as counts:
        out, _ = run(prompts, "close", max_new_tokens=60, eos_token_id=None, length_policy=chosen)
    assert torch.equal(out.sequences, expected.sequences)
    assert (counts["drafts"] > 0) == (policy == "confidence")


class Pattern(LengthPolicy):
    """Drafts or does not as the pattern says, over and over, and says so in advance."""

    name = "pattern"

    def __init__(self, *pattern):
        self.pattern = pattern

    def start(self, target, drafter, max_tokens):
        self.num_steps = 0

    def widths(self, rows, max_tokens):
        self.num_steps += 1
        return np.full(len(rows), min(self.pattern[(self.num_steps - 1) % len(self.pattern)], max_tokens))

    def next_width(self, max_tokens):
        return self.pattern[self.num_steps % len(self.pattern)]


@pytest.mark.parametrize("pattern", [(4, 0), (4, 0, 0), (4, 4, 0)])
def test_samples_behind_plain_steps_depend_on_neither_batch_nor_launch(pattern):
    """Behind a rejected draft the draft model's cache holds keys of tokens that are not in the text."""
    prompts, seeds = some_prompts(5, 3, 1), [7, 8, 9]
    options = dict(max_new_tokens=30, do_sample=True, top_k=0, eos_token_id=None)
    waiting, _ = run(prompts, "close", 4, length_policy=Pattern(*pattern), seed=seeds, **options)
    with running_ahead():
        ahead, _ = run(prompts, "close", 4, length_policy=Pattern(*pattern), seed=seeds, **options)
    assert torch.equal(ahead.sequences, waiting.sequences)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone, _ = run([prompt], "close", 4, length_policy=Pattern(*pattern), seed=[seed], **options)
        assert torch.equal(alone.sequences[0, len(prompt) :], waiting.sequences[row, 5:])


@pytest.mark.parametrize("helpers, pattern", [(31, (1, 1, 0)), (62, (1, 0)), (4, (1, 1, 0))])
def test_nothing_begins_while_extra_queries_may_be_asked(helpers, pattern):
    """What is behind them is computed in a forward of its own, where they are too many for the step's."""
    target = tiny_llama(1, vocab_size=7)
    embeddings = LookAheadEmbeddings(1, 32, helpers)
    torch.nn.init.normal_(embeddings.weight, std=0.4, generator=torch.Generator().manual_seed(1))
    embeddings.trained_for(target, {})
    prompts = [torch.tensor([3, 4, 5, 6, 3][:length]) for length in (5, 3, 4)]
    ids, mask = left_pad(prompts)
    options = dict(max_new_tokens=60, eos_token_id=None, pad_token_id=0)
    with specdec.batch_invariant(target), running_ahead() as counts:
        found = specdec.generate(
            target, ids, mask, drafter=LookAhead(embeddings), num_speculative_tokens=1, length_policy=Pattern(*pattern),
            **options,
        )  # fmt: skip
        expected = [plain_greedy(target, prompt, **options) for prompt in prompts]
    assert found[:, 5:].tolist() == expected
    assert counts["begun"] == counts["used"]


def test_more_extra_queries_than_a_mask_tells_apart_are_refused():
    """A batch-invariant step has 64 bits for what a column sees of the others."""
    target, ids = tiny_llama(1), torch.tensor([[5, 6]])
    embeddings = LookAheadEmbeddings(3, 32, 60)
    embeddings.trained_for(target, {})
    options = dict(drafter=LookAhead(embeddings), num_speculative_tokens=2, max_new_tokens=4)
    specdec.generate(target, ids, **options)
    with specdec.batch_invariant(target), pytest.raises(specdec.ConfigError, match=r"63 extra queries .* 65 columns"):
        specdec.generate(target, ids, **options)


@pytest.mark.parametrize("k", [1, 2])
def test_no_more_tokens_are_begun_than_may_be_drafted(k):
    prompts = some_prompts(5, 3, 9)
    expected, _ = run(prompts, "none", max_new_tokens=30, eos_token_id=None)
    with running_ahead() as counts:
        out, reports = run(prompts, "lookup", k, max_new_tokens=30, eos_token_id=None, length_policy=Pattern(3))
    assert torch.equal(out.sequences, expected.sequences) and counts["used"] > 0
    assert all((report.num_drafted <= k).all() for report in reports)


class Showing(PromptLookup):
    """Shows what it copies."""

    name = "showing"
    shows = frozenset({"logits"})

    def propose(self, rows, max_tokens):
        draft = super().propose(rows, max_tokens)
        for place in range(max_tokens):
            ids = draft.token_ids[:, place]
            self.context.policy.goes_on(rows, Shown(place, ids, torch.zeros(len(rows), VOCAB)))
        return draft


def test_a_policy_is_shown_no_token_before_it_has_learned():
    ids, mask = left_pad(some_prompts(5, 3, 9))
    options = dict(drafter=Showing(), num_speculative_tokens=3, length_policy=Confidence(0.0), max_new_tokens=20)
    reports = []
    with running_ahead() as counts:
        specdec.generate(TARGET, ids, mask, eos_token_id=None, pad_token_id=0, on_commit=reports.append, **options)
    assert counts["begun"] == 0
    assert {report.predicted.shape[1] for report in reports if report.predicted is not None} <= {1, 2, 3}


def test_no_draft_forward_is_begun_for_nothing():
    """Before an end by length."""
    for k, new_tokens in ((1, 6), (5, 20), (3, 9)):
        expected, _ = run(some_prompts(5), "itself", k, max_new_tokens=new_tokens, eos_token_id=None)
        with running_ahead():
            out, _ = run(some_prompts(5), "itself", k, max_new_tokens=new_tokens, eos_token_id=None)
        assert out.speculation.num_draft_calls == expected.speculation.num_draft_calls


def test_the_cost_model_times_no_step_that_began_ahead():
    """Rows leave at many steps, and each time other costs are looked for."""
    policy, told = CostModel(clock=Steady()), []
    commit, used = Target.commit, [0]

    def watched(self, rows, forward):
        told.append((counts["used"] > used[0], not policy.state.is_timed))
        used[0] = counts["used"]
        return commit(self, rows, forward)

    prompts = some_prompts(*range(1, 17))
    with running_ahead() as counts, mock.patch.object(Target, "commit", watched):
        run(prompts, "other", max_new_tokens=90, eos_token_id=[5, 9], length_policy=policy)
    assert sum(began for began, _ in told) > 5
    assert all(is_held for began, is_held in told if began)


class Steady:
    """A clock by which every stage takes as long: a draft that is never accepted does not pay."""

    now = 0.0

    def mark(self):
        self.now += 1.0
        return self.now

    def seconds(self, begin, end):
        return end - begin


def test_stop_strings_and_many_prompts(demo_pair):
    inputs = demo_pair.tokenizer(demo_pair.prompts[:4], return_tensors="pt", padding=True)
    options = dict(max_new_tokens=24, stop_strings=[" s", ")\n"], tokenizer=demo_pair.tokenizer)
    with specdec.batch_invariant(demo_pair.target) as target:
        expected = specdec.generate(target, **inputs, **options)
        with running_ahead() as counts:
            assert torch.equal(specdec.generate(target, **inputs, **options), expected)
            assert torch.equal(specdec.generate(target, **inputs, drafter="prompt_lookup", **options), expected)
    assert counts["used"] > 0
