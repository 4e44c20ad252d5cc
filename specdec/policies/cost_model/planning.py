"""Which state a step is in: the choice, and the counts that it depends on."""

from __future__ import annotations

import numpy as np

from specdec.batch.rows import Rows
from specdec.policies.cost_model.forecast import Forecast, StepCosts
from specdec.policies.cost_model.knowledge import Knowledge, LossBudget
from specdec.policies.cost_model.states import Drafting, Exploring, State, TimingPlain, Trying, next_rest

# Draft tokens of the first steps with a pair, whose costs are unknown. They are few and short, so that a drafter that
# loses has lost little, and each number comes twice, because the first time of a shape says little.
EXPLORED = (1, 0, 1, 0, 3, 3)
# Drafts must be expected to be this much faster than plain decoding. Times are not known well enough to tell less.
LEAST_SPEED_UP = 1.05
# Timed plain steps after the last draft, before the first rest: drafts may seem too slow because the machine has become
# slower, and plain steps then show it.
TIMED_BEFORE_REST = 4
FIRST_REST = 16  # plain steps; each trial in vain doubles the next rest, so that trials get rare
LONGEST_REST = 256  # plain steps: a drafter that has become better is noticed within these
OLD_AFTER = 8  # drafts, after which plain decoding is timed again, if that loses little
TIMING_SHARE = 0.01  # of the time of these drafts: the most that timing plain decoding again may lose
ALIKE = 1.5  # times or rests of plain steps hold for batches of at most this many times more or fewer rows
RECENT = 0.95  # what the reached rate keeps of older drafts with each new one: about the last 20 count


class RestLength:
    """The number of plain steps of the next rest."""

    def __init__(self) -> None:
        self.steps = FIRST_REST
        self._num_rows = 0  # with which it was learned

    def meet(self, num_rows: int) -> None:
        """Forget it where the number of rows is quite another."""
        if not are_alike(num_rows, self._num_rows):
            self._num_rows = num_rows
            self.reset()

    def reset(self) -> None:
        self.steps = FIRST_REST

    def double(self) -> None:
        self.steps = min(2 * self.steps, LONGEST_REST)


