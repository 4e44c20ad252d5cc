"""A smaller causal language model as the drafter, with its own ragged KV cache."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.compatibility import build_network, check_architecture, check_lengths
from specdec.drafter import Draft, Drafter, Verified
from specdec.errors import DrafterError
from specdec.network import Network
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
        check_architecture(self.model)
        check_lengths(self.model, max_length, "draft model")

    def start(self, target: PreTrainedModel, rows: Rows, max_draft_tokens: int) -> None:
        self.num_calls = 0
        self._shared_vocab = self.vocab_size or min(vocab_size_of(self.model), vocab_size_of(target))
        self._network = build_network(self.model, len(rows), rows.capacity, rows.max_limit)
        self._running.enter_context(self._network.running())
        self._network.prefill(rows, self._known(rows.token_ids))
        self._catch_up = False

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        inputs = rows.last_tokens(2 if self._catch_up else 1)
        drafted = inputs.new_empty(len(rows), 0)
        probs: list[Tensor] = []
        uniforms = None if self.sampler is None else self.sampler.draw(rows, max_tokens)
        for place in range(max_tokens):
            end = rows.lengths + place
            logits = self._forward(inputs, end - inputs.shape[1], rows.max_length + place)[:, -1, : self._shared_vocab]
            if self.sampler is None or uniforms is None:
                inputs = logits.argmax(-1, keepdim=True)
            else:
                tokens, q = self.sampler.sample(rows, drafted, logits, uniforms[:, place])
                inputs = tokens[:, None]
                probs.append(q)
            drafted = torch.cat([drafted, inputs], 1)
        return Draft(drafted, torch.stack(probs, 1) if probs else None)

    def observe(self, verified: Verified) -> None:
        self._catch_up = verified.all_accepted

    def keep_rows(self, index: Tensor) -> None:
        assert self._network is not None
        self._network.keep_rows(index)

    def finish(self) -> None:
        self._running.close()
        self._network = None

    def _forward(self, token_ids: Tensor, starts: Tensor, used_slots: int) -> Tensor:
        assert self._network is not None
        self.num_calls += 1
        return self._network.forward(self._known(token_ids), starts, used_slots).logits

    def _known(self, token_ids: Tensor) -> Tensor:
        """What is no token of the draft model enters as token 0: a poor draft, never a wrong output."""
        return token_ids.masked_fill((token_ids < 0) | (token_ids >= self._shared_vocab), 0)


def vocab_size_of(model: PreTrainedModel) -> int:
    """Rows of the output projection: what the logits' last dimension is."""
    head = model.get_output_embeddings()
    return model.config.get_text_config(decoder=True).vocab_size if head is None else head.weight.shape[0]
