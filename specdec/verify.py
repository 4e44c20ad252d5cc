"""From the target's scores and a draft to committed tokens: by argmax, or by samples of the target's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.drafter import Draft
from specdec.kernels.greedy_commit import Committed, greedy_commit
from specdec.kernels.sampled_commit import sampled_commit
from specdec.random_streams import Purpose, RowStreams
from specdec.rows import Rows


class Verification(Protocol):
    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> tuple[Committed, Tensor]:
        """scores: [rows, k + 1, vocab], processed logits. Appends to `rows`.

        Returns what was committed, and [rows] bool: a row's scores hold a NaN, and what it committed means nothing.
        """


class GreedyVerification:
    """Commits what greedy decoding of the target writes."""

    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> tuple[Committed, Tensor]:
        best, target_ids = scores.max(-1)  # a NaN anywhere is the maximum
        nan = torch.isnan(best).any(1)
        return greedy_commit(target_ids, draft.token_ids, eos_ids, rows.token_ids, rows.lengths, rows.limits), nan


@dataclass(frozen=True)
class SampledVerification:
    """Commits samples of the target's distribution, whatever the drafter's.

    method: "token" (rejection sampling) or "block" (block verification), see `kernels/sampled_commit.py`.
    """

    streams: RowStreams
    method: str = "token"

    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> tuple[Committed, Tensor]:
        probs = torch.softmax(scores, -1, dtype=torch.float32)
        nan = torch.isnan(probs[..., 0]).any(1)  # one NaN, or nothing but -inf, makes all of a softmax NaN
        uniforms = self.streams.uniforms(rows.row_ids, rows.host_lengths, scores.shape[1], Purpose.VERIFY)
        done = sampled_commit(
            probs,
            draft.token_ids,
            draft.probs,
            uniforms,
            eos_ids,
            rows.token_ids,
            rows.lengths,
            rows.limits,
            self.method,
        )
        return done, nan
