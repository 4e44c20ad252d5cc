"""The distribution of scores equals the softmax of what transformers' warpers leave, and the kernels agree."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.generation import logits_process as hf

from specdec.kernels.commit import block_statistics, distribution
from specdec.kernels.commit.distribution import distribution_of
from specdec.kernels.commit.greedy_commit import NO_TOKEN
from specdec.kernels.commit.sample import sample, sample_tokens
from specdec.kernels.commit.truncation import Truncation, Truncations

needs_interpreter = pytest.mark.interpreter
TRUNCATIONS = [
    Truncation(*values)
    for values in itertools.product((1.0, 0.6), (0, 1, 7, 5000), (1.0, 0.9, 0.3, 0.0), (0.0, 0.05))
]  # fmt: skip
# The interpreter takes seconds for each: no search, two, and one; more tokens than there are, one token, no mass.
INTERPRETED = [
    Truncation(min_p=0.05),
    Truncation(1.0, 5000, 0.3),
    Truncation(1.0, 7, 0.9, 0.05),
    Truncation(0.6, 1, 0.0),
    Truncation(0.6, 0, 0.3, 0.05),
]


def alike(scores, truncation):
    """One truncation for all rows of scores."""
    return Truncations.same(truncation, len(scores), scores.device)


def warped(scores, truncation):
    """By transformers, as probabilities."""
    temperature, top_k, top_p, min_p = truncation
    warpers = [hf.TemperatureLogitsWarper(temperature)]
    warpers += [hf.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(min_p)] if min_p else []
    flat = scores.flatten(0, 1)
    for warper in warpers:
        flat = warper(None, flat)
    return flat.double().softmax(-1).view(scores.shape)


def random_scores(vocab, rows=3, places=4, seed=0, spread=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(rows, places, vocab, generator=generator)
    scores[0, 0, vocab // 2 + 1 :] = -torch.inf  # forbidden by a processor
    return scores.to(dtype)


def probs_of(found):
    places = [found.at(torch.full((len(found.scores),), place)) for place in range(found.scores.shape[1])]
    return torch.stack(places, 1).double()


@pytest.mark.parametrize("vocab", [1, 5, 400])
def test_the_distribution_is_transformers_own(vocab):
    scores = random_scores(vocab)
    for truncation in TRUNCATIONS:
        expected = warped(scores, truncation)
        found = distribution_of(scores, alike(scores, truncation))
        assert torch.allclose(probs_of(found), expected, rtol=1e-5, atol=1e-9), truncation  # float32 against float64

        ids = expected.argmax(-1)
        assert torch.allclose(found.of_tokens(ids), expected.gather(2, ids[..., None])[..., 0], rtol=1e-5), truncation


def test_more_tokens_than_the_first_look_takes():
    """A flat distribution's top-p reaches far beyond the largest few."""
    scores = random_scores(1000, spread=0.1)
    for top_p in (0.05, 0.5, 0.999):
        truncation = Truncation(top_p=top_p)
        assert torch.allclose(
            probs_of(distribution_of(scores, alike(scores, truncation))), warped(scores, truncation), rtol=1e-5
        )


def test_in_pieces(monkeypatch):
    scores, truncation = random_scores(50, rows=5), Truncation(0.8, 9, 0.9, 0.01)
    whole = distribution_of(scores, alike(scores, truncation))
    monkeypatch.setattr(distribution, "REFERENCE_ELEMENTS", 130)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole[2:5], distribution_of(scores, alike(scores, truncation))[2:5], strict=True)
    )


def test_ties_at_a_cutoff_are_all_kept():
    scores = torch.tensor([[[3.0, 1.0, 1.0, 1.0, 0.0]]]).bfloat16()
    for truncation in (Truncation(top_k=2), Truncation(top_k=3), Truncation(top_p=0.75)):
        probs = probs_of(distribution_of(scores, alike(scores, truncation)))[0, 0]
        assert probs[4] == 0 and probs[1] == probs[2] == probs[3] > 0
        assert probs.sum() == pytest.approx(1, abs=1e-6)


def test_unusable_scores_are_marked():
    scores = random_scores(10)
    scores[0, 1, 3] = torch.nan
    scores[1, 2] = -torch.inf
    scores[2, 0, 5] = torch.inf
    for truncation in TRUNCATIONS:
        bad = distribution_of(scores, alike(scores, truncation)).mass.isnan()
        assert bad.nonzero().tolist() == [[0, 1], [1, 2], [2, 0]], truncation


@pytest.mark.parametrize("truncation", TRUNCATIONS[::5])
def test_a_sample_and_its_probabilities(truncation):
    scores = random_scores(40, rows=50, places=1)[:, 0]
    numbers = torch.rand(50, dtype=torch.float64)
    probs = torch.full((50, 44), torch.nan)
    tokens = sample(scores, alike(scores, truncation), numbers, probs)
    assert probs[:, 40:].eq(0).all()
    assert torch.allclose(probs[:, :40].double(), warped(scores[:, None], truncation)[:, 0], rtol=1e-5, atol=1e-9)
    assert torch.equal(tokens, sample_tokens(probs, numbers))
    assert probs.gather(1, tokens[:, None]).gt(0).all()


