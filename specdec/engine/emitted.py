"""`output_scores` and `output_logits`: the scores each emitted token was chosen from, in transformers' layout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.batch.report import StepReport
from specdec.batch.rows import Rows


class Emitted:
    """One [rows, vocab] float32 tensor per new token; only scores of committed tokens are kept, copied row by row.

    After a row ends, its scores are one-hot on the pad token (0 for that token, -inf for all others), so that the
    log-probabilities of a row's tokens, padding included, add up to that of the row.
    """

    def __init__(self, num_rows: int, pad_token_id: int):
        self.num_rows, self.pad_token_id = num_rows, pad_token_id
        self.steps: list[Tensor] = []

    def add(self, row_ids: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        """values: [n, vocab] float, after places[i] new tokens of row row_ids[i]; both [n] int64 on the host."""
        while len(self.steps) <= places.max():
            self.steps.append(self._padding(values))
        for place in np.unique(places):
            here = np.flatnonzero(places == place)
            rows, chosen = (torch.from_numpy(index).to(values.device) for index in (row_ids[here], here))
            self.steps[place][rows] = values[chosen].float()

    def finish(self, num_new_tokens: np.ndarray) -> tuple[Tensor, ...]:
        """One tensor per new token of the longest row. num_new_tokens: [rows], of the caller's batch."""
        steps = self.steps[: int(num_new_tokens.max())]
        for place, values in enumerate(steps):
            # A stopping criterion may have undone tokens that a step had committed.
            over = torch.from_numpy(np.flatnonzero(num_new_tokens <= place)).to(values.device)
            values[over] = self._padding(values)[: len(over)]
        return tuple(steps)

    def _padding(self, like: Tensor) -> Tensor:
        vocab = like.shape[1]
        values = torch.full((self.num_rows, vocab), -torch.inf, device=like.device)
        if 0 <= self.pad_token_id < vocab:
            values[:, self.pad_token_id] = 0
        return values


def committed(rows: Rows, report: StepReport) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(slots, columns, places): for every token that a step committed, its slot and column in [rows, k + 1] tensors and
    the number of new tokens of its row before it; [committed tokens] int64 each."""
    slots, columns = np.nonzero(np.arange(report.token_ids.shape[1]) < report.num_committed[:, None])
    return slots, columns, (rows.num_new_tokens - report.num_committed)[slots] + columns
