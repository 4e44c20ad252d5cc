"""The logits of a causal LM over given texts, a piece at a time, never all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.check.referee import float64_throughout, only_last
from specdec.network.base import vocab_size_of
from specdec.network.model_cache import cache_argument, returned_cache

TOKENS_PER_FORWARD = {"cpu": 2048}
TOKENS_PER_FORWARD_ELSEWHERE = 16384
LOGITS_BYTES = 2**28  # of one piece


class Piece(NamedTuple):
    """logits: [rows, width, vocab], at columns first_column .. of the sequences `indices`, which may be shorter."""

    indices: list[int]
    first_column: int
    logits: Tensor


@torch.no_grad()
def pieces(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    plan_for: PreTrainedModel | None = None,
) -> Iterator[Piece]:
    """The model's logits at every column >= starts[i] - 1 of sequence i, and at some before.

    sequences, starts: token ids, and how many of them are prompt (>= 1). The logits at column c predict the token at
    c + 1. Rows are padded on the right, which a causal model cannot see.
    plan_for: cut the work as for that model, so that two models can be walked side by side.
    """
    plan = plan_for or model
    vocab_size = vocab_size_of(plan)
    for indices in groups([len(sequence) for sequence in sequences], tokens_per_forward(plan.device)):
        num_rows, longest = len(indices), len(sequences[indices[0]])
        token_ids = torch.zeros(num_rows, longest, dtype=torch.long)
        for row, index in enumerate(indices):
            token_ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
        needed = min(starts[index] for index in indices) - 1
        # Four bytes each: the largest dtype but float64, whose copy of a model is there for few rows.
        width = max(LOGITS_BYTES // (4 * num_rows * vocab_size), 1)
        cuts = cut_points(
            longest, needed if only_last(plan, 1) else 0, width, tokens_per_forward(plan.device) // num_rows
        )
        cache = None
        for begin, end in pairwise(cuts):
            kept = end - max(begin, needed)
            with float64_throughout(model):
                output = model(
                    input_ids=token_ids[:, begin:end].to(model.device),
                    use_cache=len(cuts) > 2,
                    **cache_argument(model, cache),
                    **only_last(model, max(kept, 1)),
                )
            cache = returned_cache(output) if len(cuts) > 2 else None
            if kept > 0:
                yield Piece(indices, end - kept, output.logits[:, -kept:])


def tokens_per_forward(device: torch.device) -> int:
    return TOKENS_PER_FORWARD.get(device.type, TOKENS_PER_FORWARD_ELSEWHERE)


def groups(lengths: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Indices of similar lengths, longest first, each group within `num_tokens` padded tokens where one row is."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    found: list[list[int]] = []
    while order:
        count = max(num_tokens // lengths[order[0]], 1)
        found.append(order[:count])
        order = order[count:]
    return found


def cut_points(longest: int, needed: int, logits_width: int, tokens_width: int) -> list[int]:
    """Where to cut columns 0 .. longest: pieces before column `needed` give no logits and may be wider.

    >>> cut_points(10, 6, 3, 100)
    [0, 9, 10]
    >>> cut_points(10, 0, 4, 100)
    [0, 4, 8, 10]
    """
    cuts, width = [0], max(tokens_width, 1)
    while cuts[-1] < longest:
        with_logits = max(cuts[-1], needed) + logits_width
        cuts.append(min(cuts[-1] + width, with_logits, longest))
    return cuts
