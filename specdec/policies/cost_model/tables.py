"""What steps cost where networks time their steps by themselves: nothing is learned from the steps of a generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np

from specdec.drafter import Drafter, DraftTimings
from specdec.network.base import Network, Timings
from specdec.policies.costs import context_bucket


class Choice(NamedTuple):
    """What a step does. drafter: the index of a candidate. width: draft tokens of each row, 0 for plain decoding.
    is_trial: drafts although something else is expected to be faster."""

    drafter: int
    width: int
    is_trial: bool = False


class Tables:
    """Costs by rows, length of the longest row and tokens, from the timings of the target and the candidates."""

    def __init__(self, network: Network, candidates: tuple[Drafter, ...]):
        self.network, self.candidates = network, candidates
        self._made: dict[Hashable, tuple[int, np.ndarray]] = {}  # with the version of what it was made from

    @classmethod
    def of(cls, drafter: Drafter) -> Tables | None:
        """None where the target's steps or any candidate's drafts are not timed by themselves."""
        if drafter.context is None or drafter.context.network.timings is None:
            return None
        if any(candidate.timings is None for candidate in drafter.candidates):
            return None
        return cls(drafter.context.network, drafter.candidates)

    @property
    def _target(self) -> Timings:
        timings = self.network.timings
        assert timings is not None
        return timings

    def _drafts(self, drafter: int) -> DraftTimings:
        timings = self.candidates[drafter].timings
        assert timings is not None
        return timings

    def plain(self, num_rows: int, length: int) -> float:
        """Seconds of a plain step as it runs now."""
        target = self._target
        seconds, now = float(target.seconds(num_rows, length)[1]), float(target.ready_seconds(num_rows, length)[1])
        return max(seconds, now) if now < math.inf else seconds

    def drafting(self, drafter: int, num_rows: int, length: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of steps that draft so many tokens, [choices] above 0, without catching up: once everything is
        captured, and now, infinite where something would have to be."""
        target, drafts, width = self._target, self._drafts(drafter), tokens + 1
        best = target.seconds(num_rows, length)[width] + drafts.seconds(num_rows, length)[tokens]
        now = target.ready_seconds(num_rows, length)[width] + drafts.ready_seconds(num_rows, length)[tokens]
        return best, np.maximum(best, now)

    def draft_step(self, drafter: int, num_rows: int, length: int, tokens: int) -> float:
        """Seconds of one step that drafts so many tokens, above 0, as it runs now."""
        made = self._kept(
            (drafter, num_rows, -tokens, context_bucket(length)),
            self._target.version + self._drafts(drafter).version,
            lambda: self.drafting(drafter, num_rows, length, np.array([tokens]))[1],
        )
        return float(made[0])

    def drafting_by_rows(self, drafter: int, num_rows: int, length: int, tokens: np.ndarray) -> np.ndarray:
        """The same for 1 to num_rows rows, [2, rows, choices]."""
        return self._kept(
            (drafter, num_rows, len(tokens), context_bucket(length)),
            self._target.version + self._drafts(drafter).version,
            lambda: np.stack(
                [np.stack(self.drafting(drafter, rows, length, tokens)) for rows in range(1, num_rows + 1)], 1
            ),
        )

    def plain_by_rows(self, num_rows: int, length: int) -> np.ndarray:
        """Seconds of a plain step of 1 to num_rows rows, [rows]."""
        return self._kept(
            (num_rows, context_bucket(length)),
            self._target.version,
            lambda: np.array([self.plain(rows, length) for rows in range(1, num_rows + 1)]),
        )

    def _kept(self, key: Hashable, version: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        found = self._made.get(key)
        if found is None or found[0] != version:
            found = self._made[key] = version, make()
        return found[1]

    def catch_up(self, drafter: int, num_rows: int, num_missed: int) -> float:
        """Seconds that a draft takes longer after `num_missed` tokens that the drafter has not seen."""
        return self._drafts(drafter).catch_up(num_rows, num_missed)

    def is_ready(self, choice: Choice, num_rows: int, length: int) -> bool:
        """Whether such a step captures nothing new, and what it takes is known."""
        if not self._target.has(num_rows, choice.width + 1, length + choice.width):
            return False
        return choice.width == 0 or self._drafts(choice.drafter).has(num_rows, length)

    def serves(self, choice: Choice, num_rows: int, length: int) -> bool:
        """Whether such a step captures nothing new, though what it takes may be known roughly."""
        tokens = np.array([choice.width])
        if choice.width:
            return bool(np.isfinite(self.drafting(choice.drafter, num_rows, length, tokens)[1][0]))
        return bool(np.isfinite(self._target.ready_seconds(num_rows, length)[1]))

    def make_ready(self, choice: Choice, num_rows: int, length: int) -> None:
        """No forward may be on its way: see `Timings.measure`."""
        self._target.measure(num_rows, choice.width + 1, length + choice.width)
        if choice.width:
            self.make_ready_to_draft(choice.drafter, num_rows, length)

    def make_ready_to_draft(self, drafter: int, num_rows: int, length: int) -> None:
        self._drafts(drafter).measure(num_rows, length)

    # ---- for tables that have to be learned from the steps

    def wanted(self, num_rows: int, length: int, max_tokens: int) -> Choice | None:
        """What has to be tried before anything can be chosen."""
        return None

    def step_began(self) -> None:
        pass

    def step_drafted(self) -> None:
        pass

    def step_ended(self, choice: Choice, num_rows: int, length: int, num_drafted: int, num_missed: int) -> None:
        pass
