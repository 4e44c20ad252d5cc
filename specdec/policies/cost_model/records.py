"""What the cost model keeps of drafters, where the costs of steps are known and acceptance alone is learned."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache

import numpy as np
from transformers import PreTrainedModel

from specdec.drafter import Drafter
from specdec.kept import kept_with
from specdec.policies.cost_model.knowledge import LossBudget, key_of
from specdec.policies.cost_model.tables import Choice
from specdec.policies.costs import MAX_TOKENS, Survival


class Acceptance(Survival):
    """As `Survival`, with less to unlearn: the share of a place that was seldom tried is drawn to that of the place
    before it, and only the first one's to a prior.

    spread: standard deviation of the rows' own shares, which decides how much later the last row ends than the others.
    """

    PRIOR_WEIGHT = 2.0  # tokens
    ROW_WEIGHT = 12.0
    ROW_MEMORY = 0.95
    FEWEST_ROWS, FEWEST_TOKENS = 4, 8.0  # that show a spread; of a row
    SPREAD_MEMORY = 0.9  # kept per look at the rows

    def __init__(self) -> None:
        super().__init__(MAX_TOKENS)
        self.tried[:] = self.accepted[:] = 0.0
        self.spread = 0.1

    @property
    def is_certain(self) -> bool:
        """Whether more than a few drafts have been seen."""
        return bool(self.tried[0] >= 4 * self.PRIOR_WEIGHT)

    def places(self, num_tokens: int) -> np.ndarray:
        found, share, weight = np.empty(num_tokens), self.PRIOR, self.PRIOR_WEIGHT
        counts = zip(self.tried[:num_tokens].tolist(), self.accepted[:num_tokens].tolist(), strict=True)
        for place, (tried, accepted) in enumerate(counts):
            share = found[place] = (accepted + weight * share) / (tried + weight)
        return found

    def spread_out(self, row_ids: np.ndarray, num_tokens: int) -> np.ndarray:
        """As `conditional`, where each row also deviates by what is not known of it yet: by the quantiles of a normal
        distribution, one for each row."""
        shares = self.conditional(row_ids, num_tokens)
        if len(row_ids) == 1:
            return shares
        unknown = np.sqrt(self.ROW_WEIGHT / (self.rows[0, row_ids] + self.ROW_WEIGHT))
        spread_out = shares + (self.spread * unknown * quantiles(len(row_ids)))[:, None]
        return np.minimum(np.maximum(spread_out, self.LEAST_PROBABILITY), LARGEST_SHARE)

    def learn_spread(self, row_ids: np.ndarray) -> None:
        tried, accepted = self.rows[:, row_ids]
        is_known = tried >= self.FEWEST_TOKENS
        if is_known.sum() < self.FEWEST_ROWS:
            return
        tried, shares = tried[is_known], accepted[is_known] / tried[is_known]
        mean = accepted[is_known].sum() / tried.sum()
        by_chance = mean * (1 - mean) * float((1 / tried).mean())
        variance = max(float(shares.var()) - by_chance, 0.0)
        self.spread = (self.SPREAD_MEMORY * self.spread**2 + (1 - self.SPREAD_MEMORY) * variance) ** 0.5


LARGEST_SHARE = 0.99


@cache
def quantiles(count: int) -> np.ndarray:
    """Of a normal distribution, [count] from the lowest on."""
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((place + 0.5) / count) for place in range(count)])


class AcceptanceInHindsight(Acceptance):
    """Of a drafter that can be watched: it need not be tried to be known, so nothing good is assumed of it."""

    PRIOR = 0.3


class SmallBudget(LossBudget):
    """Where costs are known, little has to be tried out."""

    LOWEST = -1.0


class TrialBudget(LossBudget):
    """In steps of what is used otherwise, which may be several times as fast as plain decoding."""

    AT_START, MOST_CARRIED = 0.25, 1.0


class Records:
    """Of the candidates of a call; outlives it.

    acceptance: of each candidate. choice: of the last step. budget: what drafts may lose against plain decoding.
    trials: what trying a candidate may lose against the one in use.
    """

    def __init__(self, acceptance: Sequence[Acceptance]):
        self.acceptance = list(acceptance)
        self.budget, self.trials = SmallBudget(), TrialBudget()
        self.choice = Choice(0, 0)

    def begin_call(self) -> None:
        self.budget.begin_call()
        self.trials.begin_call()
        for acceptance in self.acceptance:
            acceptance.forget_rows()


def records_of(target: PreTrainedModel, drafter: Drafter) -> Records:
    """What was learned of the candidates with this target, kept as long as it lives."""
    keys = tuple(key_of(target, candidate) for candidate in drafter.candidates)

    def make() -> Records:
        kinds = (acceptance_of(candidate) for candidate in drafter.candidates)
        return Records([kept_with(target, (kind, key), kind) for key, kind in zip(keys, kinds, strict=True)])

    return kept_with(target, (Records, keys), make)


def acceptance_of(candidate: Drafter) -> type[Acceptance]:
    can_be_watched = type(candidate).in_hindsight is not Drafter.in_hindsight
    return AcceptanceInHindsight if can_be_watched else Acceptance
