"""The contract of a drafter: it proposes tokens that the target then verifies.

The core knows this file and no drafter by name. A drafter gets all it may need through at most four calls a step. Each
call has a default, so the smallest drafter is one method.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.layout import Layout
from specdec.batch.rows import Rows
from specdec.draft import Draft, Shown, Verified
from specdec.errors import DrafterError
from specdec.network.base import Network
from specdec.verify.sampler import Sampler


class Watcher(Protocol):
    """The part of a length policy that a drafter asks while it drafts.

    sees: what it looks at of each drafted token, of "logits" and "hidden_states".
    """

    sees: frozenset[str]

    def goes_on(self, rows: Rows, shown: Shown) -> np.ndarray:
        """Which rows draft another token, [rows] bool."""


class DraftTimings(Protocol):
    """What drafts take, without a generation's own steps being timed. Each shape is timed once, by itself."""

    @property
    def version(self) -> int:
        """Another one as soon as anything below says something else."""

    def seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        """[MAX_DRAFT_TOKENS + 1] float64 by tokens of a row, in a step after one that drafted; do not write to it.
        `measure` must have been called before, for any shape."""

    def catch_up(self, num_rows: int, num_missed: int) -> float:
        """Seconds that a draft takes longer after `num_missed` tokens of each row that were committed since the last
        one."""

    def has(self, num_rows: int, used_slots: int) -> bool:
        """Whether the forwards of this shape were timed, and are therefore ready to run."""

    def ready_seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        """The same of what would run now without a capture; infinite where nothing would."""

    def measure(self, num_rows: int, used_slots: int) -> None:
        """Time them, unless that was done before. No draft may be on its way."""


@dataclass(frozen=True)
class Context:
    """One generation, as its drafter sees it.

    network: the target over its cache. `network.model` is the target model.
    layout: how the caches lie; a drafter with a network of its own builds it with this layout.
    max_draft_tokens: the most tokens of a draft, per row and step.
    sampler: how to sample drafts, None where all rows are greedy. A drafter may sample by it and return the
        distributions in `Draft.probs`. The drafts of one that does not are verified as deterministic ones, which is
        lossless too.
    exact: whether models on a GPU run batch-invariant kernels, as in `generate`.
    policy: the length policy, if it looks at drafted tokens; else None. A drafter that `shows` tokens asks it after
        each one, and rows that do not go on get no further token.
    """

    network: Network
    layout: Layout
    max_draft_tokens: int
    sampler: Sampler | None = None
    policy: Watcher | None = None
    exact: bool = True

    @property
    def target(self) -> PreTrainedModel:
        return self.network.model

    def sampler_for(self, rows: Rows) -> Sampler | None:
        """The sampler, or None if none of these rows is sampled."""
        return self.sampler if self.sampler is not None and self.sampler.is_needed(rows) else None


