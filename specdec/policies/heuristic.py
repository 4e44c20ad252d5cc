"""transformers' schedule: two more after a draft that was accepted in full, else one fewer."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.drafter import Drafter
from specdec.errors import ConfigError
from specdec.policies.fixed import DEFAULT_FIXED
from specdec.policy import LengthPolicy


class Heuristic(LengthPolicy):
    """transformers' schedule, row by row: two more after a draft that was accepted in full, else one fewer."""

    name = "heuristic"

    def __init__(self, first_tokens: int = DEFAULT_FIXED):
        """first_tokens: of each row's first draft."""
        if first_tokens < 1:
            raise ConfigError(f"first_tokens={first_tokens} must be at least 1")
        self.first_tokens = first_tokens

    def start(self, target: PreTrainedModel, drafter: Drafter, max_tokens: int) -> None:
        self._tokens: dict[int, int] = {}  # row id -> of its next draft
        self._asked: dict[int, int] = {}

    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        tokens = [min(self._tokens.get(row, self.first_tokens), max_tokens) for row in rows.row_ids.tolist()]
        self._asked = dict(zip(rows.row_ids.tolist(), tokens, strict=True))
        return np.array(tokens, dtype=np.int64)

    def row_ended(self, row_id: int) -> None:
        self._tokens.pop(row_id, None)

    def learn(self, report: StepReport) -> StepReport:
        if not report.is_prefill:
            for row, accepted in zip(report.row_ids.tolist(), report.num_accepted.tolist(), strict=True):
                asked = self._asked[row]
                self._tokens[row] = asked + 2 if accepted >= asked else max(asked - 1, 1)
        return report
