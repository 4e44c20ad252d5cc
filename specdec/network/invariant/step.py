"""What the columns of a batch-invariant forward see, as its kernels take it; one for all layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from specdec.batch.columns import Columns
from specdec.kernels.attention.ragged_attention import Tree


class Step(NamedTuple):
    """What the layers of one forward share.

    starts: [rows] int64, the slot that each row's first column is written to. used_slots: slots that attention looks
    at. spans: per sliding window (None = full attention), [rows, width, 3] int32, as `ragged_attention` takes them.
    places: [rows, width] int64, the position of each column; None if these are its slot. trees: per window what hides
    slots within the spans; empty where nothing does.
    """

    starts: Tensor
    used_slots: int
    spans: dict[int | None, Tensor]
    places: Tensor | None = None
    trees: dict[int | None, Tree] = {}  # noqa: RUF012 - never written to


def step_of(
    columns: Columns, used_slots: int, windows: Iterable[int | None], num_text_slots: int | None = None
) -> Step:
    """num_text_slots: rows that start there or later pad a captured step and see nothing; None where none does."""
    spans = {window: columns.spans(used_slots, window, num_text_slots) for window in windows}
    if columns.is_chain:
        return Step(columns.starts, used_slots, spans)
    trees = {window: Tree(columns.committed, columns.bits(window)) for window in windows}
    return Step(columns.starts, used_slots, spans, columns.places.contiguous(), trees)
