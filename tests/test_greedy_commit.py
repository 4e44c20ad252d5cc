"""Greedy verification and commit: by hand, against a per-row reference, and the kernel against the torch reference."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.greedy_commit import NO_TOKEN, greedy_commit, triton

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def run(target, draft, eos=(), lengths=(3,), limits=(99,), implementation="torch", device="cpu"):
    target, draft = torch.tensor(target, device=device), torch.tensor(draft, dtype=torch.long, device=device)
    tokens = torch.full((len(target), 120), 77, device=device)
    lengths = torch.tensor(lengths, device=device)
    out = greedy_commit(
        target, draft.reshape(len(target), -1), torch.tensor(eos, dtype=torch.long, device=device), tokens, lengths,
        torch.tensor(limits, device=device), implementation,
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
        assert new_lengths[row].item() == lengths[row] + len(committed)
        assert tokens[row, lengths[row] : lengths[row] + len(committed)].tolist() == committed
        assert tokens[row, : lengths[row]].eq(77).all()


@given(batches())
@settings(max_examples=150, deadline=None)
def test_reference_equals_row_by_row(batch):
    check_batch(batch, "torch")


@pytest.mark.skipif(not INTERPRET or triton is None, reason="needs TRITON_INTERPRET=1")
@given(batches())
@settings(max_examples=30, deadline=None)
def test_kernel_in_the_interpreter_equals_row_by_row(batch):
    check_batch(batch, "triton")


@pytest.mark.gpu
@given(batches())
@settings(max_examples=100, deadline=None)
def test_kernel_on_a_gpu_equals_row_by_row(batch):
    check_batch(batch, "triton", "cuda")


def test_interpreter_run(run_in_subprocess):
    """The interpreter must be chosen before triton is imported, hence another process."""
    run_in_subprocess("tests/test_greedy_commit.py", "-k", "interpreter_equals", TRITON_INTERPRET="1")


def test_wrong_shapes_and_implementations_are_named():
    with pytest.raises(ValueError, match="3 columns; 1 drafts"):
        run([[5, 6, 7]], [[5]])
    with pytest.raises(ValueError, match="choose 'auto'"):
        run([[5]], [[]], implementation="cuda")