class Drafter(ABC):
    """Proposes draft tokens for every row of a ragged batch.

    One instance serves one generation at a time. Greedy output never depends on what is proposed, so a drafter may be
    wrong, late or random, as long as it keeps to the shapes. The smallest one repeats the last token:

        class Echo(Drafter):
            name = "echo"

            def propose(self, rows, max_tokens):
                return Draft(rows.last_tokens(1).expand(-1, max_tokens))
    """

    name: str = "drafter"
    # The hidden states of the target that `read` and `observe` get: 0 = embeddings, -1 = after the final norm.
    target_layers: tuple[int, ...] = ()
    num_extra_queries: int = 0  # the most that `Draft.extra_queries` holds; the caches leave room for them
    is_busy: bool = False  # between `start` and `finish`
    num_calls: int = 0  # forwards of the drafter's own network since `start`
    context: Context | None = None  # of the generation that is running
    # What it can show of a token it has just drafted, of "logits" and "hidden_states" (see `Shown`). A drafter that
    # shows anything drafts token by token. The others draft as many tokens as they are asked for.
    shows: frozenset[str] = frozenset()
    model: Any = None  # its own network, a PreTrainedModel, for which a head may have been trained
    kv_model: Any = None  # a PreTrainedModel whose cache holds as many rows and tokens as the target's
    # Whether `propose` and `observe` may see other rows of the batch each time, and new ones. Such a drafter keeps what
    # it knows of a row by slot or by `rows.row_ids`; `join` and `resize` say what to keep.
    shares_slots: bool = False
    # Whether `propose` needs only the tensors and `max_length` of `rows`. It may then be called when `begin` is: before
    # `observe`, for rows that have ended too, and for more tokens than there is room for (they are cut).
    proposes_ahead: bool = False

    # Whether rows that end change what it proposes to later ones: then a second run of the same prompts is another one.
    learns: bool = False

    needs_choice: bool = False  # it holds candidates, among which the length policy chooses

    @property
    def candidates(self) -> tuple[Drafter, ...]:
        """The drafters among which a length policy may choose."""
        return (self,)

    def choose(self, index: int, is_ahead: bool = False) -> None:  # noqa: B027 - optional hook
        """Which of the candidates drafts in the step that begins, or with `is_ahead` in the next one, whose first part
        may then be launched before this step was observed."""

    @property
    def timings(self) -> DraftTimings | None:
        """None: only the steps of a generation show what drafts take. Ask each time: a resize makes new ones."""
        return None

    def check(self, target: PreTrainedModel, max_length: int) -> None:  # noqa: B027 - optional hook
        """Raise DrafterError if this drafter cannot serve `target` for sequences of `max_length` tokens."""

    def start(self, context: Context, rows: Rows) -> None:
        """Begin a generation: `rows` holds the prompts that are known, and no token has been generated yet."""
        self.context, self.num_calls = context, 0

    def read(self, rows: Rows, begin: int, end: int, states: tuple[Tensor, ...]) -> None:  # noqa: B027 - optional hook
        """The target has cached columns begin .. end - 1 of these rows: prompts, or the text of resumed rows.

        states: one [rows, end - begin, hidden] tensor per layer in `target_layers`. Past a row's length they mean
            nothing. Called for each piece, before `propose` sees the rows; only if `target_layers` are asked for.
        """

    @abstractmethod
    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        """Propose up to `max_tokens` (>= 1) tokens to follow each row's committed tokens.

        A length policy may let steps pass without asking, so rows may have grown by any number since the last call.
        """

    def begin(self, rows: Rows) -> None:  # noqa: B027 - optional hook
        """Launch the first part of the next `propose` before the host has read what the current step committed.

        rows: its tensors are those that `propose` will find; its host lengths are upper bounds. Rows may leave or move
            before `propose` (`keep_rows` says which), and `propose` may not be called at all.
        """

    def observe(self, verified: Verified) -> None:  # noqa: B027 - optional hook
        """See what became of the last draft. The rows of the next `propose` already contain the result."""

    def in_hindsight(self, rows: Rows, num_tokens: int) -> Tensor | None:
        """How many tokens of a draft of `num_tokens`, made so many committed tokens ago, would have been right: [rows]
        int64 on the device. None for a drafter that cannot tell, or not for next to nothing.

        rows: all have more committed tokens than that. Nothing may wait for the device.
        """
        return None

    def keep_rows(self, index: Tensor) -> None:  # noqa: B027 - optional hook
        """Rows moved or left: the row in slot i is now the one that was in slot index[i] (int64, [slots], on the host).

        Without turns and newcomers the index names all rows that are left. With them (`shares_slots`), rows past the
        index stay where they are, and those past `rows` wait for their turn.
        """

    def ended(self, row_id: int, token_ids: Tensor) -> None:  # noqa: B027 - optional hook
        """A row that has been continued is over, by itself or because it was withdrawn.

        token_ids: [length] int64 on the host, its prompt and its new tokens. Called after the `keep_rows` by which it
            left; no later row has its id.
        """

    def join(self, rows: Rows, begin: int, end: int) -> None:  # noqa: B027 - optional hook
        """Newcomers: the tokens in columns begin .. end - 1 of these rows, which stand in slots from `rows.first` on.

        Called for each piece of their prompts, before `propose` sees them; only for drafters that share slots.
        """

    def resize(self, num_slots: int, capacity: int) -> None:  # noqa: B027 - optional hook
        """There are now `num_slots` slots of `capacity` tokens; called only for drafters that share slots."""

    def finish(self) -> None:  # noqa: B027 - optional hook
        """The generation is over, by success or by an exception; give back what `start` took."""


class NoDrafts(Drafter):
    """Plain decoding: every step commits the target's next token."""

    name = "none"
    shares_slots = True
    proposes_ahead = True

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        return Draft.empty(len(rows), rows.device)


def check_contract(drafter: Drafter) -> None:
    """Raise DrafterError for a drafter written for the signature of `start` before version 2."""
    names = list(inspect.signature(drafter.start).parameters)
    if len(names) == 3:
        raise DrafterError(
            f"drafter {drafter.name!r} defines start(self, {', '.join(names)}); write "
            "`def start(self, context, rows):` and read context.target and context.max_draft_tokens "
            "(see specdec.Context)"
        )
