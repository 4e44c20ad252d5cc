"""Requests with different truncations share a batch, and every row gets to the last bit what it gets alone."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verification import run

from specdec.draft import Draft
from specdec.kernels.commit import block_statistics
from specdec.kernels.commit.distribution import distribution_of
from specdec.kernels.commit.greedy_commit import BAD_SCORES, NO_TOKEN, greedy_commit
from specdec.kernels.commit.sample import sample
from specdec.kernels.commit.sampled_commit import sampled_commit
from specdec.kernels.commit.truncation import GREEDY, NO_TRUNCATION, Truncation, Truncations
from specdec.verify.lossy import Lenient, Typical
from specdec.verify.random_streams import RowStreams
from specdec.verify.truncations import SameForAllRows
from specdec.verify.verification import BAD_DRAFT, GreedyVerification, SampledVerification

needs_interpreter = pytest.mark.interpreter
EACH = [
    NO_TRUNCATION,
    GREEDY,
    Truncation(0.7),
    Truncation(top_k=7),
    Truncation(1.3, top_k=5000),
    Truncation(0.7, top_p=0.9),
    Truncation(top_k=9, top_p=0.5),
    Truncation(min_p=0.05),
    Truncation(0.5, 20, 0.95, 0.1),
    Truncation(0.0, top_k=3),
    Truncation(0.7, 1, 0.0),
]
NUM_ROWS = len(EACH)
FEW = [EACH[0], GREEDY, EACH[5], EACH[8]]  # the interpreter takes seconds for each: no search, greedy, one, all


# ---- one truncation per row, as tensors


def test_truncations_as_tensors():
    found = Truncations.of([NO_TRUNCATION, GREEDY, Truncation(0.5, 4, 0.9, 0.25)], "cpu")
    assert found.temperature.tolist() == [1, 0, 0.5] and found.top_k.tolist() == [0, 0, 4]
    assert found.top_p.tolist() == [1, 1, 0.9]
    assert found.log_min_p.exp().tolist() == pytest.approx([0, 0, 0.25])
    assert found.has_greedy and found.has_top_k and found.has_top_p and found.has_min_p
    plain = Truncations.same(Truncation(0.5), 3, "cpu")
    assert len(plain) == 3 and plain.temperature.tolist() == [0.5] * 3
    assert not (plain.has_greedy or plain.has_top_k or plain.has_top_p or plain.has_min_p)


def test_a_greedy_row_asks_for_no_search():
    found = Truncations.of([Truncation(0, 5, 0.5, 0.1), NO_TRUNCATION], "cpu")
    assert found.each[0] == GREEDY and not (found.has_top_k or found.has_top_p or found.has_min_p)


def test_some_rows_are_taken():
    whole = Truncations.of(EACH, "cpu")
    part = whole.take([3, 0, 3])
    assert part.each == (EACH[3], EACH[0], EACH[3]) and part.top_k.tolist() == [7, 0, 7] and not part.has_greedy
    assert Truncations.same(GREEDY, 2, "cpu").take([0, 1, 1]).each == (GREEDY,) * 3
    assert len(whole.take([])) == 0


def test_another_number_of_rows_is_named():
    truncations = Truncations.same(GREEDY, 2, "cpu")
    with pytest.raises(ValueError, match="2 truncations for scores of 3 rows"):
        distribution_of(torch.zeros(3, 1, 5), truncations)
    with pytest.raises(ValueError, match="2 truncations for scores of 3 rows"):
        sample(torch.zeros(3, 5), truncations, torch.zeros(3).double(), torch.empty(3, 5))


def test_tensors_are_kept_while_the_number_of_rows_stays():
    processors, counts = SameForAllRows(Truncation(0.5)), [3, 3, 2]
    found = [processors.truncations(FakeRows(torch.full((count,), 3), None, None)) for count in counts]
    assert found[0] is found[1] and [len(one) for one in found] == counts


# ---- every row as if it were alone


def random_scores(vocab, places, seed, dtype=torch.float32, rows=NUM_ROWS):
    """Ties, tokens that are forbidden, and places that are unusable."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(rows, places, vocab, generator=generator)
    scores[::2] = scores[::2].round()
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = -torch.inf
    scores[1, 0] = scores[2 % rows, -1] = scores[5 % rows, 0] = -torch.inf
    scores[9 % rows, -1, vocab // 2] = scores[3, 0, vocab - 1] = torch.nan
    scores[-1, -1, vocab // 2] = torch.inf
    return scores.to(dtype)


def statistics(found):
    return [values for values in (found.cutoff, found.top, found.mass, found.best) if values is not None]


def compare_distributions(scores, implementation, each=EACH):
    """Of the mixed batch against each row alone."""
    device, places = scores.device, scores.shape[1]
    mixed = distribution_of(scores, Truncations.of(each, device), implementation)
    place = torch.arange(len(each), device=device) % places
    ids = torch.arange(places, device=device).expand(len(each), -1) % scores.shape[2]
    for row, truncation in enumerate(each):
        part = slice(row, row + 1)
        alone = distribution_of(scores[part], Truncations.of([truncation], device), implementation)
        if not truncation.is_greedy:
            assert alone.best is None and mixed.best[row].eq(NO_TOKEN).all()
        for one, batch in zip(statistics(alone), statistics(mixed), strict=False):
            torch.testing.assert_close(batch[part], one, rtol=0, atol=0, equal_nan=True)
        for one, batch in (
            (alone.at(place[part]), mixed.at(place)[part]),
            (alone.of_tokens(ids[part]), mixed.of_tokens(ids)[part]),
        ):
            torch.testing.assert_close(batch, one, rtol=0, atol=0, equal_nan=True)


def compare_samples(scores, implementation, each=EACH):
    device, vocab = scores.device, scores.shape[1]
    uniforms = torch.rand(len(each), dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(device)
    probs, own = torch.full((2, len(each), vocab + 2), torch.nan, device=device)
    tokens = sample(scores, Truncations.of(each, device), uniforms, probs, implementation)
    for row, truncation in enumerate(each):
        part = slice(row, row + 1)
        alone = Truncations.of([truncation], device)
        assert torch.equal(sample(scores[part], alone, uniforms[part], own[part], implementation), tokens[part])
        assert torch.equal(own[part], probs[part])
        if truncation.is_greedy:
            is_nan = scores[row].isnan().any()
            assert tokens[row] == (NO_TOKEN if is_nan else scores[row].argmax())
            assert probs[row].count_nonzero() == (0 if is_nan else 1)
            assert is_nan or probs[row, tokens[row]] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab, places", [(1, 2), (50, 1), (400, 3), (5000, 2)])
def test_rows_of_the_reference_are_as_if_alone(vocab, places, dtype):
    scores = random_scores(vocab, places, seed=vocab, dtype=dtype)
    compare_distributions(scores, "torch")
    for place in range(places):
        compare_samples(scores[:, place], "torch")


def test_long_rows_of_the_reference_are_as_if_alone():
    """torch splits sums of single long rows among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        scores = random_scores(70_000, 1, seed=5)
        compare_distributions(scores, "torch")
        compare_samples(scores[:, 0], "torch")
    finally:
        torch.set_num_threads(before)


@needs_interpreter
@pytest.mark.parametrize(
    "vocab, places, dtype", [(1, 1, torch.float32), (70, 1, torch.bfloat16), (40, 1, torch.float64)]
)
def test_rows_of_the_kernels_are_as_if_alone_in_the_interpreter(vocab, places, dtype, monkeypatch):
    monkeypatch.setattr(block_statistics, "VOCAB_BLOCK", 32)
    scores = random_scores(vocab, places, seed=vocab, dtype=dtype, rows=len(FEW))
    compare_distributions(scores, "triton", FEW)
    compare_samples(scores[:, 0], "triton", FEW)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab, places", [(1, 2), (400, 3), (151_936, 2)])
def test_rows_of_the_kernels_are_as_if_alone_on_a_gpu(vocab, places, dtype):
    scores = random_scores(vocab, places, seed=vocab, dtype=dtype).cuda()
    compare_distributions(scores, "triton")
    for place in range(places):
        compare_samples(scores[:, place], "triton")


@pytest.mark.gpu
def test_the_copy_does_not_wait_for_the_device():
    torch.cuda.set_sync_debug_mode("error")
    try:
        Truncations.of(EACH, "cuda")
        Truncations.same(GREEDY, 3, "cuda").take([0, 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the commit


def random_step(each, vocab, k, seed, planted=0.3):
    """(scores, draft ids, draft probabilities, uniforms, lengths, limits), one row for each of `each`.

    planted: how often a draft is the argmax, so that greedy rows accept some. Greedy rows get draft probabilities that
    mean nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(each)
    scores = (2 * torch.randn(rows, k + 1, vocab, generator=generator)).round()
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = -torch.inf
    unusable = torch.rand(rows, k + 1, generator=generator)
    scores[unusable < 0.05] = -torch.inf
    scores[(unusable > 0.95)[..., None] & (torch.arange(vocab) == vocab // 2)] = torch.nan
    probs = (2 * torch.randn(rows, k, vocab, generator=generator)).softmax(-1)
    ids = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(rows, k) if k else torch.zeros(rows, 0)
    is_planted = torch.rand(rows, k, generator=generator) < planted
    ids = torch.where(is_planted, scores[:, :-1].argmax(-1), ids.long())
    nothing = torch.arange(k) >= torch.randint(k + 1, (rows, 1), generator=generator)
    ids[nothing] = NO_TOKEN
    is_greedy = torch.tensor([truncation.is_greedy for truncation in each])
    garbage = torch.tensor([torch.nan, 0.0, 2.0, -1.0, 1.0])
    probs[is_greedy] = garbage[torch.randint(len(garbage), probs.shape, generator=generator)][is_greedy]
    uniforms = torch.rand(rows, k + 1, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 20, (rows,), generator=generator)
    limits = lengths + torch.randint(1, k + 3, (rows,), generator=generator)
    return scores, ids, probs, uniforms, lengths, limits


def greedy_alone(scores, ids, lengths, limits, eos, implementation, passes=None):
    tokens, lengths = torch.full((len(ids), 60), 77, device=ids.device), lengths.clone()
    eos = torch.tensor(eos, device=ids.device)
    return greedy_commit(scores, ids, eos, tokens, lengths, limits, passes, implementation), tokens, lengths


def same_commit(found, expected, part):
    """Reports, lengths and committed tokens of one row."""
    assert torch.equal(found[0].report[part], expected[0].report)
    assert torch.equal(found[2][part], expected[2])
    length = int(expected[2])
    assert torch.equal(found[1][part, :length], expected[1][:, :length])


def compare_commits(each, vocab, k, seed, implementation, device="cpu", methods=("token", "block")):
    """A mixed batch against every row alone, and its greedy rows against `greedy_commit`."""
    case = [values.to(device) for values in random_step(each, vocab, k, seed)]
    scores, ids, probs, uniforms, lengths, limits = case
    eos, target = (0, 3), distribution_of(scores, Truncations.of(each, device), implementation)
    passes = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).to(device) < 0.3
    passes &= ids != NO_TOKEN
    for method, q, given_passes in itertools.product(methods, (probs, None), (None, passes)):
        options = {"eos": eos, "verification": method, "implementation": implementation}
        if method == "token":
            options["lenience"] = 0.5
        found = run(target, ids, q, uniforms, lengths=lengths, limits=limits, passes=given_passes, **options)
        for row, truncation in enumerate(each):
            part = slice(row, row + 1)
            where = {"lengths": lengths[part], "limits": limits[part]}
            if truncation.is_greedy:
                own = None if given_passes is None else given_passes[part]
                expected = greedy_alone(scores[part], ids[part], *where.values(), eos, implementation, own)
            else:
                alone = distribution_of(scores[part], Truncations.of([truncation], device), implementation)
                own_q = None if q is None else q[part]
                expected = run(alone, ids[part], own_q, uniforms[part], **where, **options)
            same_commit(found, expected, part)


batches = st.lists(st.sampled_from(EACH), min_size=1, max_size=6)
seeds = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(batches, st.sampled_from([1, 5, 90]), st.integers(0, 4), seeds)
def test_rows_of_a_mixed_commit_are_as_if_alone(each, vocab, k, seed):
    compare_commits(each, vocab, k, seed, "torch")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 5, 90]), st.integers(0, 4), seeds)
def test_a_greedy_batch_commits_what_greedy_commit_does(rows, vocab, k, seed):
    compare_commits([GREEDY] * rows, vocab, k, seed, "torch")


@needs_interpreter
@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(FEW), min_size=1, max_size=2), st.sampled_from([1, 40]), st.integers(0, 3), seeds)
def test_rows_of_a_mixed_commit_by_the_kernels_in_the_interpreter(each, vocab, k, seed):
    with mock.patch.object(block_statistics, "VOCAB_BLOCK", 32):
        compare_commits([GREEDY, *each], vocab, k, seed, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1, 7, 151_936])
