"""A request's logits processors at many positions of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.generation import LogitsProcessor
from transformers.generation import logits_process as hf

from specdec.kernels.commit.greedy_commit import NO_TOKEN
from specdec.verify.plan import BLIND, ENDING, OCCURRENCE, Plan

Raised = dict[int, tuple[int, Exception]]  # see `Processors.raised`
# The stateful processors to ask about a place: (row id, column, whether the text there will be the row's) -> in order.
Asked = Callable[[int, int, bool], Sequence[LogitsProcessor]]


class Positions(NamedTuple):
    """Where scores are asked for. texts: [positions, columns] int64. ends: [positions], position i follows the first
    ends[i] tokens of texts[i]. row_ids: [positions], rows of the caller's batch. draft_ids: [rows, width - 1], the
    tokens between the width positions of a row, which stand together."""

    texts: Tensor
    ends: np.ndarray
    row_ids: np.ndarray
    draft_ids: Tensor

    def padded(self, pad_with: int | None) -> Tensor:
        """The texts at equal length: padded on the left with `pad_with`, or on the right with their own first token."""
        longest = int(self.ends.max())
        ends = torch.from_numpy(self.ends).to(self.texts.device)[:, None]
        place = torch.arange(longest, device=self.texts.device)
        if pad_with is None:
            return torch.where(place < ends, self.texts[:, :longest], self.texts[:, :1])
        source = place - (longest - ends)
        return self.texts.gather(1, source.clamp(min=0)).masked_fill(source < 0, pad_with)


def processed_by(
    plan: Plan, positions: Positions, scores: Tensor, raised: Raised, asked: Asked, argmax_decides: bool
) -> Tensor:
    """scores: [positions, vocab] float32, of rows that share the plan. raised: filled in.

    argmax_decides: whether a row commits the argmax of its processed scores at every position that it gets to.
    """
    processed = scores
    for processor in plan.processors[: plan.num_stateless]:
        try:
            processed = apply_processor(processor, positions, processed, raised, plan.eos_token_ids)
        except Exception as error:  # a built-in one, asked about all rows at once
            raised |= dict.fromkeys(positions.row_ids.tolist(), (0, error))
            return scores
    if plan.in_order:
        processed = one_by_one(asked, positions, processed, raised, plan.eos_token_ids, argmax_decides)
    return processed


def apply_processor(
    processor: LogitsProcessor, positions: Positions, scores: Tensor, raised: Raised, eos_token_ids: Sequence[int]
) -> Tensor:
    """scores: [positions, vocab] float32, as the processors before left them. raised: filled in."""
    kind = type(processor)
    if kind in BLIND:
        return processor(positions.texts, scores)
    if kind in OCCURRENCE and processor.prompt_ignore_length is None:
        return processor(positions.padded(None), scores)
    if kind in ENDING and getattr(processor, "ngram_size", 2) > 1:
        return processor(positions.padded(NO_TOKEN), scores)
    return one_by_one(lambda row, *_: [for_row(processor, row)], positions, scores, raised, eos_token_ids)


def one_by_one(
    asked: Asked,
    positions: Positions,
    scores: Tensor,
    raised: Raised,
    eos_token_ids: Sequence[int],
    argmax_decides: bool = False,
) -> Tensor:
    """Ask about each position of each row in turn, as far as the row's draft can be accepted.

    Nothing is asked after a token that was not drafted, that the processors themselves forbid, or that ends the row:
    plain decoding could never reach such a text, and a processor may not know what to say. Where one raises, the row is
    not asked any further, and keeps the scores that it had.
    """
    drafts = positions.draft_ids.tolist()
    width = positions.draft_ids.shape[1] + 1
    out = scores.clone()
    for slot, draft in enumerate(drafts):
        row = int(positions.row_ids[slot * width])
        for column in range(width):
            place = slot * width + column
            if row in raised and raised[row][0] <= column:
                break
            if column and not can_follow(draft[column - 1], out[place - 1], eos_token_ids, argmax_decides):
                break
            text, own = positions.texts[place : place + 1, : positions.ends[place]], scores[place : place + 1]
            try:
                for processor in asked(row, column, argmax_decides):
                    own = processor(text, own)
                out[place] = own[0]
            except Exception as error:  # of the user's code: it ends this row and no other, if it gets here
                raised[row] = column, error
                break
    return out


def can_follow(token: int, scores: Tensor, eos_token_ids: Sequence[int], argmax_decides: bool) -> bool:
    """Whether a row can go on after a draft token. scores: [vocab], from which the row's own token is chosen there."""
    if token < 0 or token in eos_token_ids:
        return False
    return int(scores.argmax()) == token if argmax_decides else bool(scores[token] != float("-inf"))


def for_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """`PrefixConstrained` is the one processor that is told which row it sees; alone, every row would be number 0."""
    if type(processor) is not hf.PrefixConstrainedLogitsProcessor:
        return processor
    allowed = processor._prefix_allowed_tokens_fn
    return hf.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
