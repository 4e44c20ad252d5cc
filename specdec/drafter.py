"""What a drafter is: something that proposes tokens which the target then verifies.

The core knows this file and no drafter by name. Everything a drafter may need arrives through four calls a step
at most, and each has a default, so that the smallest drafter is one method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from specdec.batch.layout import Layout
    from specdec.batch.rows import Rows
    from specdec.draft import ExtraQueries
    from specdec.policies.length import LengthPolicy
    from specdec.verify.sampler import Sampler

NO_TOKEN = -1  # in a draft: nothing was proposed here; in committed tokens: nothing was committed here


@dataclass(frozen=True)
class Draft:
    """The proposal of one step.

    token_ids: [rows, k] int64, `NO_TOKEN` where nothing is proposed; a row's proposals form a prefix, k may be 0.
        Row i belongs to `rows.row_ids[i]` of the caller's batch.
    probs: [rows, k, vocab] float, the distribution q that each token was sampled from, over the target's vocabulary;
        None means that the drafts are deterministic (one-hot q). Samples are lossless only if q is what was sampled
        from, and no token is dropped after it was sampled.
    parents: [rows, k] int64, the index of each token's parent in a draft tree, -1 for the root; None means a chain,
        which is all that is verified yet.
    extra_queries: what the verify forward takes along behind every place where the draft may end: each query sees the
        text and the draft up to there and the queries before it. They change nothing of what the target says about
        the text. At most `Drafter.num_extra_queries`.
    valid_ids: the same tensor as `token_ids` where that holds tokens of the target and nothing behind a `NO_TOKEN` by
        the way it was made, and is not written to afterwards. Others lack the mark, and what of them cannot be verified
        is cut.
    normalised_probs: the same tensor as `probs` where that is as `Sampler.sample` left it and sums to 1 by the way it
        was made. A copy of the draft with other probs lacks the mark: they are added up when they are verified.
    """

    token_ids: Tensor
    probs: Tensor | None = None
    parents: Tensor | None = None
    extra_queries: ExtraQueries | None = None
    normalised_probs: Tensor | None = None
    valid_ids: Tensor | None = None

    @property
    def is_valid(self) -> bool:
        return self.token_ids is self.valid_ids

    @property
    def is_normalised(self) -> bool:
        return self.probs is self.normalised_probs

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
    all_accepted: whether any row had its whole draft accepted (known on the host without another copy).
    host_lengths: [rows] int64, each row's committed length behind the step, on the host.
    hidden_states: one [rows, k + 1, hidden] tensor per layer in `Drafter.target_layers`; position j holds the state
        from which the target predicted the token after draft token j.
    extra_logits: the target's logits at the draft's extra queries, if it has any: from the number of draft tokens
        before the end that is meant, [rows] int64, to [rows, extra, vocab]. To be asked in `observe`: afterwards
        rows may move or leave.
    """

    draft: Draft
    num_accepted: Tensor
    num_committed: Tensor
    all_accepted: bool
    host_lengths: np.ndarray
    hidden_states: tuple[Tensor, ...] = ()
    extra_logits: Callable[[Tensor], Tensor] | None = None


