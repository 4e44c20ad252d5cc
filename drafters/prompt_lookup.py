"""Prompt lookup: propose what followed the last occurrence of the newest n-gram in the prompt or the output."""

from __future__ import annotations

import torch

from specdec.drafter import NO_TOKEN, Draft, Drafter
from specdec.errors import ConfigError
from specdec.rows import Rows


class PromptLookup(Drafter):
    """Costs no network call. The longest matching n-gram wins, and among its occurrences the latest."""

    name = "prompt_lookup"
    shares_slots = True

    def __init__(self, max_ngram_size: int = 3, min_ngram_size: int = 1):
        if not 1 <= min_ngram_size <= max_ngram_size:
            raise ConfigError(
                f"n-gram sizes {min_ngram_size}..{max_ngram_size} are not usable; "
                "need 1 <= min_ngram_size <= max_ngram_size"
            )
        self.max_ngram_size, self.min_ngram_size = max_ngram_size, min_ngram_size

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        tokens, lengths = rows.token_ids[:, : rows.max_length], rows.lengths
        place = torch.arange(tokens.shape[1], device=tokens.device)
        # matched[b, i]: how many tokens ending at place i equal the row's newest ones, at most max_ngram_size.
        matched = torch.zeros_like(tokens)
        agrees = place < lengths[:, None] - 1  # an occurrence must have a successor
        for offset in range(self.max_ngram_size):
            newest = tokens.gather(1, (lengths[:, None] - 1 - offset).clamp(min=0))
            shifted = torch.roll(tokens, offset, 1)
            agrees = agrees & (shifted == newest) & (place >= offset) & (lengths[:, None] > offset)
            matched += agrees
        score = torch.where(matched >= self.min_ngram_size, matched * (tokens.shape[1] + 1) + place + 1, 0)
        best, end = score.max(1, keepdim=True)
        # Where the copy reaches the newest token it goes on copying itself, so that a loop is drafted to any length.
        period = (lengths[:, None] - 1 - end).clamp(min=1)
        source = end + 1 + torch.arange(max_tokens, device=tokens.device) % period
        draft = tokens.gather(1, source.clamp(max=tokens.shape[1] - 1))
        return Draft(draft.masked_fill(best == 0, NO_TOKEN))
