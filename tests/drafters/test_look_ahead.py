"""PaSS: the output is the target's own, greedily and in distribution, however good or bad the embeddings are."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny import continuations, left_pad, plain_greedy, tiny_llama

import specdec
from specdec import batch_invariant
from specdec.draft import Draft
from specdec.drafters.look_ahead import LookAhead, LookAheadEmbeddings
from specdec.errors import ConfigError, DrafterError, InputError, UnsupportedModelError

EOS = 2


def embeddings_for(model, num_tokens, seed=0, scale=0.4):
    """Untrained ones, some with helpers; over a vocabulary of 7 a guess is right often enough."""
    made = LookAheadEmbeddings(num_tokens, model.config.hidden_size, num_helpers=seed % 3)
    torch.nn.init.normal_(made.weight, std=scale, generator=torch.Generator().manual_seed(seed))
    return made.trained_for(model, {"made": "up"})


def drafter_for(model, num_tokens=4, seed=0):
    return LookAhead(embeddings_for(model, num_tokens, seed))


@lru_cache
def small(seed):
    return tiny_llama(seed, vocab_size=7)


@lru_cache(maxsize=500)
def expected_of(seed, prompt, max_new_tokens):
    return plain_greedy(small(seed), torch.tensor(prompt), max_new_tokens=max_new_tokens)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(1, 8),
    st.data(), st.integers(1, 14), st.integers(0, 3), st.sampled_from(["ragged", "repad", "grouped"]),
)  # fmt: skip
def test_greedy_is_plain_greedy(texts, num_tokens, data, max_new_tokens, seed, layout):
    """Any batch of different lengths, L and k <= L; EOS is one token in seven, so it ends rows within drafts."""
    model = small(seed)
    prompts = [torch.tensor(text) for text in texts]
    ids, mask = left_pad(prompts)
    out = specdec.generate(
        model, ids, mask, drafter=drafter_for(model, num_tokens, seed), max_new_tokens=max_new_tokens,
        num_speculative_tokens=data.draw(st.integers(1, num_tokens)), return_dict_in_generate=True, layout=layout,
    )  # fmt: skip
    expected = [expected_of(seed, tuple(text), max_new_tokens) for text in texts]
    assert continuations(out.sequences, ids.shape[1], expected, 0) == expected
    done = out.speculation
    assert done.num_draft_calls == 0 and done.num_spec_steps <= done.num_new_tokens
    assert done.num_target_calls <= max(map(len, expected))


def test_guesses_are_accepted_and_save_calls():
    """Were nothing ever accepted, the equality above would show little."""
    model = small(1)
    prompts = [torch.tensor([3, 4, 5, 6, 3][:n]) for n in (5, 3, 4)]
    ids, mask = left_pad(prompts)
    out = specdec.generate(
        model, ids, mask, drafter=drafter_for(model, 4, 1), num_speculative_tokens=4, max_new_tokens=60,
        eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    done = out.speculation
    assert done.acceptance_by_position[0] > 0.05 and done.num_target_calls < 59
    assert (
        sum(done.acceptance_histogram)
        == done.num_spec_steps
        == done.num_new_tokens - 3 - (done.num_accepted_draft_tokens)
    )


def test_calls_are_bounded_even_where_no_guess_is_right():
    """Every call commits a token, whatever the embeddings are worth."""
    model = tiny_llama(0)
    ids = torch.tensor([[5, 6, 7]])
    out = specdec.generate(
        model, ids, drafter=drafter_for(model, 8), num_speculative_tokens=8, max_new_tokens=40, eos_token_id=None,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences[0, 3:].tolist() == plain_greedy(model, ids[0], max_new_tokens=40, eos_token_id=None)
    assert out.speculation.num_target_calls <= 39


@pytest.mark.parametrize("layout", ["ragged", "repad", "grouped"])
def test_continuous_scheduling(layout):
    """Newcomers have no guesses yet; rows move, are preempted and resumed, and caches are resized under them."""
    model = small(2)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 7, (int(n),), generator=generator) for n in torch.randint(1, 12, (14,))]
    limits = [int(n) for n in torch.randint(1, 30, (14,), generator=generator)]
    run = specdec.generate_many(
        model, prompts, drafter=drafter_for(model, 3), num_speculative_tokens=3, max_rows=4, kv_tokens=170,
        max_new_tokens=limits, in_order=True, layout=layout,
    )  # fmt: skip
    for done, prompt, limit in zip(run, prompts, limits, strict=True):
        assert done.token_ids == expected_of(2, tuple(prompt.tolist()), limit)
        assert done.num_steps <= len(done.token_ids)
    assert run.speculation.num_accepted_draft_tokens > 0


def test_the_shipped_embeddings(demo_pair):
    """They belong to the shipped target, change nothing of its text, and are worth something."""
    prompts = [torch.tensor(demo_pair.tokenizer(text).input_ids)[:60] for text in demo_pair.prompts[:3]]
    ids, mask = left_pad(prompts, 1)
    out = specdec.generate(
        demo_pair.target, ids, mask, drafter=LookAhead.load(demo_pair.folder / "look_ahead"), max_new_tokens=32,
        num_speculative_tokens=2, return_dict_in_generate=True,
    )  # fmt: skip
    expected = [plain_greedy(demo_pair.target, prompt, max_new_tokens=32) for prompt in prompts]
    assert continuations(out.sequences, ids.shape[1], expected, 1) == expected
    assert out.speculation.acceptance_by_position[0] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_shipped_embeddings_on_more_prompts(demo_pair, batch_size):
    drafter = LookAhead.load(demo_pair.folder / "look_ahead")
    prompts = [torch.tensor(demo_pair.tokenizer(text).input_ids) for text in demo_pair.prompts[:16]]
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        ids, mask = left_pad(some, 1)
        expected = [plain_greedy(demo_pair.target, prompt, max_new_tokens=48) for prompt in some]
        for k in (1, 3, 8):
            out = specdec.generate(
                demo_pair.target, ids, mask, drafter=drafter, num_speculative_tokens=k, max_new_tokens=48
            )
            assert continuations(out, ids.shape[1], expected, 1) == expected


def test_batch_invariant_output_is_that_of_single_rows():
    model = tiny_llama(3)
    prompts = [torch.randint(3, 60, (n,)) for n in (6, 2, 9)]
    ids, mask = left_pad(prompts)
    drafter = drafter_for(model, 4)
    with batch_invariant(model):
        together = specdec.generate(
            model, ids, mask, drafter=drafter, num_speculative_tokens=4, max_new_tokens=12, eos_token_id=None
        )
        for row, prompt in enumerate(prompts):
            alone = specdec.generate(model, prompt[None], max_new_tokens=12, eos_token_id=None)
            assert together[row, ids.shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


# ---- sampled


# The first step has no guesses yet, so texts must be longer than two tokens for any to be verified.
VOCAB, LENGTH, SAMPLES, ALPHA = 3, 5, 6000, 1e-3
PROMPT = torch.tensor([1, 2, 0, 1])
TARGET = tiny_llama(
    2, vocab_size=VOCAB, eos_token_id=None, pad_token_id=None, bos_token_id=None, initializer_range=0.25
)


@torch.no_grad()
def joint(temperature=1.0, top_k=0):
    """Probability of every output of LENGTH tokens, by one plain forward over all of them."""
    outputs = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
    texts = torch.cat([PROMPT.expand(len(outputs), -1), outputs], 1)
    logits = TARGET(texts).logits[:, len(PROMPT) - 1 : -1].double() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    probs = logits.softmax(-1).gather(2, outputs[..., None])[..., 0].prod(1)
    return {tuple(output): share for output, share in zip(outputs.tolist(), probs.tolist(), strict=True)}


def sampled_p_value(drafter, verification="token", **options):
    """Chi-square of whole outputs; cells that expect fewer than 10 are pooled."""
    counts, accepted = Counter(), 0
    for batch in range(SAMPLES // 500):
        out = specdec.generate(
            TARGET, PROMPT.expand(500, -1), drafter=drafter, do_sample=True, max_new_tokens=LENGTH, seed=batch,
            num_speculative_tokens=2, pad_token_id=0, verification=verification, return_dict_in_generate=True,
            **{"top_k": 0, **options},
        )  # fmt: skip
        counts.update(map(tuple, out.sequences[:, len(PROMPT) :].tolist()))
        accepted += out.speculation.num_accepted_draft_tokens
    assert accepted > SAMPLES / 5, "hardly anything was verified"
    expected = {cell: share * SAMPLES for cell, share in joint(**options).items()}
    assert set(counts) <= {cell for cell, count in expected.items() if count > 0}
    large = [cell for cell, count in expected.items() if count >= 10]
    observed, wanted = [counts[cell] for cell in large], [expected[cell] for cell in large]
    if SAMPLES - sum(wanted) > 1e-6 * SAMPLES:
        observed, wanted = [*observed, SAMPLES - sum(observed)], [*wanted, SAMPLES - sum(wanted)]
    return chisquare(observed, wanted).pvalue


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 2}], ids=str)
def test_samples_follow_the_target(verification, options):
    assert sampled_p_value(drafter_for(TARGET, 2), verification, **options) > ALPHA


class WrongDistribution(LookAhead):
    """Says that its guesses came from another distribution than they did."""

    def propose(self, rows, max_tokens):
        draft = super().propose(rows, max_tokens)
        probs = None if draft.probs is None else draft.probs.roll(1, -1)
        return Draft(draft.token_ids, probs, extra_queries=draft.extra_queries)


def test_a_wrong_distribution_is_found():
    wrong = WrongDistribution(embeddings_for(TARGET, 2))
    assert sampled_p_value(wrong) < ALPHA / 100


def test_a_rows_sample_does_not_depend_on_its_batch():
    model = small(0)
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([6, 3]), torch.tensor([4])]
    ids, mask = left_pad(prompts)
    options = dict(drafter=drafter_for(model), num_speculative_tokens=3, do_sample=True, top_k=0, max_new_tokens=12)
    together = specdec.generate(model, ids, mask, seed=[7, 8, 9], **options)
    for row, prompt in enumerate(prompts):
        alone = specdec.generate(model, prompt[None], seed=[7 + row], **options)[0, len(prompt) :].tolist()
        assert together[row, ids.shape[1] :].tolist()[: len(alone)] == alone


# ---- what is asked, and files


def test_no_more_is_asked_than_can_be_used():
    """Guesses behind a row's limit would be thrown away."""
    model, widths, helpers = small(1), [], 1

    class Watched(LookAhead):
        def propose(self, rows, max_tokens):
            draft = super().propose(rows, max_tokens)
            widths.append((rows.max_remaining, 0 if draft.extra_queries is None else draft.extra_queries.num))
            return draft

    specdec.generate(
        model, torch.tensor([[3, 4]]), drafter=Watched(embeddings_for(model, 4, helpers)), num_speculative_tokens=3,
        max_new_tokens=9, eos_token_id=None,
    )  # fmt: skip
    wanted = [min(3, remaining - 2) for remaining, _ in widths]
    assert [width for _, width in widths] == [count + helpers if count > 0 else 0 for count in wanted]
    assert wanted[0] == 3


