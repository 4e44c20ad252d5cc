"""transformers' logits processors at every verified position, each seeing that row's own tokens up to there.

A processor was written for one new position per row and rows of one length. Here it meets [rows, k + 1] positions of
rows of any length. Processors that do not look at the tokens take all positions at once. Those that only ask which
tokens occur, or how the text ends, take all positions with suitable padding. Every other one, custom ones included, is
asked once per position with the unpadded tokens of the row, as if it were alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec.batch.rows import Rows
from specdec.kernels.commit.greedy_commit import NO_TOKEN
from specdec.kernels.commit.truncation import GREEDY, Truncation, Truncations

# Scores of a position depend on that position's scores alone.
BLIND = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.SuppressTokensLogitsProcessor,
)
OCCURRENCE = (hf.RepetitionPenaltyLogitsProcessor,)  # which tokens occur: padding by repeating one of them is harmless
ENDING = (hf.NoRepeatNGramLogitsProcessor, hf.NoBadWordsLogitsProcessor, hf.SequenceBiasLogitsProcessor)


@dataclass(frozen=True, eq=False)
class Plan:
    """How the scores of one request's positions are processed. Rows that share a plan are processed together.

    processors: all but the truncation. truncation: temperature, top-k, top-p and min-p, at temperature 0 for greedy
        rows. They are left to the code that makes a distribution of the scores, which is far cheaper than transformers'
        own `warpers` of the same values.
    min_new_tokens: no end of sequence before a row has that many. eos_token_ids: what ends the row, and what is
        forbidden until then.
    """

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    truncation: Truncation = GREEDY
    warpers: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()

    @property
    def names_tokens(self) -> bool:
        """Whether scores of particular tokens are read or changed, so that each must have one."""
        return len(self.processors) > 0 or self.min_new_tokens > 0


class Processors:
    """The plans of all rows of a generation, and what they make of a step's logits.

    raised: row id -> (column, exception) of the step that is being verified: the row's processors raised it when they
        were asked about the token after `column` draft tokens. It counts only if these are accepted.
    """

    def __init__(self) -> None:
        self.raised: dict[int, tuple[int, Exception]] = {}
        self._plans: dict[int, Plan] = {}
        self._num_naming = self._num_sampled = 0  # rows whose plans name tokens; rows that are sampled
        self._truncations: Truncations | None = None
        self._truncated: list[int] = []  # the row ids that these belong to
        self._eos: Tensor | None = None
        self._ended: list[int] = []

    def add(self, row_id: int, plan: Plan) -> None:
        self._plans[row_id] = plan
        self._num_naming += plan.names_tokens
        self._num_sampled += not plan.truncation.is_greedy

    def drop(self, row_id: int) -> None:
        plan = self._plans.pop(row_id)
        self._num_naming -= plan.names_tokens
        self._num_sampled -= not plan.truncation.is_greedy

    def plan_of(self, row_id: int) -> Plan:
        return self._plans[row_id]

    @property
    def name_tokens(self) -> bool:
        """Whether any row's scores of particular tokens are read or changed, so that each must have one."""
        return self._num_naming > 0

    def any_sampled(self, rows: Rows) -> bool:
        """Whether any of these rows is sampled."""
        if self._num_sampled in (0, len(self._plans)):
            return self._num_sampled > 0
        return any(not self._plans[row].truncation.is_greedy for row in rows.row_ids.tolist())

    def truncations(self, rows: Rows) -> Truncations:
        """The truncation of each of these rows."""
        row_ids = rows.row_ids.tolist()
        if self._truncations is None or row_ids != self._truncated:
            each = [self._plans[row].truncation for row in row_ids]
            self._truncations, self._truncated = Truncations.of(each, rows.device), row_ids
        return self._truncations

    def eos_ids(self, rows: Rows) -> Tensor:
        """What ends these rows: [num_eos] int64 if all agree, else [rows, num_eos], filled up with NO_TOKEN."""
        row_ids = rows.row_ids.tolist()
        if self._eos is None or row_ids != self._ended:
            each = [self._plans[row].eos_token_ids for row in row_ids]
            width = max(map(len, each), default=0)
            padded = [[*ids, *[NO_TOKEN] * (width - len(ids))] for ids in each]
            is_shared = len(set(each)) <= 1
            values = padded[0] if is_shared and padded else padded
            if not is_shared or self._eos is None or self._eos.tolist() != values:
                self._eos = torch.tensor(values, dtype=torch.long, device=rows.device)
            self._ended = row_ids
        return self._eos

    def __call__(self, rows: Rows, draft_ids: Tensor, logits: Tensor) -> Tensor:
        """Processed scores of a step to verify, [rows, k + 1, vocab], of the raw logits after 0 .. k draft tokens.

        draft_ids: [rows, k] int64. Scores after tokens that a row did not draft mean nothing.
        Scores are float32 if there is anything to process, as in transformers, and otherwise the logits themselves.
        """
        self.raised = {}
        return self._process(rows, draft_ids, logits, 0, self.raised)

    def of_draft(self, rows: Rows, draft_ids: Tensor, logits: Tensor) -> Tensor:
        """Scores that a sampled row's next draft token is drawn from, [rows, vocab], of the drafter's logits.

        draft_ids: [rows, j] int64, drafted so far. Greedy rows keep their logits, as where no row is sampled. Where a
        processor raises, nothing can be drafted (-inf): plain decoding may never reach this text.
        """
        raised: dict[int, tuple[int, Exception]] = {}
        scores = self._process(rows, draft_ids, logits[:, None], draft_ids.shape[1], raised, are_drafted=True)[:, 0]
        if raised:
            scores = scores.clone()
            scores[[slot for slot, row in enumerate(rows.row_ids.tolist()) if row in raised]] = float("-inf")
        return scores

    def _process(
        self,
        rows: Rows,
        draft_ids: Tensor,
        logits: Tensor,
        first: int,
        raised: dict[int, tuple[int, Exception]],
        are_drafted: bool = False,
    ) -> Tensor:
        """[rows, width, vocab] scores after `first` .. `first + width - 1` draft tokens. raised: filled in.

        are_drafted: of sampled rows alone.
        """
        if not self._num_naming:
            return logits

        by_plan: dict[int, list[int]] = {}
        row_ids = rows.row_ids.tolist()
        for slot, row in enumerate(row_ids):
            if are_drafted and self._plans[row].truncation.is_greedy:
                continue
            by_plan.setdefault(id(self._plans[row]), []).append(slot)
        groups = [(self._plans[row_ids[slots[0]]], np.array(slots)) for slots in by_plan.values()]

        # transformers' order: the minimum length before processors that rank or count the remaining tokens.
        for plan, slots in groups:
            logits = forbid_early_end(rows, plan, slots, logits, first)
        if not any(plan.processors for plan, _ in groups):
            return logits

        scores = logits.float() if logits.dtype != torch.float32 else logits.clone()
        width = logits.shape[1]
        texts = torch.cat([rows.token_ids[:, : rows.max_length], torch.zeros_like(draft_ids)], 1)
        place = rows.lengths[:, None] + torch.arange(draft_ids.shape[1], device=rows.device)
        texts.scatter_(1, place, draft_ids.clamp(min=0))

        for plan, slots in groups:
            if plan.processors:
                index = torch.from_numpy(slots).to(rows.device)
                positions = Positions(
                    texts[index].repeat_interleave(width, 0),
                    (rows.host_lengths[slots, None] + first + np.arange(width)).flatten(),
                    rows.row_ids[slots].repeat(width),
                    draft_ids[index, first : first + width - 1],
                )
                processed = processed_by(plan, positions, scores[index].flatten(0, 1), raised)
                scores[index] = processed.unflatten(0, (len(slots), width))
        return scores

    def warped(self, row_ids: np.ndarray, scores: Tensor) -> Tensor:
        """Scores with the truncation applied by transformers' own warpers, float32.

        row_ids: [positions] int64. scores: [positions, vocab].
        """
        scores = scores.float()
        plans = [self._plans[row] for row in row_ids.tolist()]
        for plan in {id(plan): plan for plan in plans}.values():
            if plan.warpers:
                places = [place for place, own in enumerate(plans) if own is plan]
                part = scores if len(places) == len(plans) else scores[places]
                nothing = scores.new_empty(len(places), 0, dtype=torch.long)
                for warper in plan.warpers:
                    part = warper(nothing, part)
                if len(places) == len(plans):
                    return part
                scores[places] = part
        return scores


