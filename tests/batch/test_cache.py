"""The ragged cache against one cache per row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.batch.cache import RaggedCache
from specdec.batch.columns import Columns


@st.composite
def histories(draw):
    rows = draw(st.integers(1, 5))
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        width = draw(st.integers(1, 4))
        steps.append((width, draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))))
    return rows, steps


@given(histories())
@settings(max_examples=60, deadline=None)
def test_rewinding_is_not_advancing(history):
    """Write `width` tokens, keep a different number of them in every row, again and again."""
    rows, steps = history
    generator = torch.Generator().manual_seed(0)
    num_slots = sum(width for width, _ in steps) + 4
    cache = RaggedCache(1, rows, num_slots, torch.device("cpu"))
    truth = [torch.empty(2, 0, 3) for _ in range(rows)]  # [heads, kept tokens, dim]
    starts = torch.zeros(rows, dtype=torch.long)
    for width, kept in steps:
        keys = torch.randn(rows, 2, width, 3, generator=generator)
        positions = cache.begin(Columns.chain(starts, width), int(starts.max()) + width)
        assert torch.equal(positions, starts[:, None] + torch.arange(width))
        seen, values = cache.layers[0].update(keys, keys + 1)
        for row in range(rows):
            end = int(starts[row]) + width
            expected = torch.cat([truth[row], keys[row]], 1)
            assert torch.equal(seen[row, :, :end], expected)
            assert torch.equal(values[row, :, :end][:, -width:], keys[row] + 1)
            truth[row] = expected[:, : int(starts[row]) + kept[row]]
        starts = starts + torch.tensor(kept)


def test_kept_rows_move_with_their_keys():
    cache = RaggedCache(2, 4, 5, torch.device("cpu"))
    cache.begin(Columns.chain(torch.zeros(4, dtype=torch.long), 2), 2)
    keys = torch.randn(4, 1, 2, 3)
    for layer in cache.layers:
        layer.update(keys, keys)
    cache.keep_rows(torch.tensor([0, 3]))
    cache.begin(Columns.chain(torch.full((2,), 2), 1), 3)
    new = torch.randn(2, 1, 1, 3)
    seen, _ = cache.layers[1].update(new, new)
    assert torch.equal(seen, torch.cat([keys[[0, 3]], new], 2))


def test_memory_is_reported():
    cache = RaggedCache(1, 2, 8, torch.device("cpu"))
    assert cache.nbytes == 0
    cache.begin(Columns.chain(torch.zeros(2, dtype=torch.long), 1), 1)
    cache.layers[0].update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    assert cache.nbytes == 2 * (2 * 8 * 1 * 4) * 4
