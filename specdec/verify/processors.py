"""transformers' logits processors at every verified position, each seeing that row's own tokens up to there.

A processor was written for one new position per row and rows of one length. Here it meets [rows, k + 1] positions of
rows of any length. Processors that do not look at the tokens take all positions at once. Those that only ask which
tokens occur, or how the text ends, take all positions with suitable padding. Every other one is asked once per position
with the unpadded tokens of the row, as if it were alone. Those that may keep something between calls, custom ones
included, are each row's own (`row_states.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.generation import LogitsProcessor

from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.errors import ConfigError
from specdec.kernels.commit.greedy_commit import NO_TOKEN
from specdec.kernels.commit.truncation import Truncations
from specdec.verify.plan import Plan, is_stateful
from specdec.verify.positions import Asked, Positions, Raised, for_row, processed_by
from specdec.verify.row_states import RowStates


class Processors:
    """The plans of all rows of a generation, and what they make of a step's logits.

    raised: row id -> (column, exception) of the step that is being verified: the row's processors raised it when they
        were asked about the token after `column` draft tokens. It counts only if these are accepted.
    """

    def __init__(self, argmax_decides: bool = True) -> None:
        """argmax_decides: whether greedy rows commit the argmax, as under every lossless verification."""
        self.argmax_decides = argmax_decides
        self.raised: Raised = {}
        self._plans: dict[int, Plan] = {}
        self._states: dict[int, RowStates] = {}  # of rows with stateful processors
        self._num_naming = self._num_sampled = 0  # rows whose plans name tokens; rows that are sampled
        self._truncations: Truncations | None = None
        self._truncated: list[int] = []  # the row ids that these belong to
        self._eos: Tensor | None = None
        self._ended: list[int] = []

    def add(self, row_id: int, plan: Plan, is_drafted: bool = True) -> None:
        """is_drafted: whether tokens may be drafted for the row."""
        self._plans[row_id] = plan
        self._num_naming += plan.names_tokens
        self._num_sampled += not plan.truncation.is_greedy
        if plan.in_order:
            own = [for_row(processor, row_id) for processor in plan.in_order]
            unchanging = [processor for processor in own if not is_stateful(processor)]
            self._states[row_id] = RowStates(own, unchanging, is_drafted and not self._follows_argmax(plan))

    def drop(self, row_id: int) -> None:
        plan = self._plans.pop(row_id)
        self._states.pop(row_id, None)
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
        return self._process(rows, draft_ids, logits, 0, self.raised, self._asked)

    def commit(self, report: StepReport) -> dict[int, ConfigError]:
        """Let the stateful processors of rows that go on stand where the row stands. report: of the latest call.

        Returns the rows that can get no token, because their processors cannot be copied any more, and why.
        """
        failed: dict[int, ConfigError] = {}
        if not self._states:
            return failed
        goes_on = ~report.finished & (report.fault == 0)
        for row, num_committed in zip(
            report.row_ids[goes_on].tolist(), report.num_committed[goes_on].tolist(), strict=True
        ):
            fails = row in self.raised and self.raised[row][0] < num_committed
            if row in self._states and not fails:
                try:
                    self._states[row].commit(num_committed - 1)
                except ConfigError as error:
                    failed[row] = error
        return failed

    def of_draft(self, rows: Rows, draft_ids: Tensor, logits: Tensor) -> Tensor:
        """Scores that a sampled row's next draft token is drawn from, [rows, vocab], of the drafter's logits.

        draft_ids: [rows, j] int64, drafted so far. Greedy rows keep their logits, as where no row is sampled. Where a
        processor raises, nothing can be drafted (-inf): plain decoding may never reach this text.
        """
        place = draft_ids.shape[1]
        raised = self._drafted_out(rows, draft_ids[:, -1:])

        def asked(row: int, _column: int, _is_certain: bool) -> Sequence[LogitsProcessor]:
            return self._states[row].of_draft(place)

        scores = self._process(rows, draft_ids, logits[:, None], place, raised, asked, are_drafted=True)[:, 0]
        if raised:
            scores = scores.clone()
            scores[[slot for slot, row in enumerate(rows.row_ids.tolist()) if row in raised]] = float("-inf")
        return scores

    def _follows_argmax(self, plan: Plan) -> bool:
        return self.argmax_decides and plan.truncation.is_greedy

    def _asked(self, row: int, column: int, is_certain: bool) -> Sequence[LogitsProcessor]:
        """A chain: the parent of a column is the one before it."""
        return self._states[row].at(column, column - 1 if column else None, is_certain)

    def _drafted_out(self, rows: Rows, newest: Tensor) -> Raised:
        """Rows with stateful processors whose draft has ended, so that these are not asked any more.

        newest: [rows, 1] int64, of each row's draft; [rows, 0] where none has begun.
        """
        if not (self._states and newest.shape[1]):
            return {}
        ids = zip(rows.row_ids.tolist(), newest[:, 0].tolist(), strict=True)
        return {
            row: (0, ValueError("the draft has ended"))
            for row, token in ids
            if row in self._states
            and not self._plans[row].truncation.is_greedy
            and (token < 0 or token in self._plans[row].eos_token_ids)
        }

    def _process(
        self,
        rows: Rows,
        draft_ids: Tensor,
        logits: Tensor,
        first: int,
        raised: Raised,
        asked: Asked,
        are_drafted: bool = False,
    ) -> Tensor:
        """[rows, width, vocab] scores after `first` .. `first + width - 1` draft tokens. raised: filled in.

        asked: the stateful processors to ask about a place.

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
                own = scores[index].flatten(0, 1)
                processed = processed_by(plan, positions, own, raised, asked, self._follows_argmax(plan))
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
