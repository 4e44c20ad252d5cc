"""Who drafts while an any-subset model fills in (ASSD), and an any-subset model as the drafter of a causal target.

ASSD: Guo and Ermon 2025, arXiv 2504.20456, algorithms 1 and 2. Rows stand in rank order (see
`specdec/network/any_subset/model.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, XLNetLMHeadModel

from specdec.batch.rows import Rows
from specdec.draft import NO_TOKEN, Draft
from specdec.drafter import Context, Drafter
from specdec.drafters.folders import load_target_first, model_in
from specdec.errors import DrafterError
from specdec.kernels.commit.greedy_commit import Committed
from specdec.kernels.commit.sample import sample, sample_tokens
from specdec.network.any_subset.model import Conditionals, Order, XLNet
from specdec.network.any_subset.two_stream import TwoStreamCache
from specdec.network.base import vocab_size_of
from specdec.verify.random_streams import Purpose, RowStreams
from specdec.verify.truncations import HasTruncations


class Proposal(NamedTuple):
    """draft: at most `room` tokens a row. first: [rows, vocab], the target's scores after the committed tokens, where
    drafting has computed them already."""

    draft: Draft
    first: Tensor | None = None


class InfillDrafter(Protocol):
    num_calls: int  # network calls for drafting alone
    num_ahead: int  # marginals that the verifying call is to give after every token of the draft

    def propose(self, rows: Rows, room: Tensor, max_tokens: int) -> Proposal:
        """Up to `max_tokens` (>= 1) tokens, and row i at most room[i] ([rows] int64)."""

    def observe(self, scores: Tensor, done: Committed) -> None:
        """scores: [rows, k + 1, 1 + num_ahead, vocab], those of the verifying call. done: what it committed."""

    def keep_rows(self, index: Tensor) -> None:
        """Rows left the batch: the new row i is the old row index[i] (int64, [kept rows])."""


class Sampling(NamedTuple):
    """How drafts are sampled: as the target's tokens are, by numbers of their own."""

    streams: RowStreams
    processors: HasTruncations

    def uniforms(self, rows: Rows, count: int) -> Tensor:
        return self.streams.uniforms(rows.row_ids, rows.host_lengths, count, Purpose.DRAFT)


def choose(scores: Tensor, rows: Rows, sampling: Sampling | None) -> Draft:
    """A token of each place alone: the argmax, or a sample. scores: [rows, k, vocab]."""
    if sampling is None:
        return Draft(scores.argmax(-1))
    probs = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    uniforms = sampling.uniforms(rows, scores.shape[1]).flatten()
    row_of_position = np.arange(len(scores)).repeat(scores.shape[1])
    truncations = sampling.processors.truncations(rows).take(row_of_position)
    tokens = sample(scores.flatten(0, 1), truncations, uniforms, probs.view(-1, scores.shape[2]))
    return Draft(tokens.view(scores.shape[:2]), probs)


def cut(draft: Draft, room: Tensor) -> Draft:
    """At most room[i] tokens for row i."""
    place = torch.arange(draft.token_ids.shape[1], device=room.device)
    return Draft(draft.token_ids.masked_fill(place >= room[:, None], NO_TOKEN), draft.probs)


class SelfDraft:
    """The model's own marginals, in a call of their own (algorithm 1).

    The first token of the draft has seen all that its verification sees, so it is always accepted: two calls yield two
    tokens at least.
    """

    num_ahead = 0

    def __init__(self, conditionals: Conditionals, sampling: Sampling | None):
        self.conditionals, self.sampling = conditionals, sampling
        self.num_calls = 0

    def propose(self, rows: Rows, room: Tensor, max_tokens: int) -> Proposal:
        self.num_calls += 1
        nothing = rows.token_ids.new_empty(len(rows), 0)
        scores = self.conditionals.logits(rows, nothing, max_tokens)[:, 0]
        return Proposal(cut(choose(scores, rows, self.sampling), room), scores[:, 0])

    def observe(self, scores: Tensor, done: Committed) -> None:
        pass

    def keep_rows(self, index: Tensor) -> None:
        pass