class ReachedRate:
    """Tokens per second of recent drafts that an estimate stopped."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self._tokens = RECENT * self._tokens + tokens
        self._seconds = RECENT * self._seconds + seconds

    @property
    def rate(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0 else 0.0


class Planner:
    """Holds the state of one `generate` call.

    state: of the step that is under way. num_missed: plain steps since the last draft, whose tokens the drafter has not
    seen. num_drafts: drafts since plain decoding was last timed.
    """

    def __init__(self, known: Knowledge, max_tokens: int, has_estimate: bool):
        """max_tokens: the most draft tokens of any step. has_estimate: whether an estimate may stop drafts."""
        self.state: State = TimingPlain()
        self.num_missed = 0
        self.num_drafts = 0
        self.num_rows = 0
        self._known, self._max_tokens, self._has_estimate = known, max_tokens, has_estimate
        self._rest_length = RestLength()
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._is_plain_timed = False
        self._reached = ReachedRate()

    # ---- before a step

    def go_on_resting(self, num_rows: int) -> bool:
        """Enter the next state if that is a rest; otherwise `choose` has to be called."""
        is_same_batch = num_rows == self.num_rows
        if not is_same_batch:
            self.num_rows = num_rows
            self._forget_batch()
            self._rest_length.meet(num_rows)

        rest = next_rest(self.state, is_same_batch)
        if rest is None:
            return False

        self.state = rest
        self.num_missed += 1
        return True

    def choose(self, rows: Rows, max_tokens: int, costs: StepCosts) -> None:
        """Enter a state that is not a rest. max_tokens: the most that a row has room for."""
        self.state = self._chosen(rows, max_tokens, costs)

        if isinstance(self.state, Exploring):
            self._known.num_explored += 1
        elif isinstance(self.state, Drafting):
            self._rest_length.reset()

    def _chosen(self, rows: Rows, max_tokens: int, costs: StepCosts) -> State:
        if max_tokens < 1:
            return TimingPlain()

        if self._known.num_explored < len(EXPLORED):
            return self._explore(max_tokens)

        self._is_plain_timed = self._is_plain_timed or self._was_plain_timed()
        if not self._is_plain_timed:
            return TimingPlain()

        conditional = self._known.survival.conditional(rows.row_ids, max_tokens)
        forecast = Forecast.of(conditional, room_of(rows), costs)
        catch_up = self.catch_up_seconds(costs)
        rate = max(float(forecast.rates[forecast.best]), self._reached.rate)
        if self._drafts_pay(forecast, rate, catch_up):
            return self._draft(forecast, rate, max_tokens)

        return self._try_or_rest(forecast, catch_up)

    def _explore(self, max_tokens: int) -> State:
        """At the very end of a text, where the next width does not fit, it has to wait."""
        width = min(EXPLORED[self._known.num_explored], self._max_tokens)
        return Exploring(width) if width <= max_tokens else TimingPlain()

    def _drafts_pay(self, forecast: Forecast, rate: float, catch_up: float) -> bool:
        left = self._known.budget.steps - catch_up / forecast.seconds[0]
        return rate > LEAST_SPEED_UP * forecast.rates[0] and left > LossBudget.LOWEST

    def _draft(self, forecast: Forecast, rate: float, max_tokens: int) -> State:
        best = forecast.best
        if self._is_plain_old(forecast, rate, forecast.seconds[best]):
            return TimingPlain()

        if self._has_estimate:  # it decides while drafting when to stop
            return Drafting(max_tokens, rate, forecast)
        return Drafting(best, rate)

    def _is_plain_old(self, forecast: Forecast, rate: float, seconds: float) -> bool:
        """Whether to time plain decoding again. seconds: of a draft."""
        loss = forecast.seconds[0] - forecast.tokens[0] / rate
        return self.num_drafts >= OLD_AFTER and loss <= TIMING_SHARE * self.num_drafts * seconds

    def _try_or_rest(self, forecast: Forecast, catch_up: float) -> State:
        """Plain decoding is faster, as far as is known."""
        if self.num_missed < TIMED_BEFORE_REST:
            return TimingPlain()

        # The cost of catching up grows with every plain step, so it has to be seen early: the first trial waits for
        # nothing, later ones for the length of a rest since the last draft.
        missing = 0 if self._known.catch_up is None else self._rest_length.steps - self.num_missed
        if missing > 0:
            return TimingPlain(rest=missing)
        if self._can_bear(forecast, forecast.best_draft, catch_up):
            return Trying(forecast.best_draft)
        return TimingPlain(rest=self._rest_length.steps)

    def _can_bear(self, forecast: Forecast, width: int, catch_up: float) -> bool:
        """Whether the budget holds the loss that a draft of this width is expected to make."""
        steps = (forecast.seconds[width] + catch_up) / forecast.seconds[0]
        loss = steps - forecast.tokens[width] / forecast.tokens[0]
        return self._known.budget.steps >= max(loss, 0.0)

    def _was_plain_timed(self) -> bool:
        """With about as many rows."""
        curves = self._known.verify.curves.items()
        return any(1 in curve.samples and are_alike(num_rows, self.num_rows) for (num_rows, _), curve in curves)

    def catch_up_seconds(self, costs: StepCosts) -> float:
        return self._known.catch_up_seconds(costs.draft, self.num_rows, self.num_missed)

    # ---- after a timed step

    def saw_plain(self) -> None:
        """The step drafted nothing."""
        self.num_missed += 1
        self.num_drafts = 0

    def saw_draft(self, gain: float, tokens: float, seconds: float) -> None:
        """gain: tokens of a row and the plain steps that the draft took instead, subtracted. tokens: of all rows.
        seconds: of the step."""
        self.num_missed = 0
        self.num_drafts += 1

        # What a pair loses while it is explored is not counted: that happens once.
        self._known.budget.add_gain(max(gain, 0.0) if isinstance(self.state, Exploring) else gain)

        if isinstance(self.state, Trying) and gain > 0:
            self._rest_length.reset()
        elif isinstance(self.state, Trying):
            self._rest_length.double()
        elif isinstance(self.state, Drafting) and self.state.forecast is not None:
            self._reached.add(tokens, seconds)


def room_of(rows: Rows) -> np.ndarray:
    """[rows], draft tokens that each can accept: the target's own token takes one of the places that are left."""
    return rows.host_limits - rows.host_lengths - 1


def are_alike(num_rows: int, others: int) -> bool:
    return max(num_rows, others) <= ALIKE * min(num_rows, others)
