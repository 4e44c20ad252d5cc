"""Statistics of a generation, counted per row from the steps' reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specdec.batch.report import StepReport, decided

NUM_BINS = 10


@dataclass
class Speculation:
    """Statistics of one `generate` call.

    A row takes part in the steps of the batch from its first verify forward until it ends; steps are counted per row,
    calls per batch. The token from the prefill does not belong to a step.

    num_target_calls: batched target forwards, not counting prefill. num_draft_calls: forwards of the drafter's network,
    not counting its prefill. num_new_tokens: committed tokens of all rows.
    num_spec_steps: row-steps. num_step_tokens: what they committed. num_draft_tokens, num_accepted_draft_tokens: over
    all row-steps; a draft counts whole where its row ends within it, and the tokens after that end were not accepted.
    num_realignments: target calls before which the layout had to move keys and values; `grouping_rate` is the share of
    the other calls.
    acceptance_histogram: entry i counts the row-steps that accepted i draft tokens.
    tried_histogram: entry i counts the row-steps in which the target decided about draft token i: it was drafted, all
    before it were accepted, and the row did not end before it.
    verification: "greedy", "token", "block", or the lossy rule with its numbers. is_lossless: whether the output is the
    target's own, or follows its distribution; False for the lossy rules.
    drafted_histogram: entry i counts the row-steps that drafted i tokens.
    predicted_histogram: drafted tokens whose acceptance a length policy predicted and the target decided, counted by
    prediction in NUM_BINS bins of equal width from 0 to 1; empty if nothing was predicted. predicted_sums: the sum of
    these predictions, and predicted_accepted, the number of accepted tokens, per bin.
    """

    num_target_calls: int = 0
    num_draft_calls: int = 0
    num_new_tokens: int = 0
    num_spec_steps: int = 0
    num_step_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_realignments: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    tried_histogram: list[int] = field(default_factory=list)
    verification: str = "greedy"
    is_lossless: bool = True
    drafted_histogram: list[int] = field(default_factory=list)
    predicted_histogram: list[int] = field(default_factory=list)
    predicted_sums: list[float] = field(default_factory=list)
    predicted_accepted: list[int] = field(default_factory=list)

    @property
    def mean_acceptance_length(self) -> float:
        """What a row gains per step, see `acceptance_length`."""
        return acceptance_length(self.num_step_tokens, self.num_spec_steps)

    @property
    def grouping_rate(self) -> float:
        """Steps whose rows already ended together / steps; 1.0 in the ragged layout, which never moves a row."""
        return 1.0 - self.num_realignments / max(self.num_target_calls, 1)

    @property
    def draft_acceptance_rate(self) -> float:
        """accepted / drafted."""
        return self.num_accepted_draft_tokens / max(self.num_draft_tokens, 1)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Entry i: the share of all row-steps that accepted draft token i."""
        reached = np.cumsum(self.acceptance_histogram[::-1])[::-1]
        return [float(count) / max(self.num_spec_steps, 1) for count in reached[1:]]

    @property
    def conditional_acceptance_by_position(self) -> list[float]:
        """Entry i: the share accepted among row-steps in which the target decided about draft token i."""
        reached = np.cumsum(self.acceptance_histogram[::-1])[::-1]
        return [
            float(accepted) / max(tried, 1) for accepted, tried in zip(reached[1:], self.tried_histogram, strict=True)
        ]

    @property
    def calibration(self) -> list[dict[str, float]]:
        """Mean predicted and actual acceptance of the bins that hold tokens."""
        bins = zip(self.predicted_histogram, self.predicted_sums, self.predicted_accepted, strict=True)
        return [
            {"predicted": total / tokens, "actual": accepted / tokens, "tokens": tokens}
            for tokens, total, accepted in bins
            if tokens
        ]

    def add(self, report: StepReport) -> None:
        """Count one report; prefill's token counts, its call does not.

        Uses Python numbers: a device waits for this, and with so few entries every call into numpy takes longer.
        """
        committed = report.num_committed.tolist()
        self.num_new_tokens += sum(committed)
        if report.is_prefill:
            return
        self.num_target_calls += 1
        self.num_spec_steps += len(committed)
        self.num_step_tokens += sum(committed)
        width = report.token_ids.shape[1]
        self._add_drafts(committed, report.num_accepted.tolist(), report.num_drafted.tolist(), width)
        if report.predicted is not None:
            self._add_predictions(report.predicted, *decided(report, report.predicted.shape[1]))

    def _add_drafts(self, committed: list[int], accepted: list[int], drafted: list[int], width: int) -> None:
        """Count each row's draft; width is k + 1."""
        self.num_draft_tokens += sum(drafted)
        self.num_accepted_draft_tokens += sum(accepted)
        self.acceptance_histogram = _counted(self.acceptance_histogram, accepted, width)
        self.drafted_histogram = _counted(self.drafted_histogram, drafted, width)
        # A row that ends with an accepted token leaves the place after it undecided, see `decided`.
        tried = [
            place for row in zip(committed, accepted, drafted, strict=True)
            for place in range(min(row[0], row[1] + 1, row[2]))
        ]  # fmt: skip
        self.tried_histogram = _counted(self.tried_histogram, tried, width - 1)

    def _add_predictions(self, predicted: np.ndarray, is_decided: np.ndarray, is_accepted: np.ndarray) -> None:
        """[rows, places] each."""
        counted = is_decided & ~np.isnan(predicted)
        values, hits = predicted[counted], is_accepted[counted]
        bins = np.minimum((values * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        counts, sums, accepted = (np.bincount(bins, weights, NUM_BINS) for weights in (None, values, hits))
        self.predicted_histogram = _sum(self.predicted_histogram or [0] * NUM_BINS, counts.tolist())
        self.predicted_accepted = _sum(self.predicted_accepted or [0] * NUM_BINS, accepted.astype(np.int64).tolist())
        self.predicted_sums = _sum(self.predicted_sums or [0.0] * NUM_BINS, sums.tolist())

    def to_dict(self) -> dict[str, Any]:
        """Counts and rates, for JSON."""
        names = (
            "mean_acceptance_length",
            "draft_acceptance_rate",
            "grouping_rate",
            "acceptance_by_position",
            "conditional_acceptance_by_position",
            "calibration",
        )
        return {**self.__dict__, **{name: getattr(self, name) for name in names}}


def acceptance_length(num_tokens: int, num_steps: int) -> float:
    """Tokens that row-steps committed / these row-steps: the target's own token counts where the row did not end before
    it. 1.0 is plain decoding, and stands for a generation without any step."""
    return num_tokens / num_steps if num_steps else 1.0


def _counted(histogram: list[int], values: list[int], length: int) -> list[int]:
    """The histogram of at least `length` entries with the values counted in."""
    counted = histogram + [0] * (length - len(histogram))
    for value in values:
        counted[value] += 1
    return counted


def _sum(total: list[Any], more: list[Any]) -> list[Any]:
    return [a + b for a, b in zip(total, more, strict=True)]
