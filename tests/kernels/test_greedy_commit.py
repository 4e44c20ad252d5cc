"""Greedy verification and commit: by hand, against a per-row reference, and the kernel against the torch reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.commit.greedy_commit import NO_TOKEN, NUM_DRAFTED, greedy_commit

VOCAB = 10


def run(target, draft, eos=(), lengths=(3,), limits=(99,), implementation="torch", device="cpu", passes=None):
    """target: the argmax of each place."""
    target, draft = torch.tensor(target), torch.tensor(draft, dtype=torch.long, device=device)
    scores = torch.nn.functional.one_hot(target, VOCAB).float().to(device)
    tokens = torch.full((len(target), 120), 77, device=device)
    lengths = torch.tensor(lengths, device=device)
    out = greedy_commit(
        scores, draft.reshape(len(target), -1), torch.tensor(eos, dtype=torch.long, device=device), tokens, lengths,
        torch.tensor(limits, device=device), passes, implementation,
    )  # fmt: skip
    return out, tokens, lengths


def commit_one(target, draft, eos, length, limit):
    """One row, token by token, as the papers say it."""
    committed = []
    for place, token in enumerate(target):
        committed.append(token)
        if token in eos or length + len(committed) == limit:
            break
        if place == len(draft) or draft[place] != token:
            break
    accepted = sum(1 for a, b in zip(committed, draft, strict=False) if a == b)
    finished = committed[-1] in eos or length + len(committed) == limit
    return committed, accepted, finished


def test_full_acceptance_commits_the_bonus_token():
    out, tokens, lengths = run([[5, 6, 7]], [[5, 6]])
    assert out.token_ids.tolist() == [[5, 6, 7]]
    assert (out.num_committed.item(), out.num_accepted.item(), lengths.item()) == (3, 2, 6)
    assert tokens[0, 3:6].tolist() == [5, 6, 7]


def test_first_mismatch_commits_the_recovered_token_and_nothing_behind_it():
    out, _, lengths = run([[5, 9, 7]], [[5, 6]])
    assert out.token_ids.tolist() == [[5, 9, NO_TOKEN]]
    assert (out.num_accepted.item(), lengths.item()) == (1, 5)


def test_an_agreement_behind_a_mismatch_does_not_count():
    out, _, _ = run([[5, 9, 7, 8]], [[4, 9, 7]])
    assert out.token_ids.tolist() == [[5, NO_TOKEN, NO_TOKEN, NO_TOKEN]]
    assert out.num_accepted.item() == 0


def test_no_draft_is_plain_decoding():
    out, _, _ = run([[5], [6]], [[], []], lengths=(3, 4), limits=(99, 99))
    assert out.token_ids.tolist() == [[5], [6]]


def test_end_of_sequence_inside_an_accepted_draft_ends_the_row():
    out, _, lengths = run([[5, 2, 7]], [[5, 2]], eos=(2, 3))
    assert out.token_ids.tolist() == [[5, 2, NO_TOKEN]]
    assert out.finished.item() and lengths.item() == 5 and out.num_accepted.item() == 2


def test_end_of_sequence_behind_the_first_mismatch_is_not_seen():
    out, _, _ = run([[5, 6, 2]], [[4, 6]], eos=(2,))
    assert not out.finished.item()


def test_limit_cuts_the_commit():
    out, _, lengths = run([[5, 6, 7]], [[5, 6]], limits=(5,))
    assert out.token_ids.tolist() == [[5, 6, NO_TOKEN]]
    assert out.finished.item() and lengths.item() == 5


@st.composite
def batches(draw):
    rows, k = draw(st.integers(1, 9)), draw(st.integers(0, 8))
    token = st.integers(0, 3)
    target = draw(st.lists(st.lists(token, min_size=k + 1, max_size=k + 1), min_size=rows, max_size=rows))
    draft = [[draw(st.sampled_from([t, t, t, 0, NO_TOKEN])) for t in row[:k]] for row in target]
    lengths = draw(st.lists(st.integers(1, 50), min_size=rows, max_size=rows))
    limits = [length + draw(st.integers(1, 12)) for length in lengths]
    return target, draft, draw(st.sampled_from([(), (2,), (2, 3)])), lengths, limits


def check_batch(batch, implementation, device="cpu"):
    target, draft, eos, lengths, limits = batch
    out, tokens, new_lengths = run(target, draft, eos, lengths, limits, implementation, device)
    for row in range(len(target)):
        committed, accepted, finished = commit_one(target[row], draft[row], eos, lengths[row], limits[row])
        assert [t for t in out.token_ids[row].tolist() if t != NO_TOKEN] == committed
        assert out.num_committed[row].item() == len(committed)
        assert out.num_accepted[row].item() == accepted
        assert out.finished[row].item() == finished
        assert out.report[row, NUM_DRAFTED] == sum(token != NO_TOKEN for token in draft[row])
        assert out.fault[row] == 0
        assert new_lengths[row].item() == lengths[row] + len(committed)
        assert tokens[row, lengths[row] : lengths[row] + len(committed)].tolist() == committed
        assert tokens[row, : lengths[row]].eq(77).all()


@given(batches())
@settings(max_examples=150, deadline=None)
def test_reference_equals_row_by_row(batch):
    check_batch(batch, "torch")


@pytest.mark.interpreter
@given(batches())
@settings(max_examples=30, deadline=None)
def test_kernel_in_the_interpreter_equals_row_by_row(batch):
    check_batch(batch, "triton")


@pytest.mark.gpu
@given(batches())
@settings(max_examples=100, deadline=None)
def test_kernel_on_a_gpu_equals_row_by_row(batch):
    check_batch(batch, "triton", "cuda")


def check_scores(implementation, device="cpu", dtype=torch.float32):
    """Vocabularies of one block and of several; ties within and across blocks, infinities, NaN at places that count and
    at others, scores of which the places are a part of a larger tensor, a lossy rule."""
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 7, 4096, 9001):
        for k in (0, 1, 4):
            rows = 6
            whole = torch.randint(-3, 3, (rows, k + 2, vocab), generator=generator).to(dtype)
            whole[0, 0] = -torch.inf
            whole[1, k, vocab // 2] = torch.inf
            whole[2, 0, vocab - 1] = torch.nan
            whole[3, k, -1:] = torch.nan
            scores = whole.to(device)[:, : k + 1]
            target = whole[:, : k + 1].float().nan_to_num(nan=9.0, posinf=8.0).numpy().argmax(-1)
            draft = torch.from_numpy(target[:, :k].copy())
            draft[3:4, :1] = (draft[3:4, :1] + 1) % max(vocab, 2)
            draft[4, k // 2 :] = NO_TOKEN
            passes = torch.zeros(rows, k, dtype=torch.bool)
            passes[5] = True
            draft[5] = 0
            given = [t.to(device) for t in (draft, torch.empty(0, dtype=torch.long))]
            tokens, lengths = torch.zeros(rows, 20, dtype=torch.long, device=device), torch.arange(1, 7, device=device)
            limits = lengths + 10
            done = greedy_commit(scores, *given, tokens, lengths, limits, passes.to(device), implementation)
            for row in range(rows):
                chosen = [*draft[5].tolist(), target[5, k]] if row == 5 else target[row].tolist()
                committed, accepted, _ = commit_one(chosen, [t for t in draft[row].tolist() if t >= 0], (), 0, 99)
                assert done.token_ids[row].tolist() == committed + [NO_TOKEN] * (k + 1 - len(committed)), (vocab, k)
                assert done.num_accepted[row].item() == accepted
            # The NaN of row 3 stands behind a rejected draft, where there is one.
            assert done.fault.tolist() == [0, 0, 1, int(k == 0), 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_takes_the_lowest_of_the_largest(dtype):
    check_scores("torch", dtype=dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_argmax_in_the_interpreter_equals_numpys(dtype):
    check_scores("triton", dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_argmax_on_a_gpu_equals_numpys(dtype):
    check_scores("triton", "cuda", dtype)
    check_scores("torch", "cuda", dtype)


def test_wrong_shapes_and_implementations_are_named():
    with pytest.raises(ValueError, match="need 2 places"):
        run([[5, 6, 7]], [[5]])
    with pytest.raises(ValueError, match="choose 'auto'"):
        run([[5]], [[]], implementation="cuda")
