"""The cost model as a length policy: what it does before, during and after each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from specdec.batch.report import StepReport, decided, ended_in_draft
from specdec.batch.rows import Rows
from specdec.draft import Draft, Shown
from specdec.drafter import Drafter
from specdec.policies.by_estimate import with_predictions
from specdec.policies.cost_model.chooser import Chooser
from specdec.policies.cost_model.forecast import StepCosts
from specdec.policies.cost_model.knowledge import Knowledge, knowledge_of
from specdec.policies.cost_model.planning import Planner, room_of
from specdec.policies.cost_model.records import records_of
from specdec.policies.cost_model.states import Drafting, State, is_promised
from specdec.policies.cost_model.tables import Tables
from specdec.policies.cost_model.timed import TimedTables
from specdec.policies.costs import CostClock, CudaClock, HostClock
from specdec.policies.estimates import (
    AcceptanceEstimate,
    DiscoEstimate,
    DraftProbability,
    HeadEstimate,
    estimate_beside,
)
from specdec.policies.heads.acceptance_head import AcceptanceHead
from specdec.policies.heads.disco import Disco
from specdec.policy import LengthPolicy

FIRST_TOKENS = (2, 3, 5)  # with which a drafter of which nothing is known pays on most GPUs, in batches of any size


@dataclass
class TimedStep:
    """What is noted of a step from `widths` to `learn`.

    begin, drafted: marks of the clock, at the step's begin and when its draft is there.
    room: [rows], draft tokens that each row can accept before it ends.
    odds: [rows], how much more likely the tokens drafted so far are to be accepted than was expected before.
    predicted: [rows] for each token that the estimate was shown.
    """

    begin: Any
    costs: StepCosts
    room: np.ndarray
    odds: np.ndarray
    predicted: list[np.ndarray] = field(default_factory=list)
    drafted: Any = None


class CostModel(LengthPolicy):
    """Works with every drafter; the output of greedy decoding does not depend on what it picks."""

    name = "cost_model"
    chooses = True

    def __init__(
        self,
        head: AcceptanceHead | Disco | str | Path | None = "beside",
        clock: CostClock | None = None,
        knowledge: Knowledge | None = None,
    ):
        """head: what estimates acceptance while drafting: a head, an acceptance head's folder, or None for the
            drafter's own probability; by default the acceptance head in the draft model's folder, if there is one
            for this pair. A drafter that shows no tokens is used without an estimate.
        clock: used instead of the real one. knowledge: used instead of what earlier calls have learned about the pair.
        """
        self.head, self._given_clock, self._given_knowledge = head, clock, knowledge
        self._estimate: AcceptanceEstimate | None = None
        self._chooser: Chooser | None = None

    def check(self, target: PreTrainedModel, drafter: Drafter) -> None:
        self._estimate = self.find_estimate(target, drafter) if self._asks_while_drafting(target, drafter) else None
        self.sees = frozenset() if self._estimate is None else self._estimate.sees
        super().check(target, drafter)

    def _asks_while_drafting(self, target: PreTrainedModel, drafter: Drafter) -> bool:
        """On a GPU the host waits longer for each token's estimate than the drafter needs for the next token, so the
        width is decided beforehand, unless the caller wants an estimate."""
        is_default_on_gpu = target.device.type == "cuda" and self.head == "beside"
        return bool(drafter.shows) and not is_default_on_gpu

    def find_estimate(self, target: PreTrainedModel, drafter: Drafter) -> AcceptanceEstimate:
        """The estimate for a pair whose drafter shows its tokens."""
        if self.head == "beside":
            return estimate_beside(self.name, target, drafter) or DraftProbability.of(drafter)
        if self.head is None:
            return DraftProbability.of(drafter)

        kind = DiscoEstimate if isinstance(self.head, Disco) else HeadEstimate
        return kind.of(self.name, self.head, target, drafter)

    def start(self, target: PreTrainedModel, drafter: Drafter, max_tokens: int) -> None:
        on_cuda = target.device.type == "cuda"
        self._clock: CostClock = self._given_clock or (CudaClock() if on_cuda else HostClock())
        self._chooser = self._chooser_for(target, drafter, max_tokens)
        self._known = self._given_knowledge or knowledge_of(target, drafter, self._estimate)
        self._known.begin_call()
        self._planner = Planner(self._known, max_tokens, self._estimate is not None)

    def _chooser_for(self, target: PreTrainedModel, drafter: Drafter, max_tokens: int) -> Chooser | None:
        """Where the steps' costs are known without timing any of the caller's, and no estimate stops drafts; and for
        several candidates."""
        is_timed = self._given_clock is not None or self._given_knowledge is not None or self._estimate is not None
        tables: Tables | None = None if is_timed or drafter.context is None else Tables.of(drafter)
        if tables is None and drafter.needs_choice:
            tables = TimedTables(target, drafter, self._clock)
        if tables is None:
            return None

        records = records_of(target, drafter)
        records.begin_call()
        return Chooser(drafter, tables, records, max_tokens)

    def likely(self, max_tokens: int) -> tuple[int, ...]:
        return tuple(sorted({min(tokens, max_tokens) for tokens in FIRST_TOKENS}))

    @property
    def state(self) -> State:
        """Of the step that is under way."""
        return self._planner.state

    # ---- before drafting

    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        if self._chooser is not None:
            return self._chooser.widths(rows, max_tokens)

        num_rows = len(rows)
        if not self._planner.go_on_resting(num_rows):
            begin = self._clock.mark()
            costs = self._known.costs(num_rows, rows.max_length)
            self._step = TimedStep(begin, costs, room_of(rows), odds=np.ones(num_rows))
            self._planner.choose(rows, max_tokens, costs)

        return np.full(num_rows, self.state.width)

    def next_width(self, max_tokens: int) -> int | None:
        if self._chooser is not None:
            return self._chooser.next_width()
        return 0 if is_promised(self.state) else None

    # ---- while drafting

    def goes_on(self, rows: Rows, shown: Shown) -> np.ndarray:
        assert self._estimate is not None
        predicted = self._estimate(shown)
        step, state, num_drafted = self._step, self.state, shown.place + 1
        step.predicted.append(predicted)
        if not isinstance(state, Drafting) or state.forecast is None:
            return np.full(len(rows), num_drafted < state.width)

        expected = state.forecast.conditional[:, shown.place]
        step.odds = step.odds * self._known.recalibrated(predicted) / expected
        return np.full(len(rows), state.forecast.says_go_on(step.odds, state.rate, num_drafted))

    def drafted(self, draft: Draft) -> None:
        if self._chooser is not None:
            self._chooser.drafted()
        elif self.state.is_timed:
            self._step.drafted = self._clock.mark()

    # ---- after the verification

    def learn(self, report: StepReport) -> StepReport:
        if report.is_prefill:
            return report
        if self._chooser is not None:
            self._chooser.learn(report)
            return report

        self._known.budget.add_step()
        if not self.state.is_timed:
            return report

        end = self._clock.mark()
        step = self._step
        draft_seconds = self._clock.seconds(step.begin, step.drafted)
        verify_seconds = self._clock.seconds(step.drafted, end)
        num_drafted = report.token_ids.shape[1] - 1
        step.costs.verify.add_warm(num_drafted + 1, verify_seconds)
        if num_drafted == 0:
            self._planner.saw_plain()
            return report

        self._learn_costs(report, num_drafted, draft_seconds, verify_seconds)
        report = with_predictions(report, step.predicted)
        self._learn_acceptance(report)
        return report

    def _learn_costs(self, report: StepReport, num_drafted: int, draft_seconds: float, verify_seconds: float) -> None:
        """A draft's gain is counted by what such a step and plain steps usually take, and with catching up: one that
        took long because of a compilation or a busy machine says nothing about drafts."""
        costs, planner = self._step.costs, self._planner
        self._known.learn_draft(costs.draft, planner.num_rows, planner.num_missed, num_drafted, draft_seconds)

        usual = costs.drafting(num_drafted) + planner.catch_up_seconds(costs)
        tokens = float(report.num_committed.sum())
        gain = tokens / len(report.row_ids) - usual / costs.plain(num_drafted)
        planner.saw_draft(gain, tokens, draft_seconds + verify_seconds)

    def _learn_acceptance(self, report: StepReport) -> None:
        asked = report.num_drafted
        if not self.sees:  # the drafter alone decides to propose less than it was asked for
            asked = np.minimum(self.state.width, self._step.room)
        # What stands after the end of a row was not decided.
        asked = np.where(ended_in_draft(report), report.num_accepted, asked)
        self._known.survival.learn(report.row_ids, asked, report.num_accepted)

        if report.predicted is not None:
            is_decided, is_accepted = decided(report, report.predicted.shape[1])
            counted = is_decided & ~np.isnan(report.predicted)
            self._known.recalibrated.learn(report.predicted[counted], is_accepted[counted])
