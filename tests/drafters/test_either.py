"""Two drafters as one: the output is the target's own, each row gets the right one's draft, and each part learns what
became of its own."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny import continuations, left_pad, plain_greedy, tiny_llama
from tiny_xlnet import tiny_xlnet

import specdec
from specdec.draft import NO_TOKEN, Draft, ExtraQueries
from specdec.drafter import Drafter
from specdec.drafters.any_subset import AnySubsetDrafter
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.either import Either, merged
from specdec.drafters.look_ahead import LookAhead, LookAheadEmbeddings
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.suffix import Suffix
from specdec.errors import ConfigError, DrafterError

LAYOUTS = ["ragged", "repad", "grouped"]


@lru_cache
def small(seed):
    return tiny_llama(seed, vocab_size=7)


@lru_cache(maxsize=500)
def expected_of(seed, prompt, max_new_tokens):
    return plain_greedy(small(seed), torch.tensor(prompt), max_new_tokens=max_new_tokens)


def look_ahead_for(model, num_tokens=3):
    made = LookAheadEmbeddings(num_tokens, model.config.hidden_size, num_helpers=1)
    torch.nn.init.normal_(made.weight, std=0.4, generator=torch.Generator().manual_seed(0))
    return LookAhead(made.trained_for(model, {}))


class Gaps(DraftModel):
    """A draft model without a draft for rows of even length: as first drafter it leaves them to the second."""

    def propose(self, rows, max_tokens):
        draft = super().propose(rows, max_tokens)
        ids = draft.token_ids.masked_fill((rows.lengths % 2 == 0)[:, None], NO_TOKEN)
        return Draft.trusted(ids, draft.probs, is_normalised=draft.is_normalised)


def made(kind, target, other):
    lookup = PromptLookup(max_ngram_size=2)
    return {
        "lookup+model": lambda: Either(lookup, DraftModel(other)),
        "model+lookup": lambda: Either(Gaps(other), lookup),
        "lookup+look_ahead": lambda: Either(lookup, look_ahead_for(target)),
        "suffix+model": lambda: Either(Suffix(), DraftModel(other)),
        "look_ahead+model": lambda: Either(look_ahead_for(target), DraftModel(other)),
        "three": lambda: Either(PromptLookup(3, 2), Either(look_ahead_for(target), Gaps(other))),
    }[kind]()


KINDS = ["lookup+model", "model+lookup", "lookup+look_ahead", "suffix+model", "look_ahead+model", "three"]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=9), min_size=1, max_size=6), st.sampled_from(KINDS),
    st.integers(1, 3), st.integers(1, 14), st.integers(0, 2), st.sampled_from(LAYOUTS), st.booleans(),
)  # fmt: skip
def test_greedy_is_plain_greedy(texts, kind, k, max_new_tokens, seed, layout, is_good):
    """Any batch, with a draft model that is right always or hardly ever; the ends of sequence fall within drafts."""
    target, other = small(seed), small(seed if is_good else seed + 5)
    ids, mask = left_pad([torch.tensor(text) for text in texts])
    out = specdec.generate(
        target, ids, mask, drafter=made(kind, target, other), num_speculative_tokens=k, layout=layout,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    expected = [expected_of(seed, tuple(text), max_new_tokens) for text in texts]
    assert continuations(out, ids.shape[1], expected, 0) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_continuous_scheduling(kind, layout):
    """Rows join, move, are preempted and resumed, and caches are resized under both."""
    target = small(2)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 7, (int(n),), generator=generator) for n in torch.randint(1, 12, (10,))]
    limits = [int(n) for n in torch.randint(1, 24, (10,), generator=generator)]
    run = specdec.generate_many(
        target, prompts, drafter=made(kind, target, small(7)), num_speculative_tokens=3, max_rows=4, kv_tokens=150,
        max_new_tokens=limits, in_order=True, layout=layout,
    )  # fmt: skip
    for done, prompt, limit in zip(run, prompts, limits, strict=True):
        assert done.token_ids == expected_of(2, tuple(prompt.tolist()), limit)
    assert run.speculation.num_accepted_draft_tokens > 0


def test_an_any_subset_model_goes_with_prompt_lookup():
    target, drafter = small(1), Either(PromptLookup(), AnySubsetDrafter(tiny_xlnet(vocab_size=7)))
    prompts = [torch.tensor([3, 4, 5, 3, 4]), torch.tensor([6, 3])]
    ids, mask = left_pad(prompts)
    expected = [plain_greedy(target, prompt, max_new_tokens=20) for prompt in prompts]
    for layout in ("ragged", "repad"):
        out = specdec.generate(target, ids, mask, drafter=drafter, max_new_tokens=20, layout=layout)
        assert continuations(out, ids.shape[1], expected, 0) == expected
    with pytest.raises(DrafterError, match=r"prompt_lookup\+any_subset' serves fixed batches only"):
        specdec.generate(target, ids, mask, drafter=drafter, max_new_tokens=20, layout="grouped")


class Watched(Either):
    """Keeps whose the rows of each draft were, and how many of their tokens were drafted and accepted."""

    def observe(self, verified):
        if self._is_first is not None:
            drafted = (verified.draft.token_ids >= 0).sum(1)
            rows = zip(self._is_first.tolist(), drafted.tolist(), verified.num_accepted.tolist(), strict=True)
            self.seen.extend(rows)
        super().observe(verified)


class Fixed(Drafter):
    """Proposes the same token for the rows that it is told of."""

    shares_slots = True

    def __init__(self, name, token, lengths=None, width=9):
        self.name, self.token, self.lengths, self.width = name, token, lengths, width
        self.num_asked, self.own = 0, []

    def propose(self, rows, max_tokens):
        self.num_asked += 1
        draft = torch.full((len(rows), min(max_tokens, self.width)), self.token)
        if self.lengths is not None:
            draft[[length not in self.lengths for length in rows.host_lengths.tolist()]] = NO_TOKEN
        return Draft(draft)

    def observe(self, verified):
        self.own.append(None if verified.is_own is None else verified.is_own.tolist())


def test_the_second_is_asked_only_where_the_first_has_none():
    first, second = Fixed("a", 60, lengths=(3, 5, 7)), Fixed("b", 59)
    options = dict(drafter=Either(first, second), num_speculative_tokens=1, max_new_tokens=5, eos_token_id=None)
    specdec.generate(tiny_llama(0), torch.tensor([[5, 6]]), **options)
    assert first.num_asked > second.num_asked > 0
    # The last step has no room for a draft.
    asked = [pair for pair in zip(first.own, second.own, strict=True) if pair != (None, None)]
    assert len(asked) == first.num_asked and all(mine == [not other] for mine, [other] in asked)
    assert second.own.count([True]) == second.num_asked

    never = Fixed("never", 59)
    options["drafter"] = Either(Fixed("always", 60), never)
    specdec.generate(tiny_llama(0), torch.tensor([[5, 6]]), **options)
    assert never.num_asked == 0 and all(own in ([False], None) for own in never.own)


def test_drafts_are_merged_row_by_row():
    first = Draft.trusted(torch.tensor([[1, 2], [NO_TOKEN, NO_TOKEN]]), is_valid=True, is_normalised=True)
    probs = torch.rand(2, 3, 5).softmax(-1)
    second = Draft.trusted(torch.tensor([[4, 4, 4], [3, 0, 1]]), probs, is_valid=True, is_normalised=True)
    draft = merged(first, second, np.array([True, False]))
    assert draft.token_ids.tolist() == [[1, 2, NO_TOKEN], [3, 0, 1]]
    one_hot = torch.eye(5)
    assert torch.equal(draft.probs[0], torch.stack([one_hot[1], one_hot[2], torch.zeros(5)]))
    assert torch.equal(draft.probs[1], probs[1])
    assert draft.is_valid and draft.is_normalised
    unmarked = merged(first, Draft(second.token_ids, probs), np.array([True, False]))
    assert not unmarked.is_valid and not unmarked.is_normalised
    assert merged(first, Draft(second.token_ids), np.array([True, False])).probs is None


@pytest.mark.parametrize("is_first", [[True, True], [True, False], [False, False]])
def test_extra_queries_stay_whoever_drafts(is_first):
    queries = ExtraQueries(torch.zeros(2, 4), torch.tensor([1, 2]))
    plain, with_queries = Draft(torch.tensor([[1], [2]])), Draft(torch.tensor([[3], [4]])).with_queries(queries)
    for pair in ((plain, with_queries), (with_queries, plain)):
        draft = merged(*pair, np.array(is_first))
        assert draft.extra_queries is queries
        wanted = [pair[0 if mine else 1].token_ids[row].tolist() for row, mine in enumerate(is_first)]
        assert draft.token_ids.tolist() == wanted


# ---- sampled

VOCAB, LENGTH, SAMPLES, ALPHA = 3, 5, 6000, 1e-3
PROMPT = torch.tensor([1, 2, 0, 1])
FLAT = dict(vocab_size=VOCAB, eos_token_id=None, pad_token_id=None, bos_token_id=None, initializer_range=0.25)
TARGET, OTHER = tiny_llama(2, **FLAT), tiny_llama(5, **FLAT)


@lru_cache
@torch.no_grad()
def joint(temperature=1.0):
    """Probability of every output of LENGTH tokens, by one plain forward over all of them."""
    outputs = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
    texts = torch.cat([PROMPT.expand(len(outputs), -1), outputs], 1)
    logits = TARGET(texts).logits[:, len(PROMPT) - 1 : -1].double() / temperature
    probs = logits.softmax(-1).gather(2, outputs[..., None])[..., 0].prod(1)
    return {tuple(output): share for output, share in zip(outputs.tolist(), probs.tolist(), strict=True)}


def sampled_p_value(drafter, verification="token", temperature=1.0):
    """Chi-square of whole outputs; cells that expect fewer than 10 are pooled."""
    counts = Counter()
    for batch in range(SAMPLES // 500):
        out = specdec.generate(
            TARGET, PROMPT.expand(500, -1), drafter=drafter, do_sample=True, max_new_tokens=LENGTH, seed=batch,
            num_speculative_tokens=2, pad_token_id=0, verification=verification, top_k=0, temperature=temperature,
        )  # fmt: skip
        counts.update(map(tuple, out[:, len(PROMPT) :].tolist()))
    expected = {cell: share * SAMPLES for cell, share in joint(temperature).items()}
    large = [cell for cell, count in expected.items() if count >= 10]
    observed, wanted = [counts[cell] for cell in large], [expected[cell] for cell in large]
    if SAMPLES - sum(wanted) > 1e-6 * SAMPLES:
        observed, wanted = [*observed, SAMPLES - sum(observed)], [*wanted, SAMPLES - sum(wanted)]
    return chisquare(observed, wanted).pvalue


SAMPLED = {
    "lookup+model": lambda: Either(PromptLookup(3, 2), DraftModel(OTHER)),
    "model+lookup": lambda: Either(Gaps(OTHER), PromptLookup()),
    "look_ahead+model": lambda: Either(look_ahead_for(TARGET), Gaps(OTHER)),
}


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("kind", SAMPLED)
def test_samples_follow_the_target(kind, verification):
    assert sampled_p_value(SAMPLED[kind](), verification) > ALPHA
    assert sampled_p_value(SAMPLED[kind](), verification, temperature=0.6) > ALPHA


class WrongDistributions(Either):
    """Says that sampled tokens came from another distribution than they did."""

    def propose(self, rows, max_tokens):
        draft = super().propose(rows, max_tokens)
        return draft if draft.probs is None else Draft(draft.token_ids, draft.probs.roll(1, -1))


def test_a_wrong_distribution_is_found():
    assert sampled_p_value(WrongDistributions(PromptLookup(3, 2), DraftModel(OTHER))) < ALPHA / 100


@pytest.mark.parametrize("order", ["lookup first", "model first"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draft_model_stays_right_where_the_other_drafted(layout, order):
    """The target drafts for itself from its own distribution, so each of its drafts is accepted in full: unless keys of
    sampled tokens that were not taken stayed in its cache."""
    target, lookup = tiny_llama(2, **FLAT), PromptLookup(4, 3)
    drafter = Watched(*((lookup, DraftModel(target)) if order == "lookup first" else (Gaps(target), PromptLookup())))
    drafter.seen = []
    ids, mask = left_pad([PROMPT, PROMPT[1:], PROMPT[:2], PROMPT[:1]])
    specdec.generate(
        target, ids, mask, drafter=drafter, num_speculative_tokens=4, max_new_tokens=60, eos_token_id=None, seed=1,
        do_sample=True, top_k=0, pad_token_id=0, layout=layout,
    )  # fmt: skip
    models = order == "model first"
    own = [(drafted, accepted) for is_first, drafted, accepted in drafter.seen if is_first == models]
    others = [accepted for is_first, _, accepted in drafter.seen if is_first != models]
    assert len(own) > 20 and len(others) > 20 and sum(others) > 10, "both are to have drafted"
    assert all(drafted == accepted for drafted, accepted in own)


# ---- what cannot be combined, and what is said of it


def test_what_cannot_be_combined_is_named():
    with pytest.raises(DrafterError, match="'draft_model' and 'draft_model' each have a network with a cache"):
        Either(DraftModel(small(0)), DraftModel(small(1)))
    with pytest.raises(DrafterError, match="'look_ahead' and 'look_ahead' both put queries"):
        Either(look_ahead_for(small(0)), look_ahead_for(small(0)))
    one = PromptLookup()
    with pytest.raises(DrafterError, match=r"'prompt_lookup\+prompt_lookup\+draft_model' uses one instance twice"):
        Either(one, Either(one, DraftModel(small(0))))
    with pytest.raises(DrafterError, match="takes two Drafter instances, not a str"):
        Either("prompt_lookup", one)


def test_what_it_says_of_itself():
    model = small(0)
    drafter = Either(PromptLookup(), DraftModel(model))
    assert drafter.name == "prompt_lookup+draft_model"
    assert drafter.kv_model is model and drafter.model is None and not drafter.shows
    assert drafter.shares_slots and not drafter.proposes_ahead
    assert Either(look_ahead_for(model), PromptLookup()).num_extra_queries == 4
    assert not Either(PromptLookup(), AnySubsetDrafter(tiny_xlnet())).shares_slots


def test_policies_that_look_at_tokens_are_refused_and_the_cost_model_serves():
    target = tiny_llama(0)
    ids = torch.tensor([[5, 6, 7]])
    options = dict(max_new_tokens=20, eos_token_id=None)
    drafter = Either(PromptLookup(), DraftModel(target))
    with pytest.raises(DrafterError, match="looks at the logits of drafted tokens, which drafter 'prompt_lookup"):
        specdec.generate(target, ids, drafter=drafter, length_policy="confidence", **options)
    expected = specdec.generate(target, ids, **options)
    assert torch.equal(specdec.generate(target, ids, drafter=drafter, length_policy="cost_model", **options), expected)


def test_calls_of_both_are_counted():
    target = tiny_llama(0)
    options = dict(max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True, num_speculative_tokens=3)
    ids = torch.tensor([[5, 6, 7]])
    alone = specdec.generate(target, ids, drafter=DraftModel(target), **options).speculation
    never = Either(Fixed("never", 3, lengths=()), DraftModel(target))
    assert specdec.generate(target, ids, drafter=never, **options).speculation.num_draft_calls == alone.num_draft_calls
    always = Either(Fixed("always", 3), DraftModel(target))
    assert specdec.generate(target, ids, drafter=always, **options).speculation.num_draft_calls == 0


class Failing(Drafter):
    name = "failing"

    def start(self, context, rows):
        raise RuntimeError("cannot start")

    def propose(self, rows, max_tokens):
        raise AssertionError


def test_both_finish_and_neither_stays_busy():
    target, model = tiny_llama(0), DraftModel(tiny_llama(1))
    with pytest.raises(RuntimeError, match="cannot start"):
        specdec.generate(target, torch.tensor([[5, 6]]), drafter=Either(model, Failing()), max_new_tokens=4)
    assert model._network is None and not model.is_busy and model.context is None
    model.is_busy = True
    with pytest.raises(DrafterError, match="'draft_model' is already at work"):
        specdec.generate(target, torch.tensor([[5, 6]]), drafter=Either(PromptLookup(), model), max_new_tokens=4)
    assert model.is_busy, "another generation's drafter is left alone"


def test_errors_of_the_parts_reach_the_caller():
    with pytest.raises(DrafterError, match="the draft model's vocabulary has 7 tokens"):
        specdec.generate(
            tiny_llama(0), torch.tensor([[5, 6]]), drafter=Either(PromptLookup(), DraftModel(small(0))),
            max_new_tokens=4,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="trained for another target"):
        specdec.generate(
            tiny_llama(0), torch.tensor([[5, 6]]), drafter=Either(PromptLookup(), look_ahead_for(tiny_llama(1))),
            max_new_tokens=4,
        )  # fmt: skip


class Reader(Fixed):
    """Notes the hidden states that it is shown."""

    def __init__(self, name, token, layers, **options):
        super().__init__(name, token, **options)
        self.target_layers, self.states = layers, []

    def read(self, rows, begin, end, states):
        self.states.append([state.shape for state in states])

    def observe(self, verified):
        self.states.append([float(state.sum()) for state in verified.hidden_states])


def test_each_part_gets_the_layers_it_asked_for():
    first, second = Reader("a", 3, (-1, 0)), Reader("b", 4, (1, -1))
    drafter = Either(first, second)
    assert drafter.target_layers == (-1, 0, 1)
    specdec.generate(tiny_llama(0), torch.tensor([[5, 6]]), drafter=drafter, max_new_tokens=4, eos_token_id=None)
    assert first.states and len(first.states) == len(second.states)
    for mine, other in zip(first.states, second.states, strict=True):
        assert len(mine) == len(other) == 2 and mine[0] == other[1]
