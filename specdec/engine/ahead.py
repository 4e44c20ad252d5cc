"""The host reads one step late: before it waits for a step's report, it launches the next step's first forward.

Otherwise the device stands still from the end of a step until the host has read the report, settled it and launched
again: a twentieth of a plain step of a model of 8 billion parameters. Where the draft depends on the committed tokens
alone (plain decoding, prompt lookup), the target's forward is launched early, else the drafter's first one.

Only forwards are launched early. They write keys past the texts and nothing else, so the host still decides
everything: rows may stop, leave or move before anybody looks at the logits. One forward is wasted where an end of
sequence or a stopping criterion ends the last row. None is launched where all rows may end by their lengths, nor in
batches that rows join, or whose rows take turns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from specdec.batch.slots import to_device
from specdec.engine.decoding import Decoding
from specdec.engine.proposal import propose
from specdec.engine.target import Forward


class Early(NamedTuple):
    """The next step's forward, launched early. asked: draft tokens requested per row."""

    asked: int
    forward: Forward

    def fits(self, widths: np.ndarray, max_tokens: int) -> bool:
        """Whether the step asks for what was asked then. widths: [rows] integers, cut at `max_tokens`."""
        return bool((np.minimum(widths, max_tokens) == min(self.asked, max_tokens)).all())

    def of_rows(self, index: Tensor) -> Early:
        """For the rows that are left. index: [rows] int64 on the host."""
        device = self.forward.draft.token_ids.device
        return Early(self.asked, self.forward.of_rows(to_device(index.numpy(), device)))


def launch_early(decoding: Decoding, step_tokens: int) -> Early | None:
    """Launch the first forward of the next step while the current step's report is on its way.

    step_tokens: the most that the current step may commit per row.
    """
    if decoding.changes_rows or decoding.caps is not None:
        return None

    target, drafter, rows = decoding.target, decoding.drafter, decoding.rows
    width = decoding.policy.next_width(decoding.num_speculative_tokens)
    if width is None:
        return None

    width, grown = min(width, decoding.num_speculative_tokens), rows.grown(step_tokens)
    if grown.max_remaining <= (width > 0):  # all rows may have reached their limits, or have no room for drafts
        return None

    if width and not drafter.proposes_ahead:
        drafter.begin(grown)
        return None

    # A policy that sees tokens would be shown those of the next step before it has learned from this one.
    if not target.is_free or (width and decoding.policy.sees):
        return None

    draft = propose(drafter, grown, np.full(len(rows), width), width, target.vocab_size)
    # Rows may move before logits at extra queries are asked for, so such a draft waits.
    return None if draft.extra_queries is not None else Early(width, target.forward(grown, draft))
