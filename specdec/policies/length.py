"""How many tokens to draft, decided anew for every row and step.

A policy is asked up to three times a step. Before drafting, `widths` says how many tokens each row may draft at most; 0
for all rows makes the step plain decoding, and the drafter is not called. While drafting, a policy that `sees` drafted
tokens is shown each of them and says which rows go on. Afterwards `learn` sees what became of them. A token that was
drawn is always verified, whatever the policy thinks of it: it stops a row *behind* a doubtful token. Dropping the token
would bias samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafter import Draft, Drafter
from specdec.errors import ConfigError, DrafterError

if TYPE_CHECKING:
    from specdec.batch.rows import Rows, StepReport
    from specdec.policies.estimates import Estimate

DEFAULT_FIXED = 5
DEFAULT_MOST = 20  # of policies that stop by themselves


class LengthPolicy(ABC):
    """Decides how far rows are drafted. One instance serves one `generate` call at a time.

    The smallest policy is one method:

        class Three(LengthPolicy):
            name = "three"

            def widths(self, rows, max_tokens):
                return np.full(len(rows), 3)
    """

    name: str = "policy"
    sees: frozenset[str] = frozenset()  # of drafted tokens: "logits", "hidden_states"; a drafter says what it `shows`
    default_tokens: int = DEFAULT_MOST  # num_speculative_tokens where the caller gives none
    is_busy: bool = False

    def check(self, target: PreTrainedModel, drafter: Drafter) -> None:
        """Raise a SpecDecError if this policy cannot serve the pair; called before any work."""
        missing = sorted(self.sees - drafter.shows)
        if missing:
            raise DrafterError(
                f"length_policy {self.name!r} looks at the {' and '.join(missing)} of drafted tokens, which drafter "
                f"{drafter.name!r} does not show; choose 'fixed', 'heuristic' or 'cost_model', or a draft model"
            )

    def start(self, target: PreTrainedModel, drafter: Drafter, max_tokens: int) -> None:  # noqa: B027 - optional hook
        """Begin a generation of at most `max_tokens` draft tokens a row and step."""

    @abstractmethod
    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        """The most tokens that each row may draft in this step, [rows] integers; what exceeds `max_tokens` is cut.

        It may not depend on tokens that are drafted in this step.
        """

    def next_width(self, max_tokens: int) -> int | None:
        """What `widths` will say of every row in the next step, whatever becomes of this one, at most `max_tokens`, the
        most of any step; None if that is not known yet.

        The next step may then begin before this one's report is read (`ahead.py`), so this is a promise. Asked behind
        `drafted`, once a step at most.
        """
        return None

    def goes_on(self, rows: Rows, shown: Shown) -> np.ndarray:
        """Which rows draft another token, [rows] bool; asked only of policies that see tokens, and of each row until it
        stops."""
        return np.ones(len(rows), dtype=bool)

    def drafted(self, draft: Draft) -> None:  # noqa: B027 - optional hook
        """The draft is there; its verification is next."""

    def learn(self, report: StepReport) -> StepReport:
        """See the step's outcome; returns the report, with predictions if the policy makes any."""
        return report


@dataclass(frozen=True)
class Shown:
    """A token that a drafter has just drafted for each row.

    place: its index in the draft, from 0 (within a CUDA graph a tensor). token_ids: [rows] int64, NO_TOKEN where there
        is none.
    logits: [rows, vocab], the drafter's own that it was chosen by: temperature 1, before any processor.
    hidden_states: [rows, hidden], the drafter's last, behind its final norm, that the logits were computed from.
    """

    place: Any
    token_ids: Tensor
    logits: Tensor
    hidden_states: Tensor | None = None


def widths_of(policy: LengthPolicy, rows: Rows, max_tokens: int) -> np.ndarray:
    """What the policy says of the rows, [rows] integers; raises ConfigError if it says anything else."""
    widths = policy.widths(rows, max_tokens)
    is_array = isinstance(widths, np.ndarray)
    if not is_array or widths.shape != (len(rows),) or widths.dtype.kind not in "iu":
        found = f"{widths.dtype} of shape {list(widths.shape)}" if is_array else f"a {type(widths).__name__}"
        raise ConfigError(
            f"length_policy {policy.name!r} gave widths as {found}; widths() must return a numpy array of {len(rows)} "
            "integers, one per row"
        )
    return widths


class Fixed(LengthPolicy):
    """As many tokens as allowed."""

    name = "fixed"
    default_tokens = DEFAULT_FIXED

    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        return np.full(len(rows), max_tokens)

    def next_width(self, max_tokens: int) -> int | None:
        return max_tokens


class Heuristic(LengthPolicy):
    """transformers' schedule, row by row: two more behind a draft that was accepted in full, else one fewer."""

    name = "heuristic"

    def __init__(self, first_tokens: int = DEFAULT_FIXED):
        """first_tokens: of each row's first draft."""
        if first_tokens < 1:
            raise ConfigError(f"first_tokens={first_tokens} must be at least 1")
        self.first_tokens = first_tokens

    def start(self, target: PreTrainedModel, drafter: Drafter, max_tokens: int) -> None:
        self._tokens: dict[int, int] = {}  # row id -> of its next draft
        self._asked: dict[int, int] = {}

    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        tokens = [min(self._tokens.get(row, self.first_tokens), max_tokens) for row in rows.row_ids.tolist()]
        self._asked = dict(zip(rows.row_ids.tolist(), tokens, strict=True))
        return np.array(tokens, dtype=np.int64)

    def learn(self, report: StepReport) -> StepReport:
        if not report.is_prefill:
            for row, accepted in zip(report.row_ids.tolist(), report.num_accepted.tolist(), strict=True):
                asked = self._asked[row]
                self._tokens[row] = asked + 2 if accepted >= asked else max(asked - 1, 1)
        return report


