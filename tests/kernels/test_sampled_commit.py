"""One sampled step by hand, and the kernel against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from verification import NO_EOS, run

from specdec.kernels.commit import block_statistics
from specdec.kernels.commit.greedy_commit import NO_TOKEN
from specdec.kernels.commit.sample import sample_tokens

# ---- one step, by hand


def one_row(target, draft_ids, draft, numbers, **options):
    to = lambda rows: torch.tensor([rows], dtype=torch.float32)  # noqa: E731
    ids = torch.tensor([draft_ids], dtype=torch.long)
    numbers = torch.tensor([numbers], dtype=torch.float64)
    return run(to(target), ids, None if draft is None else to(draft), numbers, **options)


def test_full_acceptance_commits_the_bonus():
    target = [[0.5, 0.5, 0], [0.2, 0.8, 0], [0.1, 0.1, 0.8]]
    out, tokens, lengths = one_row(target, [0, 1], [[1, 0, 0], [0, 1, 0]], [0.3, 0.4, 0.7])
    assert out.token_ids.tolist() == [[0, 1, 2]] and tokens[0, 3:6].tolist() == [0, 1, 2]
    assert (out.num_accepted.item(), out.num_committed.item(), lengths.item()) == (2, 3, 6)


def test_first_rejection_commits_a_recovered_token():
    """(p - q)+ at place 0 is (0, .2, .3): token 2 from 0.4 on."""
    target = [[0.2, 0.4, 0.4], [1, 0, 0], [1, 0, 0]]
    for number, token in ((0.39, 1), (0.41, 2)):
        out, _, lengths = one_row(target, [0, 0], [[0.7, 0.2, 0.1], [1, 0, 0]], [number, 0.9, 0.0])
        assert out.token_ids.tolist() == [[token, NO_TOKEN, NO_TOKEN]]
        assert (out.num_accepted.item(), lengths.item()) == (0, 4)


def test_a_rejected_deterministic_draft_is_not_its_own_recovery():
    for number in (0.0, 0.5, 1 - 2**-53):
        out, _, _ = one_row([[0.4, 0.6], [1, 0]], [1], None, [number, 0.7])
        assert out.token_ids.tolist() == [[0, NO_TOKEN]]


def test_block_verification_does_not_stop_at_the_first_failure():
    """r_1 = .5, R_1 = (.5 * .9 - .1)+ = .35, h_1 = .35 / .85; r_2 = min(1, .5 * .9 / .1) = 1."""
    target, draft = [[0.4, 0.6], [0.9, 0.1], [0, 1]], [[0.8, 0.2], [0.1, 0.9]]
    assert one_row(target, [0, 0], draft, [0.5, 0.99, 0.99], verification="block")[0].num_accepted.item() == 2
    assert one_row(target, [0, 0], draft, [0.5, 0.99, 0.99], verification="token")[0].num_accepted.item() == 0


def test_ends_of_sequence_and_limits_cut_the_commit():
    target = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    out, _, lengths = one_row(target, [0, 1], None, [0.5, 0.5, 0.5], eos=(1,))
    assert out.token_ids.tolist() == [[0, 1, NO_TOKEN]] and out.finished.item() and lengths.item() == 5
    out, _, lengths = one_row(target, [0, 1], None, [0.5, 0.5, 0.5], limits=torch.tensor([4]))
    assert out.token_ids.tolist() == [[0, NO_TOKEN, NO_TOKEN]] and out.finished.item() and lengths.item() == 4


def test_places_behind_the_commit_hold_valid_tokens():
    """They are fed to embeddings by drafters that read past a row's length."""
    _, tokens, _ = one_row([[0.0, 1.0]] * 4, [0, NO_TOKEN, NO_TOKEN], None, [0.5] * 4)
    assert tokens[0, 3:7].ge(0).all()


@pytest.mark.parametrize("verification", ["token", "block"])
def test_equal_distributions_accept_everything(verification):
    probs = (5 * torch.randn(200, 6, 50)).softmax(-1)
    drafts = torch.multinomial(probs[:, :-1].flatten(0, 1), 1).view(200, 5)
    numbers = torch.rand(200, 6, dtype=torch.float64)
    numbers[0] = 1 - 2**-20  # exp(log p) is p up to some 2**-23, and not to the same bits on every CPU
    out, _, _ = run(probs, drafts, probs[:, :-1], numbers.clamp(max=1 - 2**-20), verification=verification)
    assert out.num_accepted.eq(5).all() and out.num_committed.eq(6).all()


@pytest.mark.parametrize("verification", ["token", "block"])
def test_a_rejection_that_leaves_nothing_to_recover_samples_the_target(verification):
    """q exceeds p everywhere by rounding, so that (p - q)+ is zero."""
    target = [[0.25, 0.25, 0.5]] * 2
    draft = [[0.2500001, 0.2500001, 0.5000001]]
    for number, token in ((0.2, 0), (0.3, 1), (0.9, 2)):
        out, _, _ = one_row(target, [2], draft, [number, 1 - 2**-53], verification=verification)
        assert out.token_ids.tolist() == [[token, NO_TOKEN]]


