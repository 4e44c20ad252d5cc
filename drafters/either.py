"""Two drafters as one: for each row the first one's draft where it has any, else the second one's."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.rows import Rows
from specdec.batch.slots import to_device
from specdec.draft import NO_TOKEN, Draft, Verified
from specdec.drafter import Context, Drafter, check_contract
from specdec.errors import DrafterError


class Either(Drafter):
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
        self.name = f"{first.name}+{second.name}"
        self._check_parts()

        self.kv_model = first.kv_model if first.kv_model is not None else second.kv_model
        self.num_extra_queries = max(first.num_extra_queries, second.num_extra_queries)
        self.target_layers = tuple(dict.fromkeys((*first.target_layers, *second.target_layers)))
        self.shares_slots = first.shares_slots and second.shares_slots
        self._started: list[Drafter] = []
        # Which rows of the last draft are `first`'s, [rows] bool; None between a step and the next draft.
        self._is_first: np.ndarray | None = None

    @property
    def parts(self) -> tuple[Drafter, Drafter]:
        return self.first, self.second

    def _check_parts(self) -> None:
        """Raise DrafterError for two drafters that cannot work on one batch."""
        first, second = self.parts
        if set(map(id, leaves(first))) & set(map(id, leaves(second))):
            raise DrafterError(f"drafter {self.name!r} uses one instance twice; make one for each place")
        if first.kv_model is not None and second.kv_model is not None:
            raise DrafterError(
                f"drafters {first.name!r} and {second.name!r} each have a network with a cache of its own, and there "
                "is room for one; combine one of them with a drafter without a network, such as prompt_lookup"
            )
        if first.num_extra_queries and second.num_extra_queries:
            raise DrafterError(
                f"drafters {first.name!r} and {second.name!r} both put queries into the target's forwards, which take "
                "those of one; combine one of them with a drafter without such queries, such as prompt_lookup"
            )

    def check(self, target: PreTrainedModel, max_length: int) -> None:
        for part in self.parts:
            check_contract(part)
            part.check(target, max_length)

    def start(self, context: Context, rows: Rows) -> None:
        super().start(context, rows)
        self._is_first = None
        for part in self.parts:
            if part.is_busy:
                raise DrafterError(
                    f"drafter {part.name!r} is already at work in another generate call; make one for each"
                )
            check_contract(part)

        # No policy: it would be shown tokens of drafts that are not taken.
        own = replace(context, policy=None)
        for part in self.parts:
            part.is_busy = True
            self._started.append(part)
            part.start(own, rows)

    def read(self, rows: Rows, begin: int, end: int, states: tuple[Tensor, ...]) -> None:
        for part in self.parts:
            if part.target_layers:
                part.read(rows, begin, end, self._states_of(part, states))

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        draft = self._asked(self.first, rows, max_tokens)
        self._is_first = has_draft(draft)

        # Extra queries give the next step's draft, so a drafter that has some is asked at each step.
        if not self._is_first.all() or self.second.num_extra_queries:
            other = self._asked(self.second, rows, max_tokens)
            draft = merged(draft, other, self._is_first)
        self._count_calls()
        return draft

    def _asked(self, part: Drafter, rows: Rows, max_tokens: int) -> Draft:
        draft = part.propose(rows, max_tokens)
        if not isinstance(draft, Draft):
            raise DrafterError(
                f"drafter {part.name!r} proposed a {type(draft).__name__}; propose() must return a Draft"
            )
        if draft.parents is not None:
            raise DrafterError(
                f"drafter {part.name!r} proposed a tree; only chains are verified yet, leave parents=None"
            )
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

    def keep_rows(self, index: Tensor) -> None:
        for part in self.parts:
            part.keep_rows(index)

    def join(self, rows: Rows, begin: int, end: int) -> None:
        for part in self.parts:
            part.join(rows, begin, end)

    def resize(self, num_slots: int, capacity: int) -> None:
        for part in self.parts:
            part.resize(num_slots, capacity)

    def finish(self) -> None:
        """Also where `start` failed on the way: only those that were started finish, and all of them do."""
        with ExitStack() as stack:
            for part in self._started:
                part.is_busy, part.context = False, None
                stack.callback(part.finish)
        self._started, self._is_first = [], None

    def _states_of(self, part: Drafter, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of the hidden states in `target_layers` those that a part asked for; none where none were computed."""
        return tuple(states[self.target_layers.index(layer)] for layer in part.target_layers) if states else ()

    def _count_calls(self) -> None:
        self.num_calls = self.first.num_calls + self.second.num_calls


def leaves(drafter: Drafter) -> list[Drafter]:
    """The drafters that a combination consists of."""
    if not isinstance(drafter, Either):
        return [drafter]
    return [*leaves(drafter.first), *leaves(drafter.second)]


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
