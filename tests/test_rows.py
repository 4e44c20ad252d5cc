"""Rows: order, retirement, cutting."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.rows import Rows
from specdec.slots import fill_holes


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