@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_rows_of_a_mixed_commit_by_the_kernels_on_a_gpu(vocab, k):
    for seed in range(3):
        compare_commits(EACH, vocab, k, seed, "triton", "cuda")


def test_a_greedy_row_breaks_ties_by_the_lowest_index_and_reports_nan():
    scores = torch.tensor([[[1.0, 3, 3], [3, 0, 3]], [[1, 2, 3], [torch.nan, 0, 0]]])
    target = distribution_of(scores, Truncations.same(GREEDY, 2, "cpu"))
    uniforms = torch.full((2, 2), 1 - 2**-53, dtype=torch.float64)
    out, _, _ = run(target, torch.tensor([[1], [2]]), None, uniforms)
    assert out.token_ids[0].tolist() == [1, 0] and out.fault.tolist() == [0, BAD_SCORES]


# ---- verification


class FakeRows:
    """Rows on the host, with the truncations that their requests brought."""

    def __init__(self, lengths, limits, row_ids):
        self.token_ids = torch.full((len(lengths), 60), 77)
        self.lengths, self.limits, self.row_ids = lengths.clone(), limits, row_ids
        self.host_lengths, self.device = lengths.numpy(), lengths.device

    def __len__(self):
        return len(self.lengths)


class Given:
    def __init__(self, each):
        self.each = each

    def truncations(self, rows):
        return Truncations.of([self.each[row] for row in rows.row_ids], rows.device)


