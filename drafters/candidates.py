"""A list of drafters, of which the length policy takes one in each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from specdec.batch.rows import Rows
from specdec.draft import Draft, Verified
from specdec.drafter import Context, Drafter
from specdec.drafters.several import Several
from specdec.errors import DrafterError


class Candidates(Several):
    """One of them drafts for all rows of a step. Which one, nothing that is drafted in the step decides, so
    verification stays lossless.

    The others let the step pass: they see in `observe` that the draft was none of theirs, and a draft model caches what
    it has missed when its turn comes.
    """

    needs_choice = True

    def __init__(self, parts: Sequence[Drafter], has_plain: bool = False):
        """has_plain: whether the list names plain decoding too, which a policy that chooses always considers."""
        for part in parts:
            if not isinstance(part, Drafter):
                raise DrafterError(f"candidates are Drafter instances, not a {type(part).__name__}")
            # Extra queries of one step give the next step's draft, so no step may pass without them.
            if part.num_extra_queries:
                raise DrafterError(
                    f"drafter {part.name!r} has to draft in every step, so it cannot be one of several candidates; "
                    "pass it alone, or combine it as 'prompt_lookup+...'"
                )
        super().__init__(parts, ", ".join([part.name for part in parts] + ["none"] * has_plain))
        # The index of the step's drafter, and of the one that is asked next: within a step that may be the next step's.
        self._verified = self._asked_next = 0

    @property
    def candidates(self) -> tuple[Drafter, ...]:
        return self.parts

    @property
    def proposes_ahead(self) -> bool:  # type: ignore[override]
        return self.parts[self._asked_next].proposes_ahead

    def choose(self, index: int, is_ahead: bool = False) -> None:
        self._asked_next = index
        if not is_ahead:
            self._verified = index

    def start(self, context: Context, rows: Rows) -> None:
        self.choose(0)
        super().start(context, rows)

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        draft = self._asked(self.parts[self._asked_next], rows, max_tokens)
        self._count_calls()
        return draft

    def begin(self, rows: Rows) -> None:
        self.parts[self._asked_next].begin(rows)
        self._count_calls()

    def observe(self, verified: Verified) -> None:
        nothing = np.zeros(len(verified.host_lengths), dtype=bool)
        for index, part in enumerate(self.parts):
            is_own = verified.is_own if index == self._verified else nothing
            states = self._states_of(part, verified.hidden_states)
            part.observe(replace(verified, hidden_states=states, is_own=is_own))
        self._count_calls()
