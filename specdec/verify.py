"""From the target's scores and a draft to committed tokens: by argmax, or by samples of the target's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.drafter import Draft
from specdec.kernels.distribution import NO_TRUNCATION, Truncation, distribution_of
from specdec.kernels.greedy_commit import Committed, greedy_commit
from specdec.kernels.sampled_commit import sampled_commit
from specdec.random_streams import Purpose, RowStreams
from specdec.rows import Rows

BAD_SCORES = 1  # the target's scores hold a NaN
BAD_DRAFT = 2  # the drafter's probabilities are no distribution


class Verification(Protocol):
    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> tuple[Committed, Tensor]:
        """scores: [rows, k + 1, vocab], processed logits. Appends to `rows`.

        Returns what was committed, and [rows] int64: 0, or BAD_SCORES + BAD_DRAFT where these hold and what the row
        committed means nothing.
        """


class GreedyVerification:
    """Commits what greedy decoding of the target writes."""

    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> tuple[Committed, Tensor]:
        best, target_ids = scores.max(-1)  # a NaN anywhere is the maximum
        done = greedy_commit(target_ids, draft.token_ids, eos_ids, rows.token_ids, rows.lengths, rows.limits)
        return done, nan_within(torch.isnan(best), done) * BAD_SCORES


@dataclass(frozen=True)
class SampledVerification:
    """Commits samples of the target's distribution, whatever the drafter's.

    method: "token" (rejection sampling) or "block" (block verification), see `kernels/sampled_commit.py`.
    """

    streams: RowStreams
    truncation: Truncation = NO_TRUNCATION
    method: str = "token"

    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> tuple[Committed, Tensor]:
        target = distribution_of(scores, self.truncation)
        uniforms = self.streams.uniforms(rows.row_ids, rows.host_lengths, scores.shape[1], Purpose.VERIFY)
        done = sampled_commit(
            target,
            draft.token_ids,
            draft.probs,
            uniforms,
            eos_ids,
            rows.token_ids,
            rows.lengths,
            rows.limits,
            self.method,
        )
        fault = nan_within(target.mass.isnan(), done) * BAD_SCORES
        if draft.probs is not None:
            # Half precision sums to 1 within a percent; NaN compares false.
            sums_to_one = (draft.probs.sum(-1, dtype=torch.float32) - 1).abs() < 0.02
            fault = fault + ((draft.token_ids >= 0) & ~sums_to_one).any(1) * BAD_DRAFT
        return done, fault


def nan_within(is_nan: Tensor, done: Committed) -> Tensor:
    """[rows] bool: a NaN at a place that counts. Behind a rejected draft anything may stand. is_nan: [rows, k + 1]."""
    column = torch.arange(is_nan.shape[1], device=is_nan.device)
    return (is_nan & (column <= done.num_accepted[:, None])).any(1)