class Drafter(ABC):
    """Proposes draft tokens for every row of a ragged batch.

    One instance serves one `generate` call at a time. Greedy output never depends on what is proposed, so a drafter
    may be wrong, late or random; it must only keep to the shapes. The smallest one, which repeats the last token:

        class Echo(Drafter):
            name = "echo"

            def propose(self, rows, max_tokens):
                return Draft(rows.last_tokens(1).expand(-1, max_tokens))
    """

    name: str = "drafter"
    target_layers: tuple[int, ...] = ()  # indices into the target's hidden states that `observe` wants to see
    num_extra_queries: int = 0  # the most that `Draft.extra_queries` holds; the caches leave room for them
    is_busy: bool = False  # between `start` and `finish`
    num_calls: int = 0  # forwards of the drafter's own network since `start`
    # Set before `start` when the output is sampled. A drafter may sample by it and return the distributions in
    # `Draft.probs`; one that does not has its drafts verified as deterministic ones, which is lossless too.
    sampler: Sampler | None = None
    # Set before `check`: how the caches of this generation are laid out. A drafter with a network of its own builds
    # it with this layout.
    layout: Layout | None = None
    # What it can show of a token it has just drafted, of "logits" and "hidden_states" (see
    # `specdec.policies.length.Shown`). One that shows anything drafts token by token and asks `length_policy.goes_on`
    # behind each, where that is set: rows that do not go on get no further token. The others draft as many tokens as
    # they are asked for.
    shows: frozenset[str] = frozenset()
    length_policy: LengthPolicy | None = None  # set before `start` if the policy sees drafted tokens
    model: Any = None  # its own network, a PreTrainedModel, for which a head may have been trained
    kv_model: Any = None  # a PreTrainedModel that it caches as many rows and tokens of as the target's cache holds
    # Whether `propose` and `observe` may see other rows of the batch each time, and new ones: whatever the drafter
    # keeps per row, it then keeps by slot or by `rows.row_ids`, and `join` and `resize` say what to keep.
    shares_slots: bool = False
    # Whether `propose` needs of `rows` only their tensors and `max_length`: it may then be called when `begin` is,
    # before `observe`, for rows that have ended too, and for more tokens than there is room for (which are cut).
    proposes_ahead: bool = False

    def check(self, target: PreTrainedModel, max_length: int) -> None:  # noqa: B027 - optional hook
        """Raise DrafterError if this drafter cannot serve `target` for sequences of `max_length` tokens."""

    def start(self, target: PreTrainedModel, rows: Rows, max_draft_tokens: int) -> None:
        """Begin a generation: `rows` holds the prompts, and no token has been generated yet."""
        self.num_calls = 0

    @abstractmethod
    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        """Propose up to `max_tokens` (>= 1) tokens to follow each row's committed tokens.

        A length policy may let steps pass without asking, so rows may have grown by any number since the last call.
        """

    def begin(self, rows: Rows) -> None:  # noqa: B027 - optional hook
        """Launch what can be of the next `propose`, while the host has not yet read what the step before it committed.

        The tensors of `rows` are those that `propose` will find, but `host_lengths` are still those before the step
        (`max_length` bounds the new ones), and rows may leave or move before `propose` (`keep_rows` says which), which
        may not be called at all.
        """

    def observe(self, verified: Verified) -> None:  # noqa: B027 - optional hook
        """See what became of the last draft; `rows` given to the next `propose` already contains the result."""

    def keep_rows(self, index: Tensor) -> None:  # noqa: B027 - optional hook
        """Rows moved or left: the row in slot i is now the one that was in slot index[i] (int64, [slots], on the host).

        Without turns and newcomers these are all the rows that are left. With them (`shares_slots`), rows behind the
        index stay where they are, and those behind `rows` wait for their turn.
        """

    def join(self, rows: Rows, begin: int, end: int) -> None:  # noqa: B027 - optional hook
        """Newcomers: the tokens in columns begin .. end - 1 of these rows, which stand in slots from `rows.first` on.

        Called for each piece of their prompts, before `propose` sees them; asked only of drafters that share slots.
        """

    def resize(self, num_slots: int, capacity: int) -> None:  # noqa: B027 - optional hook
        """There are now `num_slots` slots of `capacity` tokens; asked only of drafters that share slots."""

    def finish(self) -> None:  # noqa: B027 - optional hook
        """The generation is over, by success or by an exception; give back what `start` took."""


class NoDrafts(Drafter):
    """Plain decoding: every step commits the target's next token."""

    name = "none"
    shares_slots = True
    proposes_ahead = True

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        return Draft.empty(len(rows), rows.device)
