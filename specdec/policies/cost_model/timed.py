"""What steps cost where only the steps of a generation show it: for a list of drafters on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedModel

from specdec.drafter import Drafter
from specdec.kept import kept_with
from specdec.policies.cost_model.knowledge import Knowledge, knowledge_of
from specdec.policies.cost_model.tables import Choice, Tables
from specdec.policies.costs import CostClock

WIDTH_TO_TIME, TIMES = 2, 2  # draft tokens, and how often: the first time of a shape says little


class TimedTables(Tables):
    """As `Tables`. Each drafter is tried a few times, and each step is timed; what that shows is kept with the pair."""

    def __init__(self, target: PreTrainedModel, drafter: Drafter, clock: CostClock):
        self.clock = clock
        self.known = [knowledge_of(target, candidate) for candidate in drafter.candidates]
        self.target = kept_with(target, (TimedTables, target.device, target.dtype), Knowledge).verify
        self._begin: Any = None
        self._drafted: Any = None

    def verify(self, num_rows: int, length: int) -> np.ndarray:
        """Of the target's forward by width, [MAX_TOKENS + 1]."""
        seconds = self.target.curve(num_rows, length).seconds.copy()
        seconds[1] = seconds[1:].min()  # a plain step that seems slower than a wider one is noise
        return seconds

    def plain(self, num_rows: int, length: int) -> float:
        return float(self.verify(num_rows, length)[1])

    def drafting(self, drafter: int, num_rows: int, length: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seconds = self.verify(num_rows, length)[tokens + 1]
        seconds = seconds + self.known[drafter].draft.curve(num_rows, length).seconds[tokens]
        return seconds, seconds

    def draft_step(self, drafter: int, num_rows: int, length: int, tokens: int) -> float:
        return float(self.drafting(drafter, num_rows, length, np.array([tokens]))[1][0])

    def drafting_by_rows(self, drafter: int, num_rows: int, length: int, tokens: np.ndarray) -> np.ndarray:
        """Of fewer rows nothing is known yet, so they count as much as all."""
        seconds = np.stack(self.drafting(drafter, num_rows, length, tokens))
        return np.broadcast_to(seconds[:, None], (2, num_rows, len(tokens)))

    def plain_by_rows(self, num_rows: int, length: int) -> np.ndarray:
        return np.full(num_rows, self.plain(num_rows, length))

    def catch_up(self, drafter: int, num_rows: int, num_missed: int) -> float:
        known = self.known[drafter]
        return known.catch_up_seconds(known.draft.curve(num_rows, num_missed), num_rows, num_missed)

    def is_ready(self, choice: Choice, num_rows: int, length: int) -> bool:
        return True

    def serves(self, choice: Choice, num_rows: int, length: int) -> bool:
        return True

    def make_ready(self, choice: Choice, num_rows: int, length: int) -> None:
        pass

    def make_ready_to_draft(self, drafter: int, num_rows: int, length: int) -> None:
        pass

    def wanted(self, num_rows: int, length: int, max_tokens: int) -> Choice | None:
        plain = self.target.curve(num_rows, length).samples.get(1, ())
        if not plain:
            return Choice(0, 0, is_trial=True)
        for index, known in enumerate(self.known):
            times = [len(found) for curve in known.draft.curves.values() for found in curve.samples.values()]
            if sum(times) < TIMES and max_tokens >= WIDTH_TO_TIME:
                return Choice(index, WIDTH_TO_TIME, is_trial=True)
        return None

    def step_began(self) -> None:
        self._begin = self.clock.mark()

    def step_drafted(self) -> None:
        self._drafted = self.clock.mark()

    def step_ended(self, choice: Choice, num_rows: int, length: int, num_drafted: int, num_missed: int) -> None:
        end = self.clock.mark()
        self.target.curve(num_rows, length).add_warm(num_drafted + 1, self.clock.seconds(self._drafted, end))
        if num_drafted:
            known = self.known[choice.drafter]
            seconds = self.clock.seconds(self._begin, self._drafted)
            known.learn_draft(known.draft.curve(num_rows, length), num_rows, num_missed, num_drafted, seconds)
