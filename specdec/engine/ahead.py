"""The host reads one step late: before it waits for a step's report, it launches the next step's first forward.

Otherwise the device stands still from the end of a step until the host has read the report, settled it and launched
again, which is a twentieth of a plain step of a model of 8 billion parameters. What is launched ahead is the target's
forward where the draft depends on the committed tokens alone (plain decoding, prompt lookup), else the drafter's first.

Only forwards are: they write keys behind the texts and nothing else. So the host still decides everything, and rows may
stop, leave or move before anybody looks at the logits. What is lost is one forward where an end of sequence or a
stopping criterion ends the last row; where all rows may end by their lengths none is launched. Batches that rows join,
or whose rows take turns, wait for each report (`decode.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from specdec.batch.rows import Rows
from specdec.drafter import Drafter
from specdec.engine.proposal import propose
from specdec.engine.target import Target
from specdec.policies.length import LengthPolicy


def next_forward(
    target: Target, drafter: Drafter, policy: LengthPolicy, rows: Rows, num_speculative_tokens: int
) -> Callable[[], None]:
    """To be called while a report is on its way (`Rows.read`), of rows that all take part in the next step."""

    def launch() -> None:
        width = policy.next_width(num_speculative_tokens)
        # All rows may have reached their limits, or have no room for drafts.
        if width is None or rows.max_remaining <= rows.num_unread + (width > 0):
            return
        width = min(width, num_speculative_tokens)
        if width and not drafter.proposes_ahead:
            drafter.begin(rows)
        # A policy that sees tokens would be shown those of the next step before it has learned from this one.
        elif target.can_begin and not (width and drafter.length_policy):
            widths = np.full(len(rows), width)
            target.begin(rows, propose(drafter, rows, widths, width, target.vocab_size), width)

    return launch
