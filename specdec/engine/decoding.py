"""The parts of one generation, put together once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from specdec.batch.rows import Rows
from specdec.drafter import Drafter
from specdec.engine.hooks import Hooks
from specdec.engine.metrics import Speculation
from specdec.engine.schedule import Schedule
from specdec.engine.target import Target
from specdec.policy import LengthPolicy, widths_of


@dataclass(frozen=True)
class Decoding:
    """The parts of one generation.

    rows: those that take part in a step; the schedule says which join. num_speculative_tokens: the most draft tokens
    per row and step. statistics: filled in.
    """

    target: Target
    drafter: Drafter
    policy: LengthPolicy
    schedule: Schedule
    rows: Rows
    hooks: Hooks
    num_speculative_tokens: int
    statistics: Speculation = field(default_factory=Speculation)

    @property
    def changes_rows(self) -> bool:
        """Whether rows join, or take turns."""
        return self.target.layout.takes_turns or self.schedule.takes_newcomers

    def widths(self, max_tokens: int) -> np.ndarray:
        """The most draft tokens of each row in this step, [rows] integers: the policy's, within the row's own cap."""
        widths, caps = widths_of(self.policy, self.rows, max_tokens), self.caps
        return widths if caps is None else np.minimum(widths, caps)

    @property
    def caps(self) -> np.ndarray | None:
        """The rows' own caps, [rows] int64; None where no row has one."""
        jobs = self.schedule.running
        caps = [jobs[row].max_draft_tokens for row in self.rows.row_ids.tolist()]
        if not any(cap is not None for cap in caps):
            return None
        return np.array([self.num_speculative_tokens if cap is None else cap for cap in caps])
