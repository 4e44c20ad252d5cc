"""What a generation returns: transformers' output with the statistics of the speculation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.engine.job import Job
from specdec.engine.metrics import Speculation


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the statistics of the speculation."""

    speculation: Speculation | None = None


def assembled(jobs: Sequence[Job], input_ids: Tensor, pad_token_id: int) -> Tensor:
    """The prompts as they came in, each followed by its new tokens, padded on the right: [rows, columns + longest]."""
    new_ids = torch.full((len(jobs), max(len(job.new_ids) for job in jobs)), pad_token_id)
    for row, job in enumerate(jobs):
        new_ids[row, : len(job.new_ids)] = torch.tensor(job.new_ids, dtype=torch.long)
    return torch.cat([input_ids.long(), new_ids.to(input_ids.device)], 1)


def per_token(rows: Sequence[list[Tensor]], pad_token_id: int) -> tuple[Tensor, ...]:
    """transformers' layout of scores or logits: one [rows, vocab] float32 tensor per new token of the longest row.

    rows: of each row, [vocab] per new token. After a row ends, its scores are one-hot on the pad token (0 for it, -inf
    for the others), so that the log-probabilities of its tokens, padding included, add up to those of the row.
    """
    like = next((tensor for row in rows for tensor in row), None)
    if like is None:
        return ()
    padding = torch.full_like(like, -torch.inf)
    if 0 <= pad_token_id < len(like):
        padding[pad_token_id] = 0
    longest = max(map(len, rows))
    return tuple(torch.stack([row[place] if place < len(row) else padding for row in rows]) for place in range(longest))
