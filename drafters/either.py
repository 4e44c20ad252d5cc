"""Two drafters as one: for each row the first one's draft where it has any, else the second one's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.batch.rows import Rows
from specdec.batch.slots import to_device
from specdec.draft import NO_TOKEN, Draft, Verified
from specdec.drafter import Context, Drafter, DraftTimings
from specdec.drafters.several import Several
from specdec.errors import DrafterError


class BothTimings:
    """Of drafts that both parts are asked for, which is the most that they take; as `specdec.drafter.DraftTimings`
    describes it."""

    def __init__(self, first: DraftTimings, second: DraftTimings):
        self.parts = first, second

    @property
    def version(self) -> int:
        return sum(part.version for part in self.parts)

    def seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        first, second = (part.seconds(num_rows, used_slots) for part in self.parts)
        both: np.ndarray = first + second
        return both

    def catch_up(self, num_rows: int, num_missed: int) -> float:
        return sum(part.catch_up(num_rows, num_missed) for part in self.parts)

    def has(self, num_rows: int, used_slots: int) -> bool:
        return all(part.has(num_rows, used_slots) for part in self.parts)

    def ready_seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        first, second = (part.ready_seconds(num_rows, used_slots) for part in self.parts)
        both: np.ndarray = first + second
        return both

    def measure(self, num_rows: int, used_slots: int) -> None:
        for part in self.parts:
            part.measure(num_rows, used_slots)


class Either(Several):
    """Asks `first` at each step, and `second` only where `first` has no draft for some row.

    Which of them drafts for a row depends on nothing that `second` samples, and on no value of what `first` samples. A
    row's draft is handed over whole. So verification stays lossless, with each row's own distributions.

    It shows length policies no tokens: `second` drafts for rows whose draft is not taken.
    """

    name = "either"

    def __init__(self, first: Drafter, second: Drafter):
        for part in (first, second):
            if not isinstance(part, Drafter):
                raise DrafterError(f"either() takes two Drafter instances, not a {type(part).__name__}")
        self.first, self.second = first, second
        super().__init__((first, second), f"{first.name}+{second.name}")
        # Which rows of the last draft are `first`'s, [rows] bool; None between a step and the next draft.
        self._is_first: np.ndarray | None = None

    @property
    def timings(self) -> BothTimings | None:
        first, second = self.first.timings, self.second.timings
        return None if first is None or second is None else BothTimings(first, second)

    def start(self, context: Context, rows: Rows) -> None:
        self._is_first = None
        super().start(context, rows)

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        draft = self._asked(self.first, rows, max_tokens)
        self._is_first = has_draft(draft)

        # Extra queries give the next step's draft, so a drafter that has some is asked at each step.
        if not self._is_first.all() or self.second.num_extra_queries:
            other = self._asked(self.second, rows, max_tokens)
            draft = merged(draft, other, self._is_first)
        self._count_calls()
        return draft

    def begin(self, rows: Rows) -> None:
        """A part that drafted for all rows is likely to be asked next. What a part keeps of other rows is wrong until
        it has observed the step."""
        if self._is_first is None or self._is_first.all():
            self.first.begin(rows)
        elif not self._is_first.any():
            self.second.begin(rows)
        self._count_calls()

    def observe(self, verified: Verified) -> None:
        for part, is_mine in zip(self.parts, self._shares(), strict=True):
            is_own = verified.is_own
            if is_mine is not None:
                is_own = is_mine if is_own is None else is_mine & is_own
            states = self._states_of(part, verified.hidden_states)
            part.observe(replace(verified, hidden_states=states, is_own=is_own))
        self._is_first = None
        self._count_calls()

    def _shares(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Which rows of the last draft are whose, [rows] bool; None if nobody was asked in this step."""
        if self._is_first is None:
            return None, None
        return self._is_first, ~self._is_first

    def finish(self) -> None:
        self._is_first = None
        super().finish()


def has_draft(draft: Draft) -> np.ndarray:
    """For which rows at least one token is proposed, [rows] bool on the host."""
    if not draft.token_ids.shape[1]:
        return np.zeros(len(draft.token_ids), dtype=bool)
    return (draft.token_ids[:, 0] >= 0).cpu().numpy()


def merged(first: Draft, second: Draft, is_first: np.ndarray) -> Draft:
    """Row i of `first` where is_first[i] ([rows] bool), else of `second`."""
    queries = first.extra_queries if first.extra_queries is not None else second.extra_queries
    if is_first.all() or not is_first.any():
        chosen = first if is_first.all() else second
        return chosen if queries is None or chosen.extra_queries is queries else chosen.with_queries(queries)

    width = max(first.token_ids.shape[1], second.token_ids.shape[1])
    takes_first = to_device(is_first, first.token_ids.device)
    ids, other_ids = (padded(draft.token_ids, width) for draft in (first, second))
    probs = None
    given = [draft.probs for draft in (first, second) if draft.probs is not None]
    if given:
        # A draft without distributions is deterministic; among sampled ones that is a one-hot distribution.
        own, other = probs_of(first, width, given[0]), probs_of(second, width, given[0])
        probs = torch.where(takes_first[:, None, None], own, other)

    draft = Draft.trusted(
        torch.where(takes_first[:, None], ids, other_ids),
        probs,
        is_valid=first.is_valid and second.is_valid,
        is_normalised=all(draft.probs is None or draft.is_normalised for draft in (first, second)),
    )
    return draft if queries is None else draft.with_queries(queries)


def padded(token_ids: Tensor, width: int) -> Tensor:
    """[rows, width] int64, NO_TOKEN past the draft."""
    return F.pad(token_ids, (0, width - token_ids.shape[1]), value=NO_TOKEN)


def probs_of(draft: Draft, width: int, like: Tensor) -> Tensor:
    """The distributions of a draft, [rows, width, vocab], zeros past its end. like: those of either draft."""
    if draft.probs is not None:
        return F.pad(draft.probs, (0, 0, 0, width - draft.probs.shape[1]))
    ids, vocab_size = padded(draft.token_ids, width), like.shape[2]
    # Ids that are not tokens of the target are cut before they are verified.
    is_token = (ids >= 0) & (ids < vocab_size)
    one_hot = like.new_zeros(len(ids), width, vocab_size)
    return one_hot.scatter_(2, ids.clamp(0, vocab_size - 1)[..., None], is_token[..., None].to(like.dtype))