def test_sampling_never_chooses_a_token_without_mass():
    mass = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.7, 0.0]])
    for number, token in ((0.0, 2), (0.29, 2), (0.31, 4), (1 - 2**-53, 4)):
        assert sample_tokens(mass, torch.tensor([number], dtype=torch.float64)).item() == token


def test_sampling_resolves_a_large_vocabulary():
    """In float32 the running sum would be off by several tokens of 5e-6 each."""
    vocab = 200_000
    wanted = torch.tensor([0, 1, 77_777, 150_001, vocab - 1])
    numbers = (wanted.double() + 0.5) / vocab
    assert torch.equal(sample_tokens(torch.full((5, vocab), 1 / vocab), numbers), wanted)


# ---- the kernel


def random_case(vocab, k, seed, device="cpu"):
    """Five rows: ragged drafts, NaN where nothing may be read; row 0 has q = p, row 1 a target without some tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = 5
    logits = 2 * torch.randn(2, rows, k + 1, vocab, generator=generator)
    logits[1] = 0.6 * logits[0] + 0.4 * logits[1]
    logits[1, 0] = logits[0, 0]
    logits[0, 1, :, vocab // 2 + 1 :] = -torch.inf
    target, draft = logits.softmax(-1).unbind(0)
    draft = draft[:, :k].clone()
    ids = torch.multinomial(draft.flatten(0, 1), 1, generator=generator).view(rows, k) if k else NO_EOS.view(0, 0)
    ids = ids.reshape(rows, k)
    nothing = torch.arange(k) >= torch.randint(k + 1, (rows, 1), generator=generator)
    nothing[:2] = False
    draft[nothing] = torch.nan
    target[:, 1:][nothing] = torch.nan
    lengths = torch.randint(1, 20, (rows,), generator=generator)
    limits = lengths + torch.randint(1, k + 4, (rows,), generator=generator)
    numbers = torch.rand(rows, k + 1, generator=generator, dtype=torch.float64)
    case = target, ids.masked_fill(nothing, NO_TOKEN), draft, numbers, lengths, limits
    return [tensor.to(device) for tensor in case]


def nothing_to_recover():
    """One row whose only draft is rejected although q equals p but for rounding."""
    target = torch.tensor([[[0.25, 0.25, 0.5]] * 2])
    numbers = torch.tensor([[0.3, 1 - 2**-53]], dtype=torch.float64)
    return target, torch.tensor([[2]]), target[:, :1] + 1e-7, numbers, torch.tensor([3]), torch.tensor([9])


def compare(target, ids, draft, numbers, lengths, limits):
    device = target.device
    ways = [
        ("token", draft, 1.0),
        ("block", draft, 1.0),
        ("block", None, 1.0),
        ("token", draft, 0.3),
        ("token", None, 0.3),
    ]
    for verification, probs, lenience in ways:
        options = {"eos": (0, 5), "lengths": lengths, "limits": limits}
        options |= {"verification": verification, "lenience": lenience}
        expected, tokens, ends = run(target, ids, probs, numbers, implementation="torch", **options)
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and the largest integers
        try:
            out, kernel_tokens, kernel_ends = run(target, ids, probs, numbers, implementation="triton", **options)
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b in zip((out.report, kernel_ends), (expected.report, ends), strict=True):
            assert torch.equal(a, b)
        committed = torch.arange(60, device=device) < ends[:, None]
        assert torch.equal(kernel_tokens[committed], tokens[committed])
        assert kernel_tokens[~committed].eq(77).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("vocab, k", [(1, 0), (1, 3), *itertools.product((7, 600), (0, 1, 4, 8))])
def test_kernel_in_the_interpreter_equals_the_reference(vocab, k, monkeypatch):
    """Vocabularies of one block and of three, which the kernels pad to four."""
    monkeypatch.setattr(block_statistics, "VOCAB_BLOCK", 256)
    compare(*random_case(vocab, k, seed=10 * k + vocab))


@pytest.mark.interpreter
def test_kernel_in_the_interpreter_equals_the_reference_where_nothing_is_left_to_recover():
    compare(*nothing_to_recover())


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1, 7, 1000, 151_936])
@pytest.mark.parametrize("k", range(9))
def test_kernel_on_a_gpu_equals_the_reference(vocab, k):
    for seed in range(3):
        compare(*random_case(vocab, k, seed, "cuda"))


def test_wrong_arguments_are_named():
    target, ids, numbers = torch.full((1, 2, 2), 0.5), torch.zeros(1, 1).long(), torch.zeros(1, 2).double()
    with pytest.raises(ValueError, match=r"target has shape \(1, 1, 2\); 1 rows of 1 drafts need \(1, 2, 2\)"):
        run(target[:, :1], ids, None, numbers)
    with pytest.raises(ValueError, match="draft_probs has shape"):
        run(target, ids, target, numbers)
    with pytest.raises(ValueError, match=r"uniforms has shape \(1, 1\)"):
        run(target, ids, None, numbers[:, :1])
    with pytest.raises(ValueError, match=r"torch.float32; pass float64"):
        run(target, ids, None, numbers.float())
    with pytest.raises(ValueError, match="verification='blocks'"):
        run(target, ids, None, numbers, verification="blocks")
    with pytest.raises(ValueError, match="choose 'auto'"):
        run(target, ids, None, numbers, implementation="cuda")
