"""Rows: order, retirement, cutting."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.batch.rows import Rows
from specdec.batch.slots import fill_holes
from specdec.kernels.commit.greedy_commit import greedy_commit


def make(lengths, max_new_tokens=5):
    prompts = [torch.arange(length) + 10 * row for row, length in enumerate(lengths)]
    return Rows(prompts, max_new_tokens, spare=3, device=torch.device("cpu")), prompts


def test_rows_come_in_order_of_falling_length():
    rows, prompts = make([2, 5, 3, 5])
    assert rows.row_ids.tolist() == [1, 3, 2, 0]
    assert rows.host_lengths.tolist() == [5, 5, 3, 2]
    for slot, row in enumerate(rows.row_ids):
        assert rows.token_ids[slot, : rows.lengths[slot]].tolist() == prompts[row].tolist()
    assert rows.limits.tolist() == [10, 10, 8, 7]
    assert rows.last_tokens(2).tolist() == [prompts[row][-2:].tolist() for row in rows.row_ids]


@given(st.lists(st.booleans(), max_size=12))
def test_holes_are_filled_from_the_end(finished):
    finished = np.array(finished, dtype=bool)
    keep = fill_holes(finished)
    assert sorted(keep.tolist()) == np.flatnonzero(~finished).tolist()
    for slot, source in enumerate(keep):
        assert source == slot or finished[slot], "a kept row moved without need"


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_retired_rows_keep_their_place_in_the_output(lengths, data):
    rows, prompts = make(lengths)
    while len(rows):
        finished = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))), dtype=bool)
        before = [rows.token_ids[slot].tolist() for slot in range(len(rows))]
        if not finished.any():
            finished[0] = True
        index = rows.retire(finished)
        assert [before[i] for i in index] == [rows.token_ids[slot].tolist() for slot in range(len(rows))]
    for row, prompt in enumerate(prompts):
        assert rows.output_lengths[row] == len(prompt)
        assert rows.output_ids[row, : len(prompt)].tolist() == prompt.tolist()


def commit(rows, draft, target):
    """One step; draft: [rows, k], target: [rows, k + 1], what the target writes behind each place."""
    scores = torch.nn.functional.one_hot(torch.tensor(target), 100).float()
    no_ends = torch.empty(0, dtype=torch.long)
    draft_ids = torch.tensor(draft, dtype=torch.long)
    return rows.reading(greedy_commit(scores, draft_ids, no_ends, rows.token_ids, rows.lengths, rows.limits))()


def check_newest(rows):
    places, tokens = rows.newest()
    assert places.tolist() == (rows.lengths - 1).tolist() == (rows.host_lengths - 1).tolist()
    assert tokens.tolist() == rows.last_tokens(1).tolist()


def test_the_newest_tokens_follow_whatever_happens_to_the_rows():
    """They are computed with the report, before anyone knows which rows leave, move or are cut."""
    rows, _ = make([4, 3, 2], max_new_tokens=50)
    check_newest(rows)
    report = commit(rows, [[7, 8], [7, 8], [7, 8]], [[7, 8, 9], [7, 6, 9], [5, 8, 9]])
    assert rows.newest()[1].tolist() == [[9], [6], [5]]
    check_newest(rows)
    rows.cut(report, np.array([1, 2, 1]), report.finished)
    assert rows.newest()[1].tolist() == [[7], [6], [5]]
    check_newest(rows)
    commit(rows, [[1], [1], [1]], [[1, 2], [3, 4], [1, 6]])
    rows.slots.arrange(np.array([2, 1, 0]))
    rows.take(3)
    assert rows.newest()[1].tolist() == [[6], [3], [2]]
    rows.retire(np.array([True, False, False]))
    check_newest(rows)
    assert rows.newest()[1].tolist() == [[2], [3]]


def test_a_row_in_the_place_of_another_has_its_own_newest_token():
    """The last row gives up its slot and a newcomer takes it between two steps, so that there are as many as before."""
    rows, _ = make([3, 3], max_new_tokens=20)
    commit(rows, [[], []], [[50], [60]])
    slots = rows.slots
    slots.remove(np.array([1]))
    slots.add([torch.tensor([4, 5])], np.array([7]), np.array([2]), np.array([9]))
    slots.num_residents, slots.num_newcomers = 2, 0
    rows.take(2)
    assert rows.newest()[1].tolist() == [[50], [5]]
    check_newest(rows)
