"""Sampled output through `generate` follows the target's distribution: chi-square of whole outputs against the
enumerated joint, for every drafter, verification and set of processors; and planted bugs fail the same test."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import left_pad, plain_greedy, tiny_llama

import specdec
from specdec.draft import Draft
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.suffix import Suffix

VOCAB, LENGTH, SAMPLES = 4, 3, 4000
# Flat enough that every outcome happens, sharp enough that a wrong distribution shows.
TARGET = tiny_llama(
    0, vocab_size=VOCAB, eos_token_id=None, pad_token_id=None, bos_token_id=None, initializer_range=0.25
)
OTHER = tiny_llama(5, vocab_size=VOCAB, eos_token_id=None, pad_token_id=None, bos_token_id=None, initializer_range=0.25)
PROMPT = torch.tensor([1, 2, 3, 1, 2])
ALPHA = 1e-3  # seeds are fixed, so a pass stays a pass


def joint(eos=None, temperature=1.0, **options):
    """Probability of every output of LENGTH tokens, by transformers' own warpers on the target's own logits."""
    total = {}
    prefixes = {(): 1.0}
    for _ in range(LENGTH):
        grown = {}
        for prefix, probability in prefixes.items():
            ids = torch.cat([PROMPT, torch.tensor(prefix, dtype=torch.long)])[None]
            out = TARGET.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=True, output_scores=True,
                return_dict_in_generate=True, temperature=temperature, pad_token_id=0, **{"top_k": 0, **options},
            )  # fmt: skip
            for token, q in enumerate(torch.softmax(out.scores[0][0].double(), -1).tolist()):
                if q > 0:
                    (total if token == eos else grown)[(*prefix, token)] = probability * q
        prefixes = grown
    return {**total, **prefixes}


def sample(drafter, k=3, seed=11, rows=500, eos=None, **options):
    """Counts of whole outputs."""
    counts = Counter()
    for batch in range(SAMPLES // rows):
        out = specdec.generate(
            TARGET, PROMPT.expand(rows, -1), drafter=drafter, do_sample=True, max_new_tokens=LENGTH, seed=seed + batch,
            num_speculative_tokens=None if drafter is None else k, eos_token_id=eos, pad_token_id=0,
            **{"top_k": 0, **options},
        )  # fmt: skip
        for row in out[:, len(PROMPT) :].tolist():
            end = row.index(eos) + 1 if eos in row else LENGTH
            counts[tuple(row[:end])] += 1
    return counts


def p_value(counts, expected):
    """Chi-square, cells with an expectation below 10 pooled; an impossible outcome is a certain rejection."""
    if any(outcome not in expected for outcome in counts):
        return 0.0
    cells = [(counts[outcome], SAMPLES * probability) for outcome, probability in expected.items()]
    small = [cell for cell in cells if cell[1] < 10]
    cells = [cell for cell in cells if cell[1] >= 10]
    if small:
        cells.append(tuple(map(sum, zip(*small, strict=True))))
    observed, wanted = np.array(cells).T
    keep = wanted > 0
    return chisquare(observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()).pvalue


class Wide(DraftModel):
    """A draft model that is sure of the wrong things."""

    def _forward(self, *args):
        output = super()._forward(*args)
        return output._replace(logits=3 * output.logits)


DRAFTERS = {
    "none": lambda: None,
    "draft_model": lambda: DraftModel(OTHER),
    "sure": lambda: Wide(OTHER),
    "itself": lambda: DraftModel(TARGET),
    "prompt_lookup": lambda: PromptLookup(),
    "suffix": lambda: Suffix(),
}
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7},
    "penalty": {"repetition_penalty": 1.8},
    "min_p_hot": {"min_p": 0.2, "temperature": 1.5},
}
_joints = {}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_outputs_follow_the_joint(drafter, verification, options):
    if options not in _joints:
        _joints[options] = joint(**OPTIONS[options])
    counts = sample(DRAFTERS[drafter](), verification=verification, **OPTIONS[options])
    assert p_value(counts, _joints[options]) > ALPHA


def test_the_test_has_power():
    """The same number of samples of the draft model's distribution, or at another temperature, is rejected."""
    assert p_value(sample(None, temperature=0.8), joint()) < ALPHA


def test_end_of_sequence_is_sampled_too():
    counts = sample(DraftModel(OTHER), eos=2)
    assert len({len(outcome) for outcome in counts}) > 1
    assert p_value(counts, joint(eos=2)) > ALPHA


class Remembers(DraftModel):
    def propose(self, rows, max_tokens):
        self.drafts.append(super().propose(rows, max_tokens))
        return self.drafts[-1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 3, "top_p": 0.8, "min_p": 0.1}])
def test_what_goes_unchecked_sums_to_one(options):
    """Verification does not add up the probabilities of drafts that are marked."""
    drafter = Remembers(OTHER)
    drafter.drafts = []
    specdec.generate(
        TARGET, PROMPT.expand(50, -1), drafter=drafter, do_sample=True, max_new_tokens=8, seed=1, pad_token_id=0,
        num_speculative_tokens=3, **{"top_k": 0, **options},
    )  # fmt: skip
    assert drafter.drafts
    for draft in drafter.drafts:
        assert draft.is_normalised
        torch.testing.assert_close(draft.probs.sum(-1), torch.ones(draft.token_ids.shape))


