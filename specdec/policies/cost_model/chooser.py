"""How many tokens to draft, and with which drafter, where the cost of every step is known beforehand.

Nothing is timed and nothing explored but acceptance, and each choice is made a step ahead, so that the next forward can
be launched before this step's report is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from specdec.batch.report import StepReport, ended_in_draft, on_its_way
from specdec.batch.rows import Rows
from specdec.drafter import Drafter
from specdec.policies.cost_model.knowledge import LossBudget
from specdec.policies.cost_model.planning import room_of
from specdec.policies.cost_model.records import Records
from specdec.policies.cost_model.tables import Choice, Tables

# The numbers of draft tokens that are considered: each needs captured steps of its own, and between two of them
# little is lost.
LADDER = np.array([1, 2, 3, 5, 8, 11, 15, 23, 32])
LEAST_SPEED_UP = 1.02  # over plain decoding: times are known about as well
WORTH_A_CHANGE = 1.015  # over what is drafted now: acceptance is never known exactly
# Capturing a step takes about this many seconds. It is worth it if this call and so many more like it gain as much.
CAPTURE_SECONDS, CALLS_ALIKE = 0.04, 3.0
WORTH_A_CAPTURE = 1.03  # and it must be this much faster than what needs no capture
BETWEEN_CAPTURES = 6  # steps, so that a few unlucky drafts do not capture one width after another
NEVER = 1e9  # seconds, for what is not ready
STEPS_IN_VAIN = 0.5  # of a row: at its end part of a draft is
SHARED_BY = 16.0  # drafts that have to pay for catching up
FIRST_REST, LONGEST_REST = 16, 256  # steps between two trials of a drafter; each one in vain doubles them
# Steps between two decisions; a new choice is seldom another one. Many rows are known sooner, and take longer to think.
DECIDE_EVERY, DECIDE_MANY_EVERY = 4, 8
MANY_ROWS = 16
WATCH_EVERY, WATCHED = 8, 5  # steps, and the draft tokens that are looked at in hindsight


class Outlook(NamedTuple):
    """One candidate's expectations, by the numbers of the ladder.

    tokens: of all rows in one step. seconds: of one step as it runs now, infinite where that needs a capture; without
    `catch_up`, what its next draft takes longer. rates: tokens per second until all rows have ended, once everything is
    captured. rates_now: the same as steps run now.
    """

    tokens: np.ndarray
    seconds: np.ndarray
    rates: np.ndarray
    rates_now: np.ndarray
    catch_up: float


class Chooser:
    """Chooses for one `generate` call."""

    def __init__(self, drafter: Drafter, tables: Tables, records: Records, max_tokens: int):
        """max_tokens: the most draft tokens of any step."""
        self.drafter, self.tables, self.records = drafter, tables, records
        self._max_tokens, self._ladder = max_tokens, LADDER[max_tokens >= LADDER]
        count = len(drafter.candidates)
        self._rests, self._rest_lengths = [0] * count, [FIRST_REST] * count
        self._missed = [0] * count  # tokens committed since each candidate's last draft, of the row with the most
        self._can_be_watched = [type(one).in_hindsight is not Drafter.in_hindsight for one in drafter.candidates]
        self._watched: dict[int, tuple[np.ndarray, Callable[[], np.ndarray]]] = {}

        self.choice = records.choice  # of the step that is under way, or the last one of the call before
        self._planned: Choice | None = None  # of the next step, as far as nothing speaks against it
        self._promised: Choice | None = None
        self._can_draft = False  # whether the drafters' own forwards have been made ready
        self._is_wanted = False  # the step is only to be seen
        self._worth_a_capture: Choice | None = None
        self._first: tuple[int, int] | None = None  # the number of rows of the first step, and their tokens to come
        self._reference = 1.0, 1.0  # of a trial: the rate and the seconds of a step of what is used otherwise
        self._num_steps, self._num_since_capture = 0, BETWEEN_CAPTURES

    # ---- before a step

    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        self.tables.step_began()
        num_rows, length = len(rows), rows.max_length
        choice, self._promised = self._promised, None
        if not self._num_steps:  # before anything was timed nothing is known, and a plain step is needed in any case
            self.tables.make_ready(Choice(0, 0), num_rows, length)
        if choice is None:
            choice = self._chosen(rows, length, max_tokens)
            if self._has_to_be_made(choice, num_rows, length):
                self.tables.make_ready(choice, num_rows, length)
                self._num_since_capture = 0
        self.choice, self._room = choice, room_of(rows)
        self._shape = num_rows, length
        self.records.choice = choice
        self._num_steps += 1
        self._num_since_capture += 1
        self.drafter.choose(choice.drafter)
        self._step_costs(num_rows, length)
        for index in range(len(self._rests)):
            self._rests[index] -= not (choice.width and index == choice.drafter)
        self._planned = self._plan(rows, length)
        self._watch(rows)
        return np.full(num_rows, choice.width)

    def next_width(self) -> int | None:
        self._promised = self._planned
        if self._promised is None:
            return None
        self.drafter.choose(self._promised.drafter, is_ahead=True)
        return self._promised.width

    def drafted(self) -> None:
        self.tables.step_drafted()

    def _step_costs(self, num_rows: int, length: int) -> None:
        """What this step and a plain one take."""
        drafter, width, _ = self.choice
        self._plain_seconds = self._seconds = float(self.tables.plain_by_rows(num_rows, length)[-1])
        if width:
            self._seconds = self.tables.draft_step(drafter, num_rows, length, width)
            self._seconds += self.tables.catch_up(drafter, num_rows, self._missed[drafter])

    def _plan(self, rows: Rows, length: int) -> Choice | None:
        """The choice for the next step if it can be promised before this one is known."""
        choice = self.choice
        if choice.is_trial or (choice.width and not self.records.acceptance[choice.drafter].is_certain):
            return None  # what becomes of this step matters
        # In the next step, for the row with the most room.
        left = min(self._max_tokens, rows.max_remaining - 1 - (choice.width + 1))
        if left < max(choice.width, 1):
            return None
        length += choice.width + 1
        is_resting = not choice.width and min(self._rests) > 0
        every = DECIDE_EVERY if len(rows) < MANY_ROWS else DECIDE_MANY_EVERY
        if not is_resting and self._num_steps % every == 0:
            choice = self._chosen(rows, length, left)
        if choice.is_trial or choice.width > left or self._has_to_be_made(choice, len(rows), length):
            return None
        return choice

    def _has_to_be_made(self, choice: Choice, num_rows: int, length: int) -> bool:
        """Whether the choice is one that is worth a capture, or that nothing serves."""
        if self.tables.is_ready(choice, num_rows, length):
            return False
        return choice == self._worth_a_capture or not self.tables.serves(choice, num_rows, length)

    # ---- the choice

    def _chosen(self, rows: Rows, length: int, max_tokens: int) -> Choice:
        ladder = self._ladder[: int(np.searchsorted(self._ladder, max_tokens, "right"))]
        plain = Choice(self.choice.drafter, 0)
        if not len(ladder):
            return plain
        self._is_wanted = False
        wanted = self.tables.wanted(len(rows), length, max_tokens)
        if wanted is not None:
            self._is_wanted = True
            return wanted
        if not self._can_draft:
            for index in range(len(self._rests)):
                self.tables.make_ready_to_draft(index, len(rows), length)
            self._can_draft = True

        plain_seconds = self._plain_seconds_of(rows, length)
        outlooks = [self._outlook(index, rows, length, ladder) for index in range(len(self._rests))]
        best = self._best(rows, length, ladder, outlooks, plain_seconds)
        return self._trial(best, rows, length, ladder, outlooks, plain_seconds) or best

    def _plain_seconds_of(self, rows: Rows, length: int) -> float:
        """Of a plain step of all rows, as far as rows end at different times on average."""
        left = rows.host_limits - rows.host_lengths
        by_rows = self.tables.plain_by_rows(len(rows), length)
        if not rows.keeps_outputs:
            return float(by_rows[-1])
        return float((steps_with(left[:, None].astype(float))[:, 0] * by_rows).sum()) * len(rows) / float(left.sum())

    def _outlook(self, index: int, rows: Rows, length: int, ladder: np.ndarray) -> Outlook:
        conditional = self.records.acceptance[index].spread_out(rows.row_ids, int(ladder[-1]))
        tokens = 1 + conditional.cumprod(1).cumsum(1)[:, ladder - 1]  # [rows, ladder]
        best, now = self.tables.drafting_by_rows(index, len(rows), length, ladder)
        # Whoever begins to draft catches up once; a few drafts have to pay for it.
        catch_up = self.tables.catch_up(index, len(rows), self._missed[index])
        left = rows.host_limits - rows.host_lengths
        steps = left[:, None] / tokens + STEPS_IN_VAIN
        if not rows.keeps_outputs:  # others take the places of rows that end, so that the batch stays as large
            steps = np.broadcast_to(left.sum() / tokens.sum(0), steps.shape)
        share = steps_with(steps)  # [rows, ladder]
        written = float(left.sum())
        extra = catch_up / SHARED_BY * steps.max(0)
        rates, rates_now = (written / ((share * np.minimum(one, NEVER)).sum(0) + extra) for one in (best, now))
        return Outlook(tokens.sum(0), now[-1], rates, rates_now, catch_up)

    def _best(
        self, rows: Rows, length: int, ladder: np.ndarray, outlooks: list[Outlook], plain_seconds: float
    ) -> Choice:
        """What is expected to give the most tokens per second."""
        plain_rate, self._worth_a_capture = len(rows) / plain_seconds, None
        rates_now = np.stack([outlook.rates_now for outlook in outlooks])
        best, rate = fastest(rates_now, ladder)
        wished, most = fastest(np.stack([outlook.rates for outlook in outlooks]), ladder)
        if self._pays_a_capture(rows, most, max(rate, plain_rate)):
            self._worth_a_capture = best = wished
            rate = most

        now = self._rate_now(rates_now, ladder)
        if now * WORTH_A_CHANGE >= rate:
            best, rate = self.choice, now
        left = self.records.budget.steps - outlooks[best.drafter].catch_up / plain_seconds
        pays = rate > LEAST_SPEED_UP * plain_rate and left > self.records.budget.LOWEST
        return best._replace(is_trial=False) if pays else Choice(self.choice.drafter, 0)

    def _pays_a_capture(self, rows: Rows, rate: float, reached: float) -> bool:
        """reached: tokens per second without it."""
        if rate < WORTH_A_CAPTURE * reached or self._num_since_capture < BETWEEN_CAPTURES:
            return False
        return (1 / reached - 1 / rate) * self._tokens_to_gain(rows) > CAPTURE_SECONDS

    def _tokens_to_gain(self, rows: Rows) -> float:
        """Of all rows, in this call and those like it, that steps of as many rows as now will write: until the first
        row ends."""
        left = min((rows.host_limits - rows.host_lengths).tolist())
        if self._first is None:
            self._first = len(rows), left
        num_rows, tokens = self._first
        per_call = tokens if len(rows) == num_rows else left
        return len(rows) * (left + CALLS_ALIKE * per_call)

    def _rate_now(self, rates: np.ndarray, ladder: np.ndarray) -> float:
        """Of what is drafted now; 0 where nothing is, or there is no room for it."""
        place = int(np.searchsorted(ladder, self.choice.width))
        if not self.choice.width or place == len(ladder):
            return 0.0
        return float(rates[self.choice.drafter, place])

    def _trial(
        self,
        best: Choice,
        rows: Rows,
        length: int,
        ladder: np.ndarray,
        outlooks: list[Outlook],
        plain_seconds: float,
    ) -> Choice | None:
        """A candidate whose rest is over, if the budget bears what trying it is expected to lose."""
        rate, unit = len(rows) / plain_seconds, plain_seconds
        budget: LossBudget = self.records.budget
        if best.width:
            place = int(np.searchsorted(ladder, best.width))
            outlook, budget = outlooks[best.drafter], self.records.trials
            is_ready = np.isfinite(outlook.seconds[place])
            rate = float((outlook.rates_now if is_ready else outlook.rates)[place])
            unit = float(outlook.tokens[place]) / rate

        for index, outlook in enumerate(outlooks):
            if (best.width and index == best.drafter) or self._can_be_watched[index] or self._rests[index] > 0:
                continue
            place = int(outlook.rates_now.argmax())
            seconds = float(outlook.seconds[place]) + outlook.catch_up
            loss = (seconds - float(outlook.tokens[place]) / rate) / unit
            if budget.steps >= max(loss, 0.0):
                self._reference = rate, unit
                return Choice(index, int(ladder[place]), is_trial=True)
            self._rests[index] = self._rest_lengths[index]
        return None

    # ---- after a step

    def learn(self, report: StepReport) -> None:
        records, (drafter, width, is_trial) = self.records, self.choice
        drafted = report.token_ids.shape[1] - 1
        self.tables.step_ended(self.choice, *self._shape, drafted, self._missed[drafter])
        records.budget.add_step()
        records.trials.add_step()
        self._learn_watched()
        most = int(report.num_committed.max(initial=0))
        self._missed = [missed + most for missed in self._missed]
        if not width:
            return

        self._missed[drafter] = 0
        # What stands after the end of a row was not decided.
        asked = np.where(ended_in_draft(report), report.num_accepted, np.minimum(drafted, self._room))
        records.acceptance[drafter].learn(report.row_ids, asked, report.num_accepted)
        if self._num_steps % DECIDE_EVERY == 0:
            records.acceptance[drafter].learn_spread(report.row_ids)

        tokens = float(report.num_committed.sum()) / len(report.row_ids)
        if self._is_wanted:
            return
        records.budget.add_gain(tokens - self._seconds / self._plain_seconds)
        if is_trial:
            self._saw_trial(drafter, float(report.num_committed.sum()))
        else:
            self._rest_lengths[drafter] = self._rests[drafter] = FIRST_REST

    def _saw_trial(self, drafter: int, tokens: float) -> None:
        rate, unit = self._reference
        gain = (tokens / rate - self._seconds) / unit
        self.records.trials.add_gain(min(gain, 0.0))
        longer = min(2 * self._rest_lengths[drafter], LONGEST_REST)
        self._rest_lengths[drafter] = self._rests[drafter] = FIRST_REST if gain > 0 else longer

    # ---- candidates that need no draft to be known

    def _watch(self, rows: Rows) -> None:
        if self._num_steps % WATCH_EVERY or min(rows.num_new_tokens.tolist()) <= WATCHED:
            return
        for index, candidate in enumerate(self.drafter.candidates):
            if self._can_be_watched[index] and not (self.choice.width and index == self.choice.drafter):
                found = candidate.in_hindsight(rows, WATCHED)
                assert found is not None
                self._watched[index] = rows.row_ids.copy(), on_its_way(found)

    def _learn_watched(self) -> None:
        """The step's report, which has just been read, was copied to the host behind what is read here."""
        for index, (row_ids, read) in self._watched.items():
            self.records.acceptance[index].learn(row_ids, np.full(len(row_ids), WATCHED), read())
        self._watched.clear()


def fastest(rates: np.ndarray, ladder: np.ndarray) -> tuple[Choice, float]:
    """rates: [candidates, ladder]."""
    index, place = divmod(int(rates.argmax()), rates.shape[1])
    return Choice(index, int(ladder[place])), float(rates[index, place])


def steps_with(steps: np.ndarray) -> np.ndarray:
    """In how many steps 1, 2 ... rows are left. steps: [rows, choices] until each row ends.

    >>> steps_with(np.array([[5.0], [2.0], [9.0]])).tolist()
    [[4.0], [3.0], [2.0]]
    """
    ordered = np.sort(steps, 0)[::-1]
    ordered[:-1] -= ordered[1:].copy()
    return ordered
