"""What a step is expected to give and to take, by the number of tokens that it drafts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specdec.policies.costs import Curve


@dataclass(frozen=True)
class StepCosts:
    """Times of the target's and the drafter's forwards, at a step's number of rows and length of context."""

    verify: Curve  # seconds by tokens of a row: the newest one and the drafted ones
    draft: Curve  # seconds by drafted tokens of a row

    def drafting(self, num_drafted: int) -> float:
        """Seconds that a step of this many draft tokens (>= 1) usually takes, without catching up."""
        return float(self.verify.seconds[num_drafted + 1] + self.draft.seconds[num_drafted])

    def plain(self, num_drafted: int) -> float:
        """Seconds of a plain step: at most what verifying up to `num_drafted` draft tokens takes."""
        return float(self.verify.seconds[1 : num_drafted + 2].min())


@dataclass(frozen=True)
class Forecast:
    """Expectations for a step of 0 .. max_tokens draft tokens a row.

    conditional: [rows, max_tokens], entry j is P(draft token j is accepted | those before it are).
    accepted: [rows, max_tokens], entry j is the expected number of accepted tokens if j + 1 are drafted.
    tokens: [max_tokens + 1], expected tokens of all rows together.
    seconds: [max_tokens + 1], without the time that a drafter takes to catch up.
    """

    conditional: np.ndarray
    accepted: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    rates: np.ndarray  # tokens / seconds

    @classmethod
    def of(cls, conditional: np.ndarray, room: np.ndarray, costs: StepCosts) -> Forecast:
        """room: [rows], the most draft tokens that each row can accept before it ends."""
        num_rows, max_tokens = conditional.shape
        reached = conditional.cumprod(1) * (np.arange(max_tokens) < room[:, None])
        accepted = reached.cumsum(1)
        tokens = num_rows + np.concatenate([[0.0], accepted.sum(0)])

        # A forward of more tokens takes no less time than one of fewer. Where plain steps seem slower, that is noise,
        # and it would make drafts look worth their time.
        seconds = costs.verify.seconds[1 : max_tokens + 2].copy()
        seconds[0] = seconds.min()
        seconds[1:] += costs.draft.seconds[1 : max_tokens + 1]

        return cls(conditional, accepted, tokens, seconds, tokens / seconds)

    @property
    def best(self) -> int:
        """The number of draft tokens of the best rate."""
        return int(self.rates.argmax())

    @property
    def best_draft(self) -> int:
        """The same among the numbers above 0."""
        return 1 + int(self.rates[1:].argmax())

    def says_go_on(self, odds: np.ndarray, rate: float, num_drafted: int) -> bool:
        """Whether any longer draft is worth more than stopping after `num_drafted` tokens.

        odds: [rows], how much more likely these tokens are to be accepted than was expected before they were drafted.
        rate: tokens that a second is worth.
        """
        worth = odds @ self.accepted[:, num_drafted - 1 :] - rate * self.seconds[num_drafted:]
        return worth[1:].max() > worth[0]