class AheadDraft:
    """The model's own marginals, asked for in the call that verifies the draft before: one call a step.

    After every place where that draft may end, the marginals of the next tokens are asked for. They have not seen the
    token that the verification itself adds there, so they are worse than `SelfDraft`'s, but cost no call.
    """

    def __init__(self, num_tokens: int, sampling: Sampling | None):
        self.num_ahead, self.sampling = num_tokens, sampling
        self.num_calls = 0
        self._scores: Tensor | None = None  # [rows, num_ahead, vocab]

    def propose(self, rows: Rows, room: Tensor, max_tokens: int) -> Proposal:
        if self._scores is None:
            return Proposal(Draft.empty(len(rows), rows.device))
        return Proposal(cut(choose(self._scores[:, :max_tokens], rows, self.sampling), room))

    def observe(self, scores: Tensor, done: Committed) -> None:
        row = torch.arange(len(scores), device=scores.device)[:, None]
        # The place after the recovered or bonus token; where there was no bonus, the next place itself.
        first = done.num_committed - done.num_accepted
        place = first[:, None] + torch.arange(self.num_ahead, device=scores.device)
        self._scores = scores[row, done.num_accepted[:, None], place]

    def keep_rows(self, index: Tensor) -> None:
        if self._scores is not None:
            self._scores = self._scores[index]


class NgramDraft:
    """What followed the left neighbour elsewhere in the row (algorithm 2): bigram counts, or where it never occurred
    with a known successor, unigram counts. No call of any network."""

    num_ahead = 0

    def __init__(self, order: Order, rows: Rows, vocab_size: int, sampling: Sampling | None):
        index = torch.from_numpy(rows.row_ids).to(rows.device)
        self.positions, self.vocab_size, self.sampling = order.positions[index], vocab_size, sampling
        self.num_calls = 0

    def propose(self, rows: Rows, room: Tensor, max_tokens: int) -> Proposal:
        num_columns = self.positions.shape[1]
        rank = torch.arange(num_columns, device=rows.device)
        known = torch.empty_like(self.positions, dtype=torch.bool)
        known.scatter_(1, self.positions, rank < rows.lengths[:, None])
        text = torch.empty_like(self.positions).scatter_(1, self.positions, rows.token_ids[:, :num_columns])
        uniforms = None if self.sampling is None else self.sampling.uniforms(rows, max_tokens)
        tokens, probs = [], []
        guessed, counted = text.clone(), known.clone()  # with this draft's own tokens as left neighbours
        for place in range(max_tokens):
            at = self.positions.gather(1, (rows.lengths[:, None] + place).clamp(max=num_columns - 1))
            q = self._distribution(text, known, guessed, counted, at)
            token = q.argmax(-1) if uniforms is None else sample_tokens(q, uniforms[:, place])
            guessed.scatter_(1, at, token[:, None])
            counted.scatter_(1, at, True)
            tokens.append(token)
            probs.append(q)
        draft = Draft(torch.stack(tokens, 1), None if uniforms is None else torch.stack(probs, 1))
        return Proposal(cut(draft, room))

    def _distribution(self, text: Tensor, known: Tensor, guessed: Tensor, counted: Tensor, at: Tensor) -> Tensor:
        """[rows, vocab] float32. text, guessed: [rows, columns] int64 by position; known, counted: where tokens stand.
        at: [rows, 1] int64, the position asked for."""
        left = guessed.gather(1, (at - 1).clamp(min=0))
        has_left = (at > 0) & counted.gather(1, (at - 1).clamp(min=0))
        follows = known[:, 1:] & known[:, :-1] & (text[:, :-1] == left) & has_left
        weights = torch.cat([torch.zeros_like(has_left), follows], 1)
        weights = torch.where(weights.any(1, keepdim=True), weights, known).float()
        counts = weights.new_zeros(len(text), self.vocab_size)
        counts.scatter_add_(1, text.clamp(0, self.vocab_size - 1), weights)
        return counts / counts.sum(1, keepdim=True)

    def observe(self, scores: Tensor, done: Committed) -> None:
        pass

    def keep_rows(self, index: Tensor) -> None:
        self.positions = self.positions[index]


