"""A request on its way through the batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation import BaseStreamer

from specdec.options.generation import GenerationOptions
from specdec.verify.plan import Plan


@dataclass(eq=False)
class Job:
    """A request, checked, and what has become of it.

    index: its row id. prompt: [length] int64 on the host. options, plan: of its own.
    max_draft_tokens: the most per step, None for as many as the engine drafts.
    new_ids: the tokens it has been continued with. arrival: the larger, the later it was admitted; 0 before.
    num_steps, num_draft_tokens, num_accepted_draft_tokens: verify forwards that it took part in, tokens drafted in
        them, and accepted. num_preemptions: how often it had to give up its place.
    logits, scores: of each new token, [vocab] float32; logprobs: see `Event`; all only where asked for.
    """

    index: int
    prompt: Tensor
    options: GenerationOptions
    plan: Plan = field(default_factory=Plan)
    stopping: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: BaseStreamer | None = None
    max_draft_tokens: int | None = None
    num_logprobs: int = 0
    new_ids: list[int] = field(default_factory=list)
    arrival: int = 0
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_preemptions: int = 0
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.keeps_logits = self.options.output_scores or self.options.output_logits or self.num_logprobs > 0
        self.is_watched = bool(self.stopping) or self.streamer is not None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.new_ids)

    @property
    def limit(self) -> int:
        return len(self.prompt) + self.options.max_new_tokens

    @property
    def tokens(self) -> Tensor:
        return torch.cat([self.prompt, torch.tensor(self.new_ids, dtype=torch.long)])

    def keep(self, place: int, token: int, logits: Tensor, scores: Tensor | None) -> None:
        """What new token `place` was chosen from: raw logits and processed scores, [vocab] float32 each."""
        if self.options.output_logits:
            self.logits[place:] = [logits]
        if self.options.output_scores and scores is not None:
            self.scores[place:] = [scores]
        if self.num_logprobs:
            self.logprobs[place:] = [logprobs_of(logits, token, self.num_logprobs)]

    def finish(self, token_ids: list[int], error: Exception | None) -> None:
        """Say why it ended, and let go of what belongs to tokens that were taken back."""
        self.error = error
        if error is not None:
            self.finish_reason = "error"
        elif token_ids and token_ids[-1] in self.plan.eos_token_ids:
            self.finish_reason = "eos"
        else:
            self.finish_reason = "length" if len(self.new_ids) >= self.options.max_new_tokens else "stop"
        for kept in (self.logits, self.scores, self.logprobs):
            del kept[len(self.new_ids) :]


def logprobs_of(logits: Tensor, token: int, count: int) -> dict[int, float]:
    """{token id: log probability} of the token, and of the `count` likeliest. logits: [vocab] float32."""
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return {token: float(logprobs[token]), **dict(zip(ids.tolist(), values.tolist(), strict=True))}
