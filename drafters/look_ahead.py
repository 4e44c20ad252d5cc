"""PaSS: the target drafts for itself, with a few learned embeddings in the positions of its next tokens.

Monea, Joulin, Grave, "PaSS: Parallel Speculative Sampling" (2023). L look-ahead embeddings appended to a text make one
forward of the target predict L tokens beyond its next one. Here they are appended at every position where the draft
being verified may end, so the same forward verifies the last guesses and makes the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch.rows import Rows
from specdec.draft import NO_TOKEN, Draft, ExtraQueries, Verified
from specdec.drafter import Context, Drafter
from specdec.errors import ConfigError, DrafterError
from specdec.files.fingerprint import Fingerprint
from specdec.files.trained import Trained

if TYPE_CHECKING:
    from typing_extensions import Self


class LookAheadEmbeddings(Trained):
    """weight: [num_helpers + num_tokens, hidden_size].

    Look-ahead embedding i, in row num_helpers + i - 1, is i positions after the end of the text and predicts the token
    after itself. Helpers, which the paper does not have, precede the first embedding at its position and predict
    nothing: queries attend to them, so more can be learned than one vector per token holds.
    """

    kind: ClassVar[str] = "look_ahead"
    roles: ClassVar[tuple[str, ...]] = ("target",)
    alternative: ClassVar[str] = "choose another drafter"
    target: Fingerprint | None

    def __init__(self, num_tokens: int, hidden_size: int, num_helpers: int = 0):
        super().__init__()
        if num_tokens < 1 or num_helpers < 0:
            raise ConfigError(f"num_tokens={num_tokens} must be at least 1, num_helpers={num_helpers} at least 0")
        self.num_tokens, self.num_helpers = num_tokens, num_helpers
        self.shape = {"num_tokens": num_tokens, "hidden_size": hidden_size, "num_helpers": num_helpers}
        self.weight = nn.Parameter(torch.zeros(num_helpers + num_tokens, hidden_size))

    @property
    def ahead(self) -> Tensor:
        """Positions past the end of the text, for each embedding, [num_helpers + num_tokens] int64."""
        tokens = torch.arange(1, self.num_tokens + 1, device=self.weight.device)
        return torch.cat([tokens.new_ones(self.num_helpers), tokens])

    def trained_for(self, target: PreTrainedModel, recipe: Mapping[str, Any]) -> Self:
        """Mark these embeddings as trained for a target. recipe: how they were trained and their results; any JSON."""
        return self.mark({"target": target}, recipe)


class LookAhead(Drafter):
    """Drafts in the target's own forwards: it adds no forwards, and there are never more target calls than tokens.

    A guess has seen neither the token that the target itself adds in the same step nor the guesses before it.
    """

    name = "look_ahead"
    shares_slots = True

    def __init__(self, embeddings: LookAheadEmbeddings):
        self.embeddings = embeddings
        self.num_extra_queries = len(embeddings.weight)
        self._checked: ReferenceType[PreTrainedModel] | None = None

    @classmethod
    def load(cls, folder: str | Path, target: PreTrainedModel | None = None) -> LookAhead:
        """The embeddings that `specdec train look-ahead` saved in `folder`. Raises InputError if there are none.

        target: not needed; `check` compares it with the one they were trained for.
        """
        return cls(LookAheadEmbeddings.load(folder))

    def check(self, target: PreTrainedModel, max_length: int) -> None:
        if self._checked is not None and self._checked() is target:
            return  # called for each prompt, and the check reads every weight
        self.embeddings.check_models({"target": target})
        self._checked = ref(target)

    def start(self, context: Context, rows: Rows) -> None:
        super().start(context, rows)
        target, max_draft_tokens = context.target, context.max_draft_tokens
        if max_draft_tokens > self.embeddings.num_tokens:
            raise DrafterError(
                f"num_speculative_tokens={max_draft_tokens}, but there are {self.embeddings.num_tokens} look-ahead "
                "embeddings; lower it, or train more of them"
            )
        weight, ahead = self.embeddings.weight.detach(), self.embeddings.ahead
        self._queries = ExtraQueries(weight.to(rows.device, target.dtype), ahead.to(rows.device))
        self._max_tokens = max_draft_tokens
        self._num_known = np.zeros(len(rows.slots), dtype=np.int64)  # by slot: guesses after the committed tokens
        self._guesses: Tensor | None = None  # by slot: [slots, k] tokens, or [slots, k, vocab] logits for sampling

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        known = self._num_known[: len(rows)]
        num_tokens = min(max_tokens, int(known.max()))
        draft = self._draft(rows, num_tokens) if num_tokens else Draft.empty(len(rows), rows.device)
        # The step commits at least one token, and the last position of a row is the target's own.
        num_guesses = min(self._max_tokens, rows.max_remaining - 2)
        if num_guesses < 1:
            return draft
        num_queries = self.embeddings.num_helpers + num_guesses
        queries = ExtraQueries(self._queries.embeddings[:num_queries], self._queries.ahead[:num_queries])
        return draft.with_queries(queries)

    def _draft(self, rows: Rows, num_tokens: int) -> Draft:
        assert self._guesses is not None
        guesses = self._guesses[: len(rows), :num_tokens]
        known = torch.from_numpy(self._num_known[: len(rows)]).to(rows.device)
        unknown = torch.arange(num_tokens, device=rows.device) >= known[:, None]
        assert self.context is not None
        if (sampler := self.context.sampler) is None:
            return Draft(guesses.masked_fill(unknown, NO_TOKEN))
        uniforms = sampler.draw(rows, num_tokens)
        probs = sampler.probs(rows, num_tokens)
        drafted = rows.token_ids.new_empty(len(rows), 0)
        for place in range(num_tokens):
            tokens = sampler.sample(rows, drafted, guesses[:, place], uniforms[:, place], probs[:, place])
            drafted = torch.cat([drafted, tokens[:, None]], 1)
        return Draft.trusted(drafted.masked_fill(unknown, NO_TOKEN), probs, is_normalised=True)

    def observe(self, verified: Verified) -> None:
        num_rows = len(verified.num_accepted)
        if verified.extra_logits is None:
            self._num_known[:num_rows] = 0
            return
        found = verified.extra_logits(verified.num_accepted)[:, self.embeddings.num_helpers :]
        if self.context is not None and self.context.sampler is None:
            found = found.argmax(-1)
        if self._guesses is None:
            self._guesses = found.new_zeros(len(self._num_known), self._max_tokens, *found.shape[2:])
        self._guesses[:num_rows, : found.shape[1]] = found
        self._num_known[:num_rows] = found.shape[1]

    def keep_rows(self, index: Tensor) -> None:
        self._num_known[: len(index)] = self._num_known[index.cpu().numpy()]
        if self._guesses is not None:
            self._guesses[: len(index)] = self._guesses[index]

    def join(self, rows: Rows, begin: int, end: int) -> None:
        self._num_known[rows.first : rows.first + len(rows)] = 0

    def resize(self, num_slots: int, capacity: int) -> None:
        num_more = max(num_slots - len(self._num_known), 0)
        self._num_known = np.concatenate([self._num_known[:num_slots], np.zeros(num_more, dtype=np.int64)])
        if self._guesses is not None:
            more = self._guesses.new_zeros(num_more, *self._guesses.shape[1:])
            self._guesses = torch.cat([self._guesses[:num_slots], more])

    def finish(self) -> None:
        self._guesses = self._checked = None
