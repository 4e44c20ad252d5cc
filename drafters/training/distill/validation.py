"""How well a draft model serves a target on held-out prompts: by its probabilities, and in the real decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.api.generate import generate
from specdec.check.padding import left_pad
from specdec.check.settings import greedy_settings
from specdec.drafters.training.own_text import Pool, Writing, fill_pool
from specdec.engine.metrics import Speculation

BATCH_ROWS = 16
SEED = 20_000


class Validation:
    """The target's own continuations of held-out prompts, on which all drafts are measured alike.

    On them the drafter sees the same text as in decoding, as long as its tokens are accepted.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        prompts: Sequence[Tensor],
        num_new_tokens: int,
        num_speculative_tokens: int = 5,
        write_batch: int = 64,
    ):
        """prompts: [length] int64 token ids each."""
        self.target, self.prompts, self.num_new_tokens = target, list(prompts), num_new_tokens
        self.num_speculative_tokens, self.write_batch = num_speculative_tokens, write_batch
        self.greedy, self.sampled = (
            fill_pool(target, self.prompts, [Writing(num_new_tokens, temperature, write_batch)], SEED)
            for temperature in (0.0, 1.0)
        )

    def measure(self, draft: PreTrainedModel) -> dict[str, Any]:
        """greedy_agreement: share of the target's greedy tokens that are the draft's argmax too.
        sampled_acceptance: mean of 1 - TVD(p, q) over the target's samples at temperature 1, the probability that a
        sample of q is accepted. *_acceptance_length: tokens per step and row in `specdec.generate` with this draft.
        """
        return {
            "greedy_agreement": weighted_mean(self.greedy_agreement_by_prompt(draft), self.greedy),
            "sampled_acceptance": weighted_mean(self.sampled_acceptance_by_prompt(draft), self.sampled),
            "greedy_acceptance_length": self.acceptance_length(draft, 0.0),
            "sampled_acceptance_length": self.acceptance_length(draft, 1.0),
            "num_speculative_tokens": self.num_speculative_tokens,
            "num_prompts": len(self.prompts),
            "num_greedy_tokens": int(self.greedy.counted.sum()),
        }

    def greedy_agreement_by_prompt(self, draft: PreTrainedModel) -> list[float]:
        """On each prompt's greedy continuation."""
        return self._means(draft, self.greedy, lambda p, q: (p.argmax(-1) == q.argmax(-1)).double())

    def sampled_acceptance_by_prompt(self, draft: PreTrainedModel) -> list[float]:
        """On each prompt's sampled continuation."""
        return self._means(draft, self.sampled, lambda p, q: torch.minimum(p, q).exp().sum(-1).double())

    def acceptance_length(self, draft: PreTrainedModel, temperature: float) -> float:
        total = Speculation()
        sampling: dict[str, Any] = {}
        with greedy_settings(self.target):
            for first in range(0, len(self.prompts), self.write_batch):
                prompts = self.prompts[first : first + self.write_batch]
                if temperature > 0:
                    seeds = list(range(SEED + first, SEED + first + len(prompts)))
                    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "seed": seeds}
                ids, mask = left_pad(prompts, self.target.generation_config.pad_token_id, self.target.device)
                generate(
                    self.target,
                    ids,
                    mask,
                    drafter=draft,
                    num_speculative_tokens=self.num_speculative_tokens,
                    max_new_tokens=self.num_new_tokens,
                    on_commit=total.add,
                    **sampling,
                )
        return total.mean_acceptance_length

    @torch.no_grad()
    def _means(self, draft: PreTrainedModel, pool: Pool, score: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        """Each text's mean of score(log p, log q), over the tokens that both models have; 0 for an empty text."""
        means: list[float] = []
        for first in range(0, len(pool), BATCH_ROWS):
            batch = pool.batch(first, min(BATCH_ROWS, len(pool) - first)).to(self.target.device)
            inputs, counted = batch.token_ids[:, :-1], batch.predicts
            logits = [model(input_ids=inputs, use_cache=False).logits.float() for model in (self.target, draft)]
            shared = min(values.shape[-1] for values in logits)
            log_p, log_q = (values[..., :shared].log_softmax(-1) for values in logits)
            means += ((score(log_p, log_q) * counted).sum(1) / counted.sum(1).clamp(min=1)).tolist()
        return means


def weighted_mean(by_prompt: Sequence[float], pool: Pool) -> float:
    """The mean over tokens, from means over texts."""
    counts = pool.counted.sum(1).tolist()
    return sum(mean * count for mean, count in zip(by_prompt, counts, strict=True)) / max(sum(counts), 1)