def processed_by(plan: Plan, positions: Positions, scores: Tensor, raised: dict[int, tuple[int, Exception]]) -> Tensor:
    """scores: [positions, vocab] float32, of rows that share the plan. raised: see `Processors`; filled in."""
    processed = scores
    for processor in plan.processors:
        try:
            processed = apply_processor(processor, positions, processed, raised)
        except Exception as error:  # a built-in one, asked about all rows at once
            raised |= dict.fromkeys(positions.row_ids.tolist(), (0, error))
            return scores
    return processed


def forbid_early_end(rows: Rows, plan: Plan, slots: np.ndarray, logits: Tensor, first: int) -> Tensor:
    """-inf for the end-of-sequence tokens wherever a row of the plan would end with fewer than min_new_tokens.

    slots: the plan's rows, [n] int64 on the host. logits: [rows, width, vocab].
    """
    if not plan.eos_token_ids or not (rows.num_new_tokens[slots] + first < plan.min_new_tokens).any():
        return logits

    least = torch.zeros(len(rows), dtype=torch.long)
    least[torch.from_numpy(slots)] = plan.min_new_tokens
    column = first + torch.arange(logits.shape[1], device=logits.device)
    too_early = (rows.lengths - rows.prompt_lengths)[:, None] + column < least.to(logits.device)[:, None]
    is_eos = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    is_eos[list(plan.eos_token_ids)] = True
    return logits.masked_fill(too_early[..., None] & is_eos, float("-inf"))


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