class Stopping(LengthPolicy):
    """Stops a row by the acceptance that is estimated for its drafted tokens."""

    def __init__(self, threshold: float, min_tokens: int = 1):
        """min_tokens: a row never stops before it has drafted so many."""
        if not 0 <= threshold <= 1:
            raise ConfigError(f"{self.name}: threshold={threshold} is no probability; choose 0 to 1")
        if min_tokens < 1:
            raise ConfigError(f"{self.name}: min_tokens={min_tokens} must be at least 1")
        self.threshold, self.min_tokens = threshold, min_tokens
        self._estimate: Estimate | None = None
        self._predicted: list[np.ndarray] = []

    @abstractmethod
    def estimate_for(self, target: PreTrainedModel, drafter: Drafter) -> Estimate:
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


class Confidence(Stopping):
    """Stop behind a token that the drafter itself gave less than `threshold`, as transformers'
    `assistant_confidence_threshold` does; its probability is taken at temperature 1, before any processor."""

    name = "confidence"
    sees = frozenset({"logits"})

    def __init__(self, threshold: float = 0.4, min_tokens: int = 1):
        super().__init__(threshold, min_tokens)

    def estimate_for(self, target: PreTrainedModel, drafter: Drafter) -> Estimate:
        from specdec.policies.estimates import DraftProbability

        return DraftProbability.of(drafter)

    def is_over(self, predicted: np.ndarray, reached: np.ndarray) -> np.ndarray:
        return predicted < self.threshold


class ByAcceptanceHead(Stopping):
    """SpecDec++: stop when 1 - prod a_i > threshold, the chance that some drafted token is rejected (section 3.2)."""

    name = "acceptance_head"
    sees = frozenset({"logits", "hidden_states"})

    def __init__(self, threshold: float = 0.5, min_tokens: int = 1, head: object | None = None):
        """head: an `AcceptanceHead`, or the folder that holds one; by default the one in the draft model's folder."""
        super().__init__(threshold, min_tokens)
        self.head = head

    def estimate_for(self, target: PreTrainedModel, drafter: Drafter) -> Estimate:
        from specdec.policies.estimates import HeadEstimate

        return HeadEstimate.of(self.name, self.head, target, drafter)

    def is_over(self, predicted: np.ndarray, reached: np.ndarray) -> np.ndarray:
        return 1 - reached > self.threshold


class ByDisco(Stopping):
    """DISCO: stop behind a token whose classifier C_i is below the threshold."""

    name = "disco"
    sees = frozenset({"logits"})

    def __init__(self, threshold: float = 0.3, min_tokens: int = 1, head: object | None = None):
        """head: a `Disco`, or the folder that holds one; by default the one in the draft model's folder."""
        super().__init__(threshold, min_tokens)
        self.head = head

    def estimate_for(self, target: PreTrainedModel, drafter: Drafter) -> Estimate:
        from specdec.policies.estimates import DiscoEstimate

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


def _cost_model() -> LengthPolicy:
    from specdec.policies.cost_model import CostModel

    return CostModel()


LENGTH_POLICIES: dict[str, Callable[..., LengthPolicy]] = {
    "fixed": Fixed,
    "heuristic": Heuristic,
    "confidence": Confidence,
    "acceptance_head": ByAcceptanceHead,
    "disco": ByDisco,
    "cost_model": _cost_model,
}
WITH_THRESHOLD = frozenset({"confidence", "acceptance_head", "disco"})


def resolve_length_policy(policy: LengthPolicy | str) -> LengthPolicy:
    """A LengthPolicy from a LengthPolicy or a name; "name:0.5" gives the threshold of those that have one.

    Raises ConfigError, listing the names, for anything else.
    """
    if isinstance(policy, LengthPolicy):
        return policy
    if isinstance(policy, type) and issubclass(policy, LengthPolicy):
        raise ConfigError(f"length_policy is the class {policy.__name__}; pass an instance, {policy.__name__}(...)")
    name, _, number = policy.partition(":") if isinstance(policy, str) else (policy, "", "")
    if name not in LENGTH_POLICIES:
        raise ConfigError(f"length_policy={policy!r} is unknown; choose {', '.join(map(repr, LENGTH_POLICIES))}")
    if not number:
        return LENGTH_POLICIES[name]()
    try:
        threshold = float(number)
    except ValueError:
        threshold = -1.0
    if name not in WITH_THRESHOLD or not 0 <= threshold <= 1:
        raise ConfigError(
            f"length_policy={policy!r}: a number from 0 to 1 may follow {', '.join(sorted(WITH_THRESHOLD))} alone"
        )
    return LENGTH_POLICIES[name](threshold)
