"""Sampled infilling follows the joint distribution: chi-square of whole fillings against the joint enumerated from
transformers' own forward; fillings that are not verified, or verified wrongly, fail the same test."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_xlnet import tiny_xlnet

import specdec
from specdec.draft import Draft
from specdec.drafters.any_subset import AheadDraft, NgramDraft, Proposal, Sampling, SelfDraft
from specdec.infill.infill import Filling, Forbidding, fill, rows_of, sequences_of
from specdec.kernels.commit.greedy_commit import commit
from specdec.kernels.commit.sample import sample_tokens
from specdec.kernels.commit.truncation import NO_TRUNCATION
from specdec.network.any_subset.model import Order, XLNet, conditionals_of
from specdec.verify.random_streams import Purpose, RowStreams
from specdec.verify.truncations import SameForAllRows
from specdec.verify.verification import SampledVerification

VOCAB, MASK = 4, 3  # three tokens and the mask
MODEL = tiny_xlnet(3, vocab_size=VOCAB, spread=0.6)
MODEL.lm_loss.weight.data *= 0.4  # flat enough that many fillings happen
TEXT = torch.tensor([[1, 0, 2, 0, 0, 1, 0, 0]])
HIDDEN = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1]]).bool()
PLACES = HIDDEN[0].nonzero()[:, 0]
SAMPLES, ALPHA = 8000, 1e-3  # seeds are fixed, so a pass stays a pass


def joint(temperature=1.0, top_k=VOCAB):
    """[81] float64: the probability of every filling, and the fillings."""
    fillings = torch.tensor(list(itertools.product(range(VOCAB - 1), repeat=len(PLACES))))
    texts = TEXT.repeat(len(fillings), 1)
    texts[:, PLACES] = fillings
    order = Order.lattice(HIDDEN.repeat(len(texts), 1), torch.ones_like(texts, dtype=torch.bool))
    ranks = torch.arange(TEXT.shape[1] - len(PLACES), TEXT.shape[1]).repeat(len(texts), 1)
    with torch.no_grad():
        logits = XLNet(MODEL).conditional_logits(texts.gather(1, order.positions), order, order.lengths, ranks)
    logits = logits.double()[..., :MASK] / temperature
    logits = logits.masked_fill(logits < logits.topk(min(top_k, MASK)).values[..., -1:], float("-inf"))
    return logits.log_softmax(-1).gather(2, fillings[..., None]).sum((1, 2)).exp().numpy()


def p_value(sequences, expected):
    fillings = sequences[:, PLACES].numpy()
    if (fillings == MASK).any():
        return 0.0
    observed = np.bincount(fillings @ (VOCAB - 1) ** np.arange(len(PLACES))[::-1], minlength=len(expected))
    if observed[expected == 0].any():
        return 0.0
    wanted = expected * len(sequences)
    small = wanted < 10
    if small.any():
        observed = np.append(observed[~small], observed[small].sum())
        wanted = np.append(wanted[~small], wanted[small].sum())
    return chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue


def sample(**options):
    many = SAMPLES, -1
    return specdec.infill(MODEL, TEXT.expand(many), HIDDEN.expand(many), do_sample=True, seed=5, **options)


# Every pair of values of two parameters occurs.
@pytest.mark.parametrize(
    ("drafter", "k", "bonus_token", "verification"),
    [
        ("self", 2, True, "token"),
        ("self", 5, False, "block"),
        ("ahead", 2, False, "token"),
        ("ahead", 5, True, "block"),
        ("ngram", 2, True, "block"),
        ("ngram", 5, False, "token"),
    ],
)
def test_fillings_follow_the_joint(drafter, k, bonus_token, verification):
    filled = sample(drafter=drafter, num_speculative_tokens=k, bonus_token=bonus_token, verification=verification)
    assert p_value(filled, joint()) > ALPHA


@pytest.mark.parametrize("drafter", [None, "self", "ngram"])
@pytest.mark.parametrize("shaping", [{"temperature": 0.6}, {"top_k": 2}], ids=str)
def test_shaped_samples_follow_the_shaped_joint(drafter, shaping):
    assert p_value(sample(drafter=drafter, **shaping), joint(**shaping)) > ALPHA
    assert p_value(sample(drafter=drafter), joint(**shaping)) < ALPHA


def test_the_joint_has_many_cells():
    expected = joint()
    assert expected.sum() == pytest.approx(1.0)
    assert (expected * SAMPLES >= 10).sum() > 25


# ---- planted bugs


def run(drafter_of, verification_of, forbid=True):
    many = SAMPLES, -1
    order = Order.lattice(HIDDEN.expand(many), torch.ones(SAMPLES, TEXT.shape[1], dtype=torch.bool))
    rows = rows_of(TEXT.expand(many), order, 5)
    conditionals = conditionals_of(MODEL, order, rows)
    if forbid:
        conditionals = Forbidding(conditionals, MASK)
    sampling = Sampling(RowStreams(5, SAMPLES), SameForAllRows(NO_TRUNCATION))
    fill(rows, Filling(conditionals, drafter_of(conditionals, order, rows, sampling), verification_of(sampling), 5))
    return sequences_of(rows, order, TEXT.expand(many))


def self_draft(conditionals, order, rows, sampling):
    return SelfDraft(conditionals, sampling)


def verified(sampling):
    return SampledVerification(sampling.streams)


class Unverified(SampledVerification):
    """Planted: parallel sampling. Drafts are committed as they are."""

    def __call__(self, rows, draft, scores, eos_ids):
        num_drafted = (draft.token_ids >= 0).sum(1)
        uniforms = self.streams.uniforms(rows.row_ids, rows.host_lengths, 1, Purpose.VERIFY)
        row = torch.arange(len(rows))
        last = sample_tokens(scores[row, num_drafted].softmax(-1), uniforms[:, 0])[:, None]
        width = torch.arange(scores.shape[1])
        tokens = torch.where(width < num_drafted[:, None], torch.cat([draft.token_ids, last], 1), last)
        return commit(tokens, num_drafted, draft.token_ids, eos_ids, rows.token_ids, rows.lengths, rows.limits)


class ForgetsToRenormalise(SampledVerification):
    """Planted: the mask's probability is set to zero behind the softmax, in p as in q, and p / q taken of the rest."""

    def __call__(self, rows, draft, scores, eos_ids):
        p, q = scores.softmax(-1), draft.probs
        p[..., MASK] = 0
        num_rows, k = draft.token_ids.shape
        row, ids = torch.arange(num_rows), draft.token_ids.clamp(min=0)[..., None]
        uniforms = self.streams.uniforms(rows.row_ids, rows.host_lengths, k + 1, Purpose.VERIFY)
        passes = uniforms[:, :k] < (p[:, :k].gather(2, ids) / q.gather(2, ids)).squeeze(2)
        num_accepted = (passes & (draft.token_ids >= 0)).cumprod(1).sum(1)
        rejected = num_accepted < (draft.token_ids >= 0).sum(1)
        here = p[row, num_accepted]
        rest = (here - q[row, num_accepted.clamp(max=k - 1)]).clamp(min=0)
        last = sample_tokens(torch.where(rejected[:, None], rest, here), uniforms[:, k])[:, None]
        width = torch.arange(k + 1)
        tokens = torch.where(width < num_accepted[:, None], torch.cat([draft.token_ids, last], 1), last)
        return commit(tokens, num_accepted, draft.token_ids, eos_ids, rows.token_ids, rows.lengths, rows.limits)


