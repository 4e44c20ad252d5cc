"""Prompt lookup: propose what followed the last occurrence of the newest n-gram in the prompt or the output."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from specdec.batch.rows import Rows
from specdec.draft import Draft
from specdec.drafter import Context, Drafter
from specdec.errors import ConfigError
from specdec.kernels.prompt_lookup import prompt_lookup
from specdec.limits import MAX_DRAFT_TOKENS
from specdec.network.base import num_embeddings_of, vocab_size_of


class OneLaunch:
    """Drafts that take one small kernel, however long; as `specdec.drafter.DraftTimings` describes it."""

    SECONDS = 2e-5
    version = 0
    by_tokens = np.full(MAX_DRAFT_TOKENS + 1, SECONDS)

    def seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        return self.by_tokens

    def catch_up(self, num_rows: int, num_missed: int) -> float:
        return 0.0

    def has(self, num_rows: int, used_slots: int) -> bool:
        return True

    def ready_seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        return self.by_tokens

    def measure(self, num_rows: int, used_slots: int) -> None:
        pass


class PromptLookup(Drafter):
    """Costs no network call. The longest matching n-gram wins, and among its occurrences the latest."""

    name = "prompt_lookup"
    shares_slots = True
    proposes_ahead = True
    _copies_are_valid = False  # whether the target may write every token that a row may hold

    def __init__(self, max_ngram_size: int = 3, min_ngram_size: int = 1):
        if not 1 <= min_ngram_size <= max_ngram_size:
            raise ConfigError(
                f"n-gram sizes {min_ngram_size}..{max_ngram_size} are not usable; "
                "need 1 <= min_ngram_size <= max_ngram_size"
            )
        self.max_ngram_size, self.min_ngram_size = max_ngram_size, min_ngram_size

    @property
    def timings(self) -> OneLaunch | None:
        """Beside a target whose steps are not timed by themselves, drafts are not either."""
        return None if self.context is None or self.context.network.timings is None else OneLaunch()

    def start(self, context: Context, rows: Rows) -> None:
        super().start(context, rows)
        target = context.target
        # Prompts may hold whatever the target has an embedding for.
        self._copies_are_valid = num_embeddings_of(target) <= vocab_size_of(target)

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        sizes = self.max_ngram_size, self.min_ngram_size
        drafted = prompt_lookup(rows.token_ids, rows.lengths, rows.max_length, max_tokens, *sizes)
        return Draft.trusted(drafted, is_valid=self._copies_are_valid)

    def in_hindsight(self, rows: Rows, num_tokens: int) -> Tensor:
        """What a draft proposes depends on the text before it alone, so an earlier one can be made at any time."""
        sizes = self.max_ngram_size, self.min_ngram_size
        before = rows.lengths - num_tokens
        drafted = prompt_lookup(rows.token_ids, before, rows.max_length, num_tokens, *sizes)
        return (drafted == rows.last_tokens(num_tokens)).long().cumprod(1).sum(1)