class Sharpens(DraftModel):
    """Planted: changes the probabilities of a draft that was marked as normalised, by a factor."""

    def propose(self, rows, max_tokens):
        draft = super().propose(rows, max_tokens)
        return replace(draft, probs=draft.probs * 1.5)


def test_other_probs_in_a_marked_draft_are_checked_again():
    with pytest.raises(specdec.DrafterError, match="sum to 1"):
        specdec.generate(
            TARGET, PROMPT[None], drafter=Sharpens(OTHER), do_sample=True, max_new_tokens=8, seed=1, pad_token_id=0
        )


class DropsUnlikely(DraftModel):
    """Planted: forgets a sampled token because the draft model was unsure of it."""

    def propose(self, rows, max_tokens):
        draft = super().propose(rows, max_tokens)
        sure = draft.probs.gather(2, draft.token_ids[..., None]).squeeze(2) > 0.3
        return Draft(draft.token_ids.masked_fill(sure.long().cumprod(1) == 0, -1), draft.probs)


class WrongDistribution(DraftModel):
    """Planted: reports another q than it sampled from."""

    def propose(self, rows, max_tokens):
        draft = super().propose(rows, max_tokens)
        return Draft(draft.token_ids, torch.softmax(draft.probs.log() * 3, -1))


class ClaimsToBeSure(DraftModel):
    """Planted: samples, and passes its drafts off as deterministic ones."""

    def propose(self, rows, max_tokens):
        return Draft(super().propose(rows, max_tokens).token_ids)


@pytest.mark.parametrize("planted", [DropsUnlikely, WrongDistribution, ClaimsToBeSure])
def test_planted_bugs_are_found(planted):
    """Drafts whose q is not what they were sampled from; see test_lossless for bugs of the verification."""
    drafter = planted(OTHER)
    if planted is ClaimsToBeSure:  # lossless: a draft is accepted with p(x), whatever it was drawn from
        assert p_value(sample(drafter), joint()) > ALPHA
    else:
        assert p_value(sample(drafter), joint()) < ALPHA


def test_a_row_does_not_depend_on_its_batch():
    prompts = [torch.tensor(ids) for ids in ([1, 2, 3], [2], [3, 3, 1, 2, 0, 1], [1, 1])]
    ids, mask = left_pad(prompts)
    options = {"do_sample": True, "max_new_tokens": 20, "drafter": DraftModel(OTHER), "num_speculative_tokens": 3}
    seeds = [7, 8, 9, 10]
    together = specdec.generate(TARGET, ids, mask, seed=seeds, **options)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = specdec.generate(TARGET, prompt[None], seed=[seeds[row]], **options)[:, len(prompt) :]
        assert torch.equal(alone[0], together[row])
    order = [2, 0, 3, 1]
    permuted = specdec.generate(TARGET, ids[order], mask[order], seed=[seeds[i] for i in order], **options)
    assert torch.equal(permuted[:, ids.shape[1] :], together[order])


def test_seeds_and_generators():
    options = {"do_sample": True, "max_new_tokens": 30}
    ids = PROMPT.expand(3, -1)

    def run(**randomness):
        return specdec.generate(TARGET, ids, **options, **randomness)

    assert torch.equal(run(seed=3), run(seed=3))
    assert not torch.equal(run(seed=3), run(seed=4))
    first = run(seed=3)
    assert len({tuple(row) for row in first.tolist()}) == 3, "rows of one seed draw different numbers"
    assert torch.equal(*(run(generator=torch.Generator().manual_seed(5)) for _ in range(2)))
    torch.manual_seed(1)
    one = run()
    assert not torch.equal(run(), one)
    torch.manual_seed(1)
    assert torch.equal(run(), one)


def test_num_return_sequences():
    ids = torch.stack([PROMPT, PROMPT.flip(0)])
    options = {"do_sample": True, "max_new_tokens": 12, "drafter": DraftModel(OTHER), "seed": 2}
    out = specdec.generate(TARGET, ids, num_return_sequences=3, **options)
    assert torch.equal(out, specdec.generate(TARGET, ids.repeat_interleave(3, 0), **options))
    inside = TARGET.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=50, max_new_tokens=12, num_return_sequences=3,
        custom_generate=specdec.speculative(DraftModel(OTHER), seed=2), pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(inside, out)


def test_a_cold_sample_is_greedy():
    expected = plain_greedy(TARGET, PROMPT, max_new_tokens=16, pad_token_id=0)
    for verification in ("token", "block"):
        out = specdec.generate(
            TARGET, PROMPT[None], do_sample=True, temperature=1e-4, max_new_tokens=16, drafter=OTHER, seed=0,
            verification=verification,
        )  # fmt: skip
        assert out[0, len(PROMPT) :].tolist() == expected


def test_the_joint_is_no_accident_of_a_peaked_model():
    expected = joint()
    assert set(expected) == set(itertools.product(range(VOCAB), repeat=LENGTH))
    assert sum(expected.values()) == pytest.approx(1.0)
    assert sum(SAMPLES * probability >= 10 for probability in expected.values()) > 20