@pytest.mark.parametrize("method", ["token", "block", Lenient(0.3), Typical(0.3, 0.5)], ids=str)
def test_verification_of_a_mixed_batch_row_by_row(method):
    each, streams, no_ends = [*EACH, GREEDY, GREEDY], RowStreams(7, len(EACH) + 2), torch.empty(0, dtype=torch.long)
    accepted_by_rule = 0
    for seed in range(10):
        scores, ids, probs, _, lengths, limits = random_step(each, 12, 3, seed, planted=0.2)
        verify = SampledVerification(streams, Given(each), method)

        def commit(index, verify=verify, case=(scores, ids, probs, lengths, limits)):
            scores, ids, probs, lengths, limits = (values[index] for values in case)
            rows = FakeRows(lengths, limits, index.numpy())
            return verify(rows, Draft(ids, probs), scores, no_ends), rows

        whole, rows = commit(torch.arange(len(each)))
        for row, truncation in enumerate(each):
            index = torch.tensor([row])
            if truncation.is_greedy:
                rule = method if isinstance(method, Lenient) else None
                alone, own = commit(index, GreedyVerification(rule))
                accepted_by_rule += int(alone.num_accepted) - int(commit(index, GreedyVerification())[0].num_accepted)
            else:
                alone, own = commit(index)
            assert torch.equal(whole.report[row], alone.report[0]), (seed, row)
            assert torch.equal(rows.lengths[row], own.lengths[0])
    assert (accepted_by_rule > 0) == isinstance(method, Lenient)


def test_draft_probabilities_of_greedy_rows_are_not_judged():
    each = [GREEDY, NO_TRUNCATION]
    rows = FakeRows(torch.tensor([3, 3]), torch.tensor([9, 9]), torch.arange(2).numpy())
    draft = Draft(torch.tensor([[1], [1]]), torch.full((2, 1, 4), 0.9))
    verify = SampledVerification(RowStreams(0, 2), Given(each))
    done = verify(rows, draft, torch.zeros(2, 2, 4), torch.empty(0, dtype=torch.long))
    assert done.fault.tolist() == [0, BAD_DRAFT]


def test_a_planted_bug_is_found(monkeypatch):
    """Greedy rows that keep the sampled decision fail the comparison."""
    from specdec.kernels.commit import sampled_commit as module

    monkeypatch.setattr(module, "_decide_greedy", lambda best, ids, passes, accepted, final: (accepted, final))
    with pytest.raises(AssertionError):
        for seed in range(20):
            compare_commits([GREEDY, NO_TRUNCATION], 5, 3, seed, "torch")
    assert module.sampled_commit is sampled_commit