def apply_processor(
    processor: LogitsProcessor, positions: Positions, scores: Tensor, raised: dict[int, tuple[int, Exception]]
) -> Tensor:
    """scores: [positions, vocab] float32, as the processors before left them. raised: see `Processors`."""
    kind = type(processor)
    if kind in BLIND:
        return processor(positions.texts, scores)
    if kind in OCCURRENCE and processor.prompt_ignore_length is None:
        return processor(positions.padded(None), scores)
    if kind in ENDING and getattr(processor, "ngram_size", 2) > 1:
        return processor(positions.padded(NO_TOKEN), scores)
    return one_by_one(processor, positions, scores, raised)


def one_by_one(
    processor: LogitsProcessor, positions: Positions, scores: Tensor, raised: dict[int, tuple[int, Exception]]
) -> Tensor:
    """Ask about each position of each row in turn, as far as the row's draft can be accepted.

    Nothing is asked after a token that was not drafted, or that the processor itself forbids: plain decoding could
    never reach such a text, and the processor may not know what to say. Where a processor raises, the row is not asked
    any further, and keeps the scores that it had.
    """
    drafts = positions.draft_ids.tolist()
    width = positions.draft_ids.shape[1] + 1
    out = scores.clone()
    for slot, draft in enumerate(drafts):
        row = int(positions.row_ids[slot * width])
        is_prefix = type(processor) is hf.PrefixConstrainedLogitsProcessor
        own = for_row(processor, row) if is_prefix else processor
        for column in range(width):
            place = slot * width + column
            if row in raised and raised[row][0] <= column:
                break
            if column and (draft[column - 1] < 0 or out[place - 1, draft[column - 1]] == float("-inf")):
                break
            text = positions.texts[place : place + 1, : positions.ends[place]]
            try:
                out[place] = own(text, scores[place : place + 1])[0]
            except Exception as error:  # of the user's code: it ends this row and no other, if it gets here
                raised[row] = column, error
                break
    return out


def for_row(processor: hf.PrefixConstrainedLogitsProcessor, row: int) -> LogitsProcessor:
    """The one processor that is told which row it sees; alone, every row would be number 0."""
    allowed = processor._prefix_allowed_tokens_fn
    return hf.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
