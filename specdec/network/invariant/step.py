"""Where the columns of a batch-invariant forward stand and what they see, for its layers to share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.batch.branches import Branches
from specdec.kernels.attention.ragged_attention import Tree

Windows = Iterable[int | None]


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


def text_step(starts: Tensor, width: int, used_slots: int, num_text_slots: int, windows: Windows) -> Step:
    """Every column sees the text up to itself; padding, which starts behind `num_text_slots`, sees nothing."""
    position = starts[:, None] + torch.arange(width, device=starts.device)
    spans = {window: spans_of(position, position, used_slots, position < num_text_slots, window) for window in windows}
    return Step(starts, used_slots, spans)


def tree_step(branches: Branches, used_slots: int, num_text_slots: int, windows: Windows) -> Step:
    """The text and the branches behind it in one forward of at most TREE_SLOTS columns."""
    starts, slots, places = branches.slots[:, 0].contiguous(), branches.slots, branches.places
    is_text = (starts < num_text_slots)[:, None]
    own = slots[:, None]  # of each column as a key, [rows, 1, keys]
    seen = (own <= branches.ends[..., None]) | ((own >= branches.begins[..., None]) & (own <= slots[..., None]))
    spans, trees = {}, {}
    for window in windows:
        spans[window] = spans_of(places, slots, used_slots, is_text, window)
        trees[window] = Tree(starts, packed(within(seen, places, window)))
    return Step(starts, used_slots, spans, places, trees)


def branch_step(branches: Branches, used_slots: int, windows: Windows) -> Step:
    """The only branch of each row in a forward of its own, behind text that is cached: branch columns alone.

    What hides the rest of the step's text is counted from the first slot that the branch does not see.
    """
    slots, places = branches.slots[:, branches.num_tokens :], branches.places[:, branches.num_tokens :]
    starts, hidden_from = slots[:, 0].contiguous(), branches.ends[:, -1] + 1
    seen = slots[:, None] <= slots[..., None]
    spans, trees = {}, {}
    for window in windows:
        spans[window] = spans_of(places, slots, used_slots, torch.ones_like(seen[:, :, 0]), window)
        trees[window] = Tree(hidden_from, packed(within(seen, places, window)) << (starts - hidden_from)[:, None])
    return Step(starts, used_slots, spans, places.contiguous(), trees)


def spans_of(places: Tensor, slots: Tensor, used_slots: int, sees: Tensor, window: int | None) -> Tensor:
    """[rows, width, 3] int32 of columns at these places, written to these slots; empty where `sees` is False."""
    end = (slots + 1).clamp(max=used_slots).int()
    low = torch.zeros_like(end)
    if window is not None:
        low = torch.minimum((places + 1 - window).clamp(min=0).int(), end)
    return torch.stack([torch.where(sees, low, end), end, torch.zeros_like(end)], -1)


def within(seen: Tensor, places: Tensor, window: int | None) -> Tensor:
    """seen: [rows, width, keys] bool, less what a window hides; it counts places."""
    return seen if window is None else seen & (places[..., None] - places[:, None] < window)


def packed(seen: Tensor) -> Tensor:
    """[rows, width, keys] bool -> [rows, width] int64, key i as bit i."""
    bits = torch.arange(seen.shape[-1], device=seen.device)
    return (seen.long() << bits).sum(-1)