class AnySubsetDrafter(Drafter):
    """An any-subset model drafts for a causal target with the same tokenizer: all tokens of a draft in one call.

    They are marginals: each is drafted without seeing those before it in the draft.
    """

    name = "any_subset"

    def __init__(self, model: XLNetLMHeadModel):
        self.model = XLNet(model).model  # refuses what is none
        self._cache: TwoStreamCache | None = None

    @classmethod
    def load(cls, folder: str | Path, target: PreTrainedModel | None) -> AnySubsetDrafter:
        """The XLNet in a folder, on the target's device and in its dtype."""
        if target is None:
            raise load_target_first(cls.name, folder)
        return cls(model_in(folder, target))

    def check(self, target: PreTrainedModel, max_length: int) -> None:
        if self.model.device != target.device:
            raise DrafterError(
                f"the any-subset model is on {self.model.device}, the target on {target.device}; "
                "move them to one device"
            )
        positions = XLNet(self.model).max_positions
        if positions is not None and max_length > positions:
            raise DrafterError(
                f"sequences of up to {max_length} tokens exceed the any-subset model's {positions} positions; shorten "
                "the prompt or max_new_tokens, or draft by another model"
            )
        sizes = self._vocab_size(), vocab_size_of(target)
        if abs(sizes[0] - sizes[1]) > max(max(sizes) / 16, 8):
            raise DrafterError(
                f"the any-subset model's vocabulary has {sizes[0]} tokens, the target's {sizes[1]}; use a model with "
                "the target's tokenizer"
            )

    def _vocab_size(self) -> int:
        return self.model.lm_loss.weight.shape[0]

    def start(self, context: Context, rows: Rows) -> None:
        super().start(context, rows)
        slots = rows.capacity + context.max_draft_tokens
        positions = torch.arange(slots, device=rows.device).expand(len(rows), -1)
        self._cache = TwoStreamCache(self.model, positions, rows.prompt_lengths.clone(), slots)
        self._cached = torch.zeros_like(rows.lengths)
        self._host_cached = rows.host_lengths * 0
        self._vocab = min(self._vocab_size(), vocab_size_of(context.target))

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        assert self._cache is not None
        self.num_calls += 1
        num_content = max(int((rows.host_lengths - self._host_cached).max()), 1)
        starts = torch.minimum(self._cached, rows.lengths - 1)
        ahead = torch.arange(num_content, device=rows.device)
        content = rows.token_ids.gather(1, (starts[:, None] + ahead).clamp(max=rows.capacity - 1))
        content = content.masked_fill((content < 0) | (content >= self._vocab), 0)
        targets = rows.lengths[:, None] + torch.arange(max_tokens, device=rows.device)
        known = rows.lengths[:, None].expand(-1, max_tokens)
        used = rows.max_length + num_content
        logits = self._cache.forward(content, starts, targets, known, min(used, self._cache.positions.shape[1]))
        logits = logits[..., : self._vocab]
        self._cached, self._host_cached = rows.lengths.clone(), rows.host_lengths.copy()
        assert self.context is not None
        if (sampler := self.context.sampler_for(rows)) is None:
            return Draft(logits.argmax(-1))
        uniforms = sampler.draw(rows, max_tokens)
        probs = sampler.probs(rows, max_tokens)
        drafted = rows.token_ids.new_empty(len(rows), 0)
        for place in range(max_tokens):
            tokens = sampler.sample(rows, drafted, logits[:, place], uniforms[:, place], probs[:, place])
            drafted = torch.cat([drafted, tokens[:, None]], 1)
        return Draft.trusted(drafted, probs, is_normalised=True)

    def keep_rows(self, index: Tensor) -> None:
        assert self._cache is not None
        self._cache.keep_rows(index)
        self._cached, self._host_cached = self._cached[index], self._host_cached[index.cpu().numpy()]

    def finish(self) -> None:
        self._cache = None
