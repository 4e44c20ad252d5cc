"""Policies that stop a draft by the acceptance that is estimated for its tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.draft import Shown
from specdec.drafter import Drafter
from specdec.errors import ConfigError
from specdec.policies.estimates import AcceptanceEstimate, DiscoEstimate, DraftProbability, HeadEstimate
from specdec.policy import LengthPolicy


class ByEstimate(LengthPolicy):
    """Stops a row by the acceptance that is estimated for its drafted tokens."""

    def __init__(self, threshold: float, min_tokens: int = 1):
        """min_tokens: a row never stops before it has drafted this many."""
        if not 0 <= threshold <= 1:
            raise ConfigError(f"{self.name}: threshold={threshold} is not a probability; choose 0 to 1")
        if min_tokens < 1:
            raise ConfigError(f"{self.name}: min_tokens={min_tokens} must be at least 1")
        self.threshold, self.min_tokens = threshold, min_tokens
        self._estimate: AcceptanceEstimate | None = None
        self._predicted: list[np.ndarray] = []

    @abstractmethod
    def estimate_for(self, target: PreTrainedModel, drafter: Drafter) -> AcceptanceEstimate:
        """The estimate that fits the pair; raises a SpecDecError where there is none."""

    @abstractmethod
    def is_over(self, predicted: np.ndarray, reached: np.ndarray) -> np.ndarray:
        """Which rows stop, [rows] bool. predicted: [rows] acceptance of the newest token given that those before it are
        accepted; reached: [rows], that of all drafted tokens together."""

    def check(self, target: PreTrainedModel, drafter: Drafter) -> None:
        super().check(target, drafter)
        self._estimate = self.estimate_for(target, drafter)

    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        self._predicted, self._reached = [], np.ones(len(rows))
        return np.full(len(rows), max_tokens)

    def next_width(self, max_tokens: int) -> int | None:
        return max_tokens

    def goes_on(self, rows: Rows, shown: Shown) -> np.ndarray:
        assert self._estimate is not None
        predicted = self._estimate(shown)
        self._predicted.append(predicted)
        self._reached = self._reached * predicted
        return ~self.is_over(predicted, self._reached) | (shown.place + 1 < self.min_tokens)

    def learn(self, report: StepReport) -> StepReport:
        return report if report.is_prefill else with_predictions(report, self._predicted)


class Confidence(ByEstimate):
    """Stop after a token that the drafter itself gave less than `threshold`, as transformers'
    `assistant_confidence_threshold` does; its probability is taken at temperature 1, before any processor."""

    name = "confidence"
    sees = frozenset({"logits"})

    def __init__(self, threshold: float = 0.4, min_tokens: int = 1):
        super().__init__(threshold, min_tokens)

    def estimate_for(self, target: PreTrainedModel, drafter: Drafter) -> AcceptanceEstimate:
        return DraftProbability.of(drafter)

    def is_over(self, predicted: np.ndarray, reached: np.ndarray) -> np.ndarray:
        return predicted < self.threshold


class ByAcceptanceHead(ByEstimate):
    """SpecDec++: stop when 1 - prod a_i > threshold, the chance that some drafted token is rejected (section 3.2)."""

    name = "acceptance_head"
    sees = frozenset({"logits", "hidden_states"})

    def __init__(self, threshold: float = 0.5, min_tokens: int = 1, head: object | None = None):
        """head: an `AcceptanceHead`, or the folder that holds one; by default the one in the draft model's folder."""
        super().__init__(threshold, min_tokens)
        self.head = head

    def estimate_for(self, target: PreTrainedModel, drafter: Drafter) -> AcceptanceEstimate:
        return HeadEstimate.of(self.name, self.head, target, drafter)

    def is_over(self, predicted: np.ndarray, reached: np.ndarray) -> np.ndarray:
        return 1 - reached > self.threshold


class ByDisco(ByEstimate):
    """DISCO: stop after a token whose classifier C_i is below the threshold."""

    name = "disco"
    sees = frozenset({"logits"})

    def __init__(self, threshold: float = 0.3, min_tokens: int = 1, head: object | None = None):
        """head: a `Disco`, or the folder that holds one; by default the one in the draft model's folder."""
        super().__init__(threshold, min_tokens)
        self.head = head

    def estimate_for(self, target: PreTrainedModel, drafter: Drafter) -> AcceptanceEstimate:
        return DiscoEstimate.of(self.name, self.head, target, drafter)

    def is_over(self, predicted: np.ndarray, reached: np.ndarray) -> np.ndarray:
        return predicted < self.threshold


def with_predictions(report: StepReport, predicted: list[np.ndarray]) -> StepReport:
    """The report with [rows, places] predictions, NaN where a row had stopped before."""
    if not predicted:
        return report
    columns = np.stack(predicted, 1)
    behind = np.arange(columns.shape[1]) >= report.num_drafted[:, None]
    return replace(report, predicted=np.where(behind, np.nan, columns))
