"""The base class of layouts, and layouts by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from specdec.batch.cache import RaggedCache
from specdec.batch.layout.grouped import next_group
from specdec.batch.layout.repad import RepadCache
from specdec.errors import ConfigError

if TYPE_CHECKING:
    from specdec.batch.slots import Slots


class Layout:
    """One instance serves the target and the draft model of one `generate` call.

    one_length: every forward sees rows that end in one column, so that models that support only one length per batch
    are served too. takes_turns: some rows may sit out a step.
    """

    name = "layout"
    one_length = False
    takes_turns = False

    def new_cache(self, num_layers: int, max_rows: int, num_slots: int, device: torch.device) -> RaggedCache:
        raise NotImplementedError

    def next_turn(self, cache: RaggedCache, slots: Slots) -> np.ndarray:
        """The slots of the residents that take part in the next step, [rows] int64."""
        return np.arange(slots.num_residents)


class Ragged(Layout):
    """Every row has its own length; a rewind means not advancing."""

    name = "ragged"

    def new_cache(self, num_layers: int, max_rows: int, num_slots: int, device: torch.device) -> RaggedCache:
        return RaggedCache(num_layers, max_rows, num_slots, device)


class Repad(Layout):
    """Unpad, append, repad (EQSPEC, "Batch Speculative Decoding Done Right")."""

    name = "repad"
    one_length = True

    def new_cache(self, num_layers: int, max_rows: int, num_slots: int, device: torch.device) -> RaggedCache:
        return RepadCache(num_layers, max_rows, num_slots, device)


class Grouped(Repad):
    """Rows of a pool take turns: each step takes `group_size` rows that end in one column if there are that many, and
    otherwise realigns the shortest rows (EXSPEC, the same paper). The pool is the batch, or in `generate_many` its
    `max_rows`; with a pool no larger than a group this is EQSPEC.
    """

    name = "grouped"
    takes_turns = True

    def __init__(self, group_size: int = 8):
        if group_size < 1:
            raise ConfigError(f"group_size={group_size} must be at least 1")
        self.group_size = group_size

    def next_turn(self, cache: RaggedCache, slots: Slots) -> np.ndarray:
        assert isinstance(cache, RepadCache)
        residents = slice(0, slots.num_residents)
        lengths = slots.host_lengths[residents]
        return next_group(cache.host_pads[residents] + lengths, lengths, self.group_size)


LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (Ragged, Repad, Grouped)}


def resolve_layout(layout: Layout | str) -> Layout:
    """A Layout from a Layout or its name. Raises ConfigError, listing the names, for anything else."""
    if isinstance(layout, Layout):
        return layout
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r} is unknown; choose {', '.join(map(repr, LAYOUTS))}")
    return LAYOUTS[layout]()
