"""The states of the cost model. Each step is in one of them:

- `Exploring`: the pair is new and its costs are unknown. Asks for a few short drafts, to see what they cost.
- `Drafting`: drafts pay. Asks for the best width, or lets an estimate stop the draft.
- `TimingPlain`: plain decoding has to be timed. Asks for no tokens.
- `Trying`: plain decoding is faster, as far as is known. Asks for the best draft, to see whether that is still so.
- `Resting`: plain decoding is faster. Asks for no tokens, and takes no time to think or to measure.

What leads from one to another:

    Exploring ----> TimingPlain    the last width was explored, and plain decoding was not timed with as many rows
    Exploring ----> Drafting       the last width was explored, and drafts are expected to pay
    Drafting -----> TimingPlain    drafts no longer pay, or plain decoding was last timed long ago
    TimingPlain --> Drafting       drafts are expected to pay
    TimingPlain --> Resting        drafts did not pay for some timed steps
    TimingPlain --> Trying         the same, and the budget can bear a loss
    Resting ------> any of them    the rest is over, or the number of rows has changed
    Trying -------> Drafting       the trial went well enough
    Trying -------> TimingPlain    it did not, and the next rest is twice as long

Where the rows have no room for drafts, any state but `Resting` leads to `TimingPlain`.

Each state has a `width`, the most tokens that each row drafts (0 is plain decoding); a `rest`, the number of `Resting`
steps that follow; and `is_timed`, whether times and acceptance are learned from the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from specdec.policies.cost_model.forecast import Forecast


@dataclass(frozen=True)
class Exploring:
    """width: the next one of `planning.EXPLORED`."""

    width: int
    rest: ClassVar[int] = 0
    is_timed: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class Drafting:
    """rate: tokens per second that drafting is expected to reach.
    forecast: an estimate of acceptance stops the draft by it; None if the width alone decides.
    """

    width: int
    rate: float
    forecast: Forecast | None = None
    rest: ClassVar[int] = 0
    is_timed: ClassVar[bool] = True


@dataclass(frozen=True)
class TimingPlain:
    """One timed plain step. A change of the number of rows cancels the rest after it."""

    rest: int = 0
    width: ClassVar[int] = 0
    is_timed: ClassVar[bool] = True


@dataclass(frozen=True)
class Trying:
    """width: the best one above 0."""

    width: int
    rest: ClassVar[int] = 0
    is_timed: ClassVar[bool] = True


@dataclass(frozen=True)
class Resting:
    """A plain step that is not timed.

    The next step of a rest is promised to the engine (`is_promised`), so it takes place even if the number of rows
    changes. Its forward may already have been launched by then, so its time would say nothing.
    """

    rest: int
    width: ClassVar[int] = 0
    is_timed: ClassVar[bool] = False


State = Exploring | Drafting | TimingPlain | Trying | Resting


def is_promised(state: State) -> bool:
    """Whether the step after this one is a plain step in any case."""
    return isinstance(state, Resting) and state.rest > 0


def next_rest(state: State, is_same_batch: bool) -> Resting | None:
    """The state after this one if that is a rest; None if another state is to be chosen.

    is_same_batch: whether the number of rows is still the same.
    """
    if is_same_batch and state.rest > 0:
        return Resting(state.rest - 1)
    if is_promised(state):
        return Resting(0)
    return None
