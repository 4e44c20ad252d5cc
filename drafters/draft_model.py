"""A smaller causal language model as the drafter, with its own ragged KV cache."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.compatibility import build_network, check_architecture, check_lengths
from specdec.drafter import Draft, Drafter
from specdec.errors import DrafterError
from specdec.network import Network, vocab_size_of
from specdec.rows import Rows

# Vocabularies of one tokenizer are padded to different multiples (151936 and 152064, 50304 and 50688); a larger
# difference means another tokenizer.
MAX_PADDING = 1 / 16


class DraftModel(Drafter):
    """Drafts token by token: the argmax, or a sample where the output is sampled.

    The draft model caches each token once. After a fully accepted draft its cache lacks the last drafted token; that
    token is then fed together with the newest one, as part of the next draft's first forward.
    """

    name = "draft_model"
    shares_slots = True

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None):
        """vocab_size: the tokens that target and draft share, where that is not the smaller of the two vocabularies."""
        if not isinstance(model, PreTrainedModel):
            raise DrafterError(f"a draft model must be a transformers PreTrainedModel, not {type(model).__name__}")
        self.model, self.vocab_size = model, vocab_size
        self._running = ExitStack()
        self._network: Network | None = None

    def check(self, target: PreTrainedModel, max_length: int) -> None:
        if self.model.device != target.device:
            raise DrafterError(
                f"the draft model is on {self.model.device}, the target on {target.device}; move them to one device"
            )
        sizes = vocab_size_of(self.model), vocab_size_of(target)
        if self.vocab_size is None and abs(sizes[0] - sizes[1]) > MAX_PADDING * max(sizes):
            raise DrafterError(
                f"the draft model's vocabulary has {sizes[0]} tokens, the target's {sizes[1]}: too different "
                "for one tokenizer with different padding; use a draft model with the target's tokenizer "
                "(or pass DraftModel(model, vocab_size=n) if they do share the first n tokens)"
            )
        if self.vocab_size is not None and not 0 < self.vocab_size <= min(sizes):
            raise DrafterError(
                f"vocab_size={self.vocab_size} must be between 1 and {min(sizes)}, the smaller vocabulary"
            )
        check_architecture(self.model, self.layout)
        check_lengths(self.model, max_length, "draft model")

    def start(self, target: PreTrainedModel, rows: Rows, max_draft_tokens: int) -> None:
        self.num_calls = 0
        self._shared_vocab = self.vocab_size or min(vocab_size_of(self.model), vocab_size_of(target))
        limit = rows.max_limit if len(rows) else None
        self._network = build_network(self.model, len(rows.slots), rows.capacity, limit, self.layout)
        self._running.enter_context(self._network.running())
        if len(rows):
            self._network.prefill(rows, self._known(rows.token_ids))
        self._cached = np.zeros(len(rows.slots), dtype=np.int64)  # by slot: tokens in the cache, drafts among them
        self._cached[: len(rows)] = rows.host_lengths

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        inputs = self._not_cached(rows)
        drafted = inputs.new_empty(len(rows), 0)
        sampler = self.sampler
        probs = None if sampler is None else sampler.probs(rows, max_tokens)
        uniforms = None if sampler is None else sampler.draw(rows, max_tokens)
        for place in range(max_tokens):
            end = rows.lengths + place
            width = inputs.shape[1]
            host_starts = rows.host_lengths + place - width
            output = self._forward(inputs, end - width, rows.max_length + place, host_starts)
            logits = output[:, -1, : self._shared_vocab]
            if sampler is None or probs is None or uniforms is None:
                inputs = logits.argmax(-1, keepdim=True)
            else:
                inputs = sampler.sample(rows, drafted, logits, uniforms[:, place], probs[:, place])[:, None]
            drafted = torch.cat([drafted, inputs], 1)
        self._cached[: len(rows)] = rows.host_lengths + drafted.shape[1] - 1
        return Draft(drafted, probs)

    def keep_rows(self, index: Tensor) -> None:
        assert self._network is not None
        self._network.keep_rows(index)
        self._cached[: len(index)] = self._cached[index.cpu().numpy()]

    def join(self, rows: Rows, begin: int, end: int) -> None:
        assert self._network is not None
        self._network.prefill_columns(self._known(rows.token_ids), rows.lengths, rows.first, begin, end)
        self._cached[rows.first : rows.first + len(rows)] = end

    def resize(self, num_slots: int, capacity: int) -> None:
        assert self._network is not None
        self._network.resize(num_slots, capacity)
        self._cached = np.concatenate([self._cached[:num_slots], np.zeros(max(num_slots - len(self._cached), 0), int)])

    def finish(self) -> None:
        self._running.close()
        self._network = None

    def _not_cached(self, rows: Rows) -> Tensor:
        """The newest tokens, [rows, 1 or 2], that the next forward takes."""
        # Of a draft, what was committed stays cached; the last committed token always lacks its keys.
        cached = np.minimum(self._cached[: len(rows)], rows.host_lengths - 1)
        return rows.last_tokens(int((rows.host_lengths - cached).max()))

    def _forward(self, token_ids: Tensor, starts: Tensor, used_slots: int, host_starts: np.ndarray) -> Tensor:
        assert self._network is not None
        self.num_calls += 1
        return self._network.forward(self._known(token_ids), starts, used_slots, host_starts=host_starts).logits

    def _known(self, token_ids: Tensor) -> Tensor:
        """What is no token of the draft model enters as token 0: a poor draft, never a wrong output."""
        return token_ids.masked_fill((token_ids < 0) | (token_ids >= self._shared_vocab), 0)