class SelfDraftWithoutMask(SelfDraft):
    """Planted, for the drafts: sampled from what is left, reported as it was."""

    def propose(self, rows, room, max_tokens):
        (draft, first) = super().propose(rows, room, max_tokens)
        scores = self.conditionals.logits(rows, rows.token_ids.new_empty(len(rows), 0), max_tokens)[:, 0]
        q = scores.softmax(-1)
        q[..., MASK] = 0
        uniforms = self.sampling.uniforms(rows, max_tokens)
        tokens = sample_tokens(q.flatten(0, 1), uniforms.flatten()).view(q.shape[:2])
        return Proposal(Draft(tokens.masked_fill(draft.token_ids < 0, -1), q), first)


class WrongDistribution(SelfDraft):
    """Planted: reports another q than it sampled from."""

    def propose(self, rows, room, max_tokens):
        draft, first = super().propose(rows, room, max_tokens)
        return Proposal(Draft(draft.token_ids, (draft.probs.log() * 3).softmax(-1)), first)


def test_this_harness_is_sound():
    for drafter_of in (
        self_draft,
        lambda conditionals, order, rows, sampling: AheadDraft(5, sampling),
        lambda conditionals, order, rows, sampling: NgramDraft(order, rows, VOCAB, sampling),
    ):
        assert p_value(run(drafter_of, verified), joint()) > ALPHA


def test_unverified_parallel_sampling_is_found():
    assert p_value(run(self_draft, lambda sampling: Unverified(sampling.streams)), joint()) < 1e-6


def test_the_mask_taken_away_behind_the_softmax_is_found():
    filled = run(
        lambda conditionals, order, rows, sampling: SelfDraftWithoutMask(conditionals, sampling),
        lambda sampling: ForgetsToRenormalise(sampling.streams),
        forbid=False,
    )
    assert not (filled[:, PLACES] == MASK).any()
    assert p_value(filled, joint()) < 1e-6


def test_a_wrong_draft_distribution_is_found():
    wrong = run(lambda conditionals, order, rows, sampling: WrongDistribution(conditionals, sampling), verified)
    assert p_value(wrong, joint()) < 1e-6