def test_saved_and_loaded(tmp_path):
    model = tiny_llama(0)
    made = embeddings_for(model, 3)
    made.save(tmp_path)
    loaded = LookAheadEmbeddings.load(tmp_path)
    assert torch.equal(loaded.weight, made.weight) and loaded.recipe == {"made": "up"}
    LookAhead.load(tmp_path).check(model, 20)
    LookAhead.load(tmp_path).check(tiny_llama(0).bfloat16(), 20)  # the same weights, rounded


@pytest.mark.parametrize(
    "other, message", [(tiny_llama(1), "another target .other weights"), (small(0), "vocab_size 7 instead of 61")]
)
def test_another_target_is_refused(other, message):
    drafter = drafter_for(tiny_llama(0))
    with pytest.raises(ConfigError, match=f"{message}.*specdec train look-ahead.*another drafter"):
        specdec.generate(other, torch.tensor([[3, 4]]), drafter=drafter, max_new_tokens=4, num_speculative_tokens=2)


def test_what_is_no_set_of_embeddings_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no look_ahead.json; train one with `specdec train look-ahead`"):
        LookAhead.load(tmp_path)
    embeddings_for(tiny_llama(0), 2).save(tmp_path)
    config = json.loads((tmp_path / "look_ahead.json").read_text())
    config["shape"]["num_tokens"] = 3
    (tmp_path / "look_ahead.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not load"):
        LookAhead.load(tmp_path)
    with pytest.raises(ConfigError, match="num_tokens=0"):
        LookAheadEmbeddings(0, 8)
    with pytest.raises(ConfigError, match="trained_for"):
        LookAheadEmbeddings(2, 8).save(tmp_path)


def test_more_drafts_than_embeddings_are_refused():
    model = tiny_llama(0)
    with pytest.raises(DrafterError, match="num_speculative_tokens=5, but there are 4 look-ahead"):
        specdec.generate(model, torch.tensor([[3, 4]]), drafter=drafter_for(model, 4), max_new_tokens=4)


def test_the_name_alone_is_not_enough():
    with pytest.raises(DrafterError, match=r"needs arguments.*LookAhead"):
        specdec.generate(tiny_llama(0), torch.tensor([[3, 4]]), drafter="look_ahead", max_new_tokens=4)


def test_a_model_without_such_queries_is_refused():
    from families import tiny

    model = tiny("bloom")
    made = LookAheadEmbeddings(2, model.config.hidden_size).trained_for(model, {})
    with pytest.raises(UnsupportedModelError, match="next to its text"):
        specdec.generate(
            model, torch.tensor([[3, 4]]), drafter=LookAhead(made), max_new_tokens=4, num_speculative_tokens=2
        )
