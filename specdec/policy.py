"""The contract of a length policy: how many tokens to draft, decided anew for every row and step.

A policy is asked up to three times a step. Before drafting, `widths` says how many tokens each row may draft at most; 0
for all rows makes the step plain decoding, and the drafter is not called. While drafting, a policy that `sees` drafted
tokens is shown each of them and says which rows go on. Afterwards `learn` sees what became of them. A token that was
drawn is always verified, whatever the policy thinks of it: it stops a row *after* a doubtful token. Dropping the token
would bias samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from transformers import PreTrainedModel

from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.draft import Draft, Shown
from specdec.drafter import Drafter
from specdec.errors import ConfigError, DrafterError

DEFAULT_MOST = 20  # draft tokens of policies that stop by themselves


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
    chooses: bool = False  # whether it chooses among candidates, by `Drafter.choose`

    def check(self, target: PreTrainedModel, drafter: Drafter) -> None:
        """Raise a SpecDecError if this policy cannot serve the pair; called before any work."""
        if drafter.needs_choice and not self.chooses:
            raise DrafterError(
                f"length_policy {self.name!r} does not choose among drafters, and the list names {drafter.name}; pass "
                "length_policy='cost_model', or one drafter"
            )
        missing = sorted(self.sees - drafter.shows)
        if missing:
            raise DrafterError(
                f"length_policy {self.name!r} looks at the {' and '.join(missing)} of drafted tokens, which drafter "
                f"{drafter.name!r} does not show; choose 'fixed', 'heuristic' or 'cost_model', or a draft model"
            )

    def start(self, target: PreTrainedModel, drafter: Drafter, max_tokens: int) -> None:  # noqa: B027 - optional hook
        """Begin a generation of at most `max_tokens` draft tokens a row and step."""

    def likely(self, max_tokens: int) -> tuple[int, ...]:
        """The numbers of draft tokens, at most `max_tokens`, with which it is likely to begin: their kernels are
        compiled together before the first step."""
        return (max_tokens,)

    @abstractmethod
    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        """The most tokens that each row may draft in this step, [rows] integers; what exceeds `max_tokens` is cut.

        It may not depend on tokens that are drafted in this step.
        """

    def next_width(self, max_tokens: int) -> int | None:
        """What `widths` will say of every row in the next step, whatever becomes of this one, at most `max_tokens`, the
        most of any step; None if that is not known yet.

        The next step may then begin before this one's report is read (`ahead.py`), so this is a promise. Asked after
        `drafted`, once a step at most.
        """
        return None

    def goes_on(self, rows: Rows, shown: Shown) -> np.ndarray:
        """Which rows draft another token, [rows] bool; asked only of policies that see tokens, and of each row until it
        stops."""
        return np.ones(len(rows), dtype=bool)

    def drafted(self, draft: Draft) -> None:  # noqa: B027 - optional hook
        """The draft is there; its verification is next."""

    def row_ended(self, row_id: int) -> None:  # noqa: B027 - optional hook
        """This row will not come again; let go of what is known of it."""

    def learn(self, report: StepReport) -> StepReport:
        """See the step's outcome; returns the report, with predictions if the policy makes any."""
        return report


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
