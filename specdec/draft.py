"""What a drafter hands to the verifier and gets back: tensors alone, at the root of the import order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.commit.greedy_commit import NO_TOKEN as NO_TOKEN


class ExtraQueries(NamedTuple):
    """A branch of queries that a forward takes along after every place of a step (`specdec/batch/columns.py`).

    embeddings: [extra, hidden], input embeddings of the model.
    ahead: [extra] int64, how many places past the end of the text each one stands, never descending: query i between 1
        and i + 1. Several may stand in one place.
    """

    embeddings: Tensor
    ahead: Tensor

    @property
    def num(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True)
class Draft:
    """The proposal of one step.

    token_ids: [rows, k] int64, `NO_TOKEN` where nothing is proposed. A row's proposals form a prefix; k may be 0.
        Row i belongs to `rows.row_ids[i]` of the caller's batch.
    probs: [rows, k, vocab] float, the distribution q that each token was sampled from, over the target's vocabulary.
        None: the drafts are deterministic (one-hot q). Sampling stays lossless only if q is the distribution that was
        sampled from, and no token is dropped after it was sampled.
    parents: [rows, k] int64, the index of each token's parent in a draft tree, -1 for the root. None: a chain, the
        only form that is verified yet.
    extra_queries: queries that the verify forward takes along after every place where the draft may end. Each sees the
        text and the draft up to there, and the queries before it. They do not change what the target says about the
        text. At most `Drafter.num_extra_queries`.
    is_valid: every token is one of the target's, and none follows a `NO_TOKEN`. Only `Draft.trusted` sets it; the
        tokens of other drafts are checked, and cut where they cannot be verified.
    is_normalised: every distribution in `probs` sums to 1. Only `Draft.trusted` sets it; others are added up when
        they are verified.

    A copy made by `dataclasses.replace` loses both marks, since its tensors may be others.
    """

    token_ids: Tensor
    probs: Tensor | None = None
    parents: Tensor | None = None
    extra_queries: ExtraQueries | None = None
    is_valid: bool = field(default=False, init=False)
    is_normalised: bool = field(default=False, init=False)

    @staticmethod
    def trusted(
        token_ids: Tensor, probs: Tensor | None = None, *, is_valid: bool = False, is_normalised: bool = False
    ) -> Draft:
        """A draft whose maker vouches for it: see `is_valid` and `is_normalised`. A wrong promise breaks the output."""
        draft = Draft(token_ids, probs)
        object.__setattr__(draft, "is_valid", is_valid)
        object.__setattr__(draft, "is_normalised", is_normalised)
        return draft

    def with_queries(self, extra_queries: ExtraQueries) -> Draft:
        """The same draft with extra queries; its marks stay."""
        draft = Draft.trusted(self.token_ids, self.probs, is_valid=self.is_valid, is_normalised=self.is_normalised)
        object.__setattr__(draft, "extra_queries", extra_queries)
        return draft

    def of_rows(self, index: Tensor) -> Draft:
        """A copy for the rows that are left, without extra queries. index: [rows] int64 on the device."""
        return Draft(self.token_ids[index], None if self.probs is None else self.probs[index])

    @staticmethod
    def empty(num_rows: int, device: torch.device) -> Draft:
        return _empty(num_rows, device)


@cache
def _empty(num_rows: int, device: torch.device) -> Draft:
    return Draft(torch.empty(num_rows, 0, dtype=torch.long, device=device))


@dataclass(frozen=True)
class Verified:
    """What the target made of one draft.

    draft: the draft that was verified.
    num_accepted: [rows] int64, draft tokens accepted and committed.
    num_committed: [rows] int64, tokens committed: the accepted ones and the target's own next token, cut at the
        end of sequence and at the length limit.
    host_lengths: [rows] int64 on the host, each row's committed length after the step.
    hidden_states: one [rows, k + 1, hidden] tensor per layer in `Drafter.target_layers`. Position j holds the state
        from which the target predicted the token after draft token j.
    extra_logits: the target's logits at the draft's extra queries, if it has any: a function from the number of draft
        tokens before the end that is meant, [rows] int64, to [rows, extra, vocab]. Ask it in `observe`: afterwards rows
        may move or leave.
    row_ids, committed_ids: [rows] and [rows, k + 1] int64 on the host, the rows by their ids and what each committed,
        `NO_TOKEN` after it: for drafters on the host, which need not ask the device.
    is_own: [rows] bool on the host, the rows whose draft is the one that this drafter proposed. None: all of them. In
        the others another drafter's tokens were verified, and what this one has drafted was committed nowhere.
    """

    draft: Draft
    num_accepted: Tensor
    num_committed: Tensor
    host_lengths: np.ndarray
    hidden_states: tuple[Tensor, ...] = ()
    extra_logits: Callable[[Tensor], Tensor] | None = None
    is_own: np.ndarray | None = None
    row_ids: np.ndarray | None = None
    committed_ids: np.ndarray | None = None


@dataclass(frozen=True)
class Shown:
    """A token that a drafter has just drafted for each row, as a length policy sees it.

    place: its index in the draft, from 0 (a tensor within a CUDA graph).
    token_ids: [rows] int64, NO_TOKEN where there is none.
    logits: [rows, vocab], the drafter's own that the token was chosen by: temperature 1, before any processor.
    hidden_states: [rows, hidden], the drafter's last, after its final norm, that the logits were computed from.
    """

    place: Any
    token_ids: Tensor
    logits: Tensor
    hidden_states: Tensor | None = None
