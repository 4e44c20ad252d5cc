"""What a generation did, counted per row from the steps' reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from specdec.rows import StepReport

NUM_BINS = 10


@dataclass
class Speculation:
    """Statistics of one `generate` call.

    A row takes part in a step of the batch from its first verify forward until it ends; steps are counted per row,
    calls per batch. The token that prefill yields belongs to no step.

    num_target_calls: batched target forwards, prefill apart. num_draft_calls: forwards of the drafter's network,
        its prefill apart. num_new_tokens: committed tokens of all rows.
    num_spec_steps: row-steps. num_draft_tokens, num_accepted_draft_tokens: over all row-steps.
    num_realignments: of the target calls, those before which the layout had to move keys and values; `grouping_rate`
        is the share of the others.
    acceptance_histogram: entry i counts the row-steps that accepted i draft tokens.
    tried_histogram: entry i counts the row-steps that drafted token i and accepted all before it.
    verification: "greedy", "token", "block", or the lossy rule with its numbers. is_lossless: whether the output is the
        target's own, or follows its distribution; False for the lossy ones.
    drafted_histogram: entry i counts the row-steps that drafted i tokens.
    predicted_histogram: of drafted tokens whose acceptance a length policy predicted and the target decided, those
        predicted within NUM_BINS bins of equal width from 0 to 1; empty if nothing was predicted. predicted_sums: the
        sum of these predictions, and predicted_accepted, how many of the tokens were accepted, per bin.
    """

    num_target_calls: int = 0
    num_draft_calls: int = 0
    num_new_tokens: int = 0
    num_spec_steps: int = 0
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
        """1 + accepted / steps: tokens that a row gains per step, bonus included; 1.0 is plain decoding."""
        return 1.0 + self.num_accepted_draft_tokens / max(self.num_spec_steps, 1)

    @property
    def grouping_rate(self) -> float:
        """Steps whose rows ended together already / steps; 1.0 in the ragged layout, which never moves a row."""
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
        """Entry i: the share accepted among row-steps that drafted token i and accepted all before it."""
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
        """Count one report; prefill's token counts, its call does not."""
        self.num_new_tokens += int(report.num_committed.sum())
        if report.is_prefill:
            return
        self.num_target_calls += 1
        self.num_spec_steps += len(report.num_committed)
        if report.token_ids.shape[1] > 1:
            self._add_drafts(report)
        else:  # without the arithmetic, for which a device would wait
            self.acceptance_histogram = _add(self.acceptance_histogram, [len(report.num_committed)])
            self.drafted_histogram = _add(self.drafted_histogram, [len(report.num_committed)])
        if report.predicted is not None:
            self._add_predictions(report.predicted, *decided(report, report.predicted.shape[1]))

    def _add_drafts(self, report: StepReport) -> None:
        width = report.token_ids.shape[1]
        place = np.arange(width - 1)[:, None]
        tried = ((report.num_drafted > place) & (report.num_accepted >= place)).sum(1)
        accepted, drafted = (
            np.bincount(counts, minlength=width) for counts in (report.num_accepted, report.num_drafted)
        )
        self.num_draft_tokens += int(report.num_drafted.sum())
        self.num_accepted_draft_tokens += int(report.num_accepted.sum())
        self.acceptance_histogram = _add(self.acceptance_histogram, accepted.tolist())
        self.tried_histogram = _add(self.tried_histogram, tried.tolist())
        self.drafted_histogram = _add(self.drafted_histogram, drafted.tolist())

    def _add_predictions(self, predicted: np.ndarray, is_decided: np.ndarray, is_accepted: np.ndarray) -> None:
        """[rows, places] each."""
        counted = is_decided & ~np.isnan(predicted)
        values, hits = predicted[counted], is_accepted[counted]
        bins = np.minimum((values * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        counts, sums, accepted = (np.bincount(bins, weights, NUM_BINS) for weights in (None, values, hits))
        self.predicted_histogram = _add(self.predicted_histogram, counts.tolist())
        self.predicted_accepted = _add(self.predicted_accepted, accepted.astype(np.int64).tolist())
        known = self.predicted_sums or [0.0] * NUM_BINS
        self.predicted_sums = [a + float(b) for a, b in zip(known, sums, strict=True)]

    def to_dict(self) -> dict:
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


def decided(report: StepReport, num_places: int) -> tuple[np.ndarray, np.ndarray]:
    """Which drafted tokens the target decided about, all before them being accepted, and which it accepted, [rows,
    places] bool. What stands behind the end of a row was not decided."""
    place = np.arange(num_places)
    accepted = place < report.num_accepted[:, None]
    first_rejected = (place == report.num_accepted[:, None]) & ~report.finished[:, None]
    return (accepted | first_rejected) & (place < report.num_drafted[:, None]), accepted


def _add(total: list[int], counts: list[int]) -> list[int]:
    """Entry by entry, the shorter one extended by zeros; a step waits for this, and numpy's padding takes 20 times as
    long as these few numbers."""
    return [a + b for a, b in zip_longest(total, counts, fillvalue=0)]