def test_no_sample_of_nothing():
    scores = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [-torch.inf, -torch.inf]])
    probs = torch.empty(3, 2)
    tokens = sample(scores, alike(scores, Truncation()), torch.full((3,), 0.9, dtype=torch.float64), probs)
    assert tokens.tolist() == [1, NO_TOKEN, NO_TOKEN] and probs[1:].eq(0).all()


def test_wrong_room_is_named():
    with pytest.raises(ValueError, match=r"probs of \[3, 4\] torch.float32 cannot hold .* \[3, 5\]"):
        sample(torch.zeros(3, 5), Truncations.same(Truncation(), 3, "cpu"), torch.zeros(3).double(), torch.empty(3, 4))


# ---- the kernels


def compare(scores, truncation):
    """The kernels against the reference, and the last row alone against the same in its batch."""
    expected = distribution_of(scores, alike(scores, truncation), "torch")
    found = distribution_of(scores, alike(scores, truncation), "triton")
    assert torch.equal(found.top, expected.top)
    assert torch.equal(*(scores >= cut.cutoff[..., None] for cut in (found, expected))), truncation
    assert torch.allclose(found.mass, expected.mass, rtol=1e-6), truncation
    alone = distribution_of(scores[-1:], alike(scores[-1:], truncation), "triton")
    assert all(torch.equal(one[0], batch[-1]) for one, batch in zip(alone[2:5], found[2:5], strict=True))
    rows, places, vocab = scores.shape
    numbers = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(scores.device)
    tokens, probs = [], torch.full((2, rows, vocab + 3), torch.nan, device=scores.device)
    for out, implementation in zip(probs, ("torch", "triton"), strict=True):
        tokens.append(sample(scores[:, places // 2], alike(scores, truncation), numbers, out, implementation))
    assert torch.allclose(probs[0], probs[1], rtol=1e-5, atol=1e-12)
    assert torch.equal(*tokens)
    out = torch.full_like(probs[1, -1:], torch.nan)
    assert torch.equal(
        sample(scores[-1:, places // 2], alike(scores[-1:], truncation), numbers[-1:], out, "triton"), tokens[1][-1:]
    )
    assert torch.equal(out, probs[1, -1:])


@needs_interpreter
@pytest.mark.parametrize("vocab, truncations", [(1, INTERPRETED[:3]), (50, INTERPRETED)])
def test_kernels_in_the_interpreter_equal_the_reference(vocab, truncations, monkeypatch):
    monkeypatch.setattr(block_statistics, "VOCAB_BLOCK", 32)
    for number, truncation in enumerate(truncations):
        dtype = torch.float16 if number % 2 else torch.float32
        compare(random_scores(vocab, rows=2, places=1, dtype=dtype), truncation)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cutoffs_among_ties_in_the_interpreter(dtype, monkeypatch):
    """Scores of both signs and both zeros, many of them equal, some forbidden; blocks in which all are forbidden."""
    monkeypatch.setattr(block_statistics, "VOCAB_BLOCK", 32)
    values = torch.tensor([2.0, 0.5, 1e-30, 0.0, -0.0, -0.5, -0.5000001, -3.0, -torch.inf])
    scores = values[torch.randint(len(values), (2, 1, 70))].to(dtype)
    scores[0, :, 32:64] = -torch.inf
    scores[1, :, :60] = -torch.inf
    compare(scores, Truncation(0.5, top_k=30, top_p=0.99, min_p=0.3))
    if dtype == torch.bfloat16:  # the fewest passes
        compare(scores, Truncation(0.5, top_p=0.7))


@needs_interpreter
def test_scores_that_do_not_lie_side_by_side_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(block_statistics, "VOCAB_BLOCK", 16)
    scores = random_scores(40, rows=3, places=4, dtype=torch.bfloat16)
    for part in (scores[:, 1:3, :33], scores[::2, :2, 1:], scores[:, :, ::2]):
        assert not part.is_contiguous()
        compare(part, Truncation(min_p=0.1))


@needs_interpreter
def test_unusable_scores_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(block_statistics, "VOCAB_BLOCK", 16)
    scores = random_scores(20, places=3, dtype=torch.bfloat16)
    scores[0, 1, 3] = torch.nan
    scores[0, 1, 4:] = -torch.inf
    scores[1, 2] = -torch.inf
    scores[2, 0, 17] = torch.inf
    together = scores[[0, 0, 1, 2, 1], [1, 0, 2, 0, 0]]  # the three, and usable ones between and behind them
    for truncation in (Truncation(), Truncation(top_k=3), Truncation(top_p=0.5, min_p=0.1)):
        bad = distribution_of(scores, alike(scores, truncation), "triton").mass.isnan()
        assert bad.nonzero().tolist() == [[0, 1], [1, 2], [2, 0]], truncation
        probs = torch.full((5, 20), torch.nan)
        tokens = sample(together, alike(together, truncation), torch.zeros(5).double(), probs, "triton")
        assert tokens.eq(NO_TOKEN).tolist() == [True, False, True, True, False], truncation
        torch.testing.assert_close(probs.sum(1), torch.tensor([0.0, 1, 0, 0, 1]), rtol=0, atol=1e-5)
        assert probs[[0, 2, 3]].eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 8192, 151_936])
def test_kernels_on_a_gpu_equal_the_reference(vocab, dtype):
    for spread, truncation in itertools.product((0.05, 2.0), TRUNCATIONS):
        compare(random_scores(vocab, spread=spread, dtype=dtype).cuda(), truncation)
