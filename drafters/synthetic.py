"""A drafter with a forced acceptance rate, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.rows import Rows
from specdec.draft import Draft
from specdec.drafter import Context, Drafter
from specdec.errors import ConfigError, DrafterError


class Synthetic(Drafter):
    """Proposes the known continuation, each token wrong with probability 1 - acceptance_rate.

    The expected acceptance of draft token i, given those before it, is `acceptance_rate` for every i, whatever the
    models are. The continuations are the target's own greedy outputs, made beforehand (for example by plain decoding).
    """

    name = "synthetic"
    shares_slots = True

    def __init__(self, acceptance_rate: float, continuations: Sequence[Tensor], seed: int = 0):
        """continuations: one [new_tokens] int64 tensor per row of the batch, without the prompt."""
        if not 0.0 <= acceptance_rate <= 1.0:
            raise ConfigError(f"acceptance_rate={acceptance_rate} is not a probability; choose 0 to 1")
        self.acceptance_rate, self.continuations, self.seed = acceptance_rate, continuations, seed

    def check(self, target: PreTrainedModel, max_length: int) -> None:
        if not self.continuations:
            raise DrafterError("the synthetic drafter needs the target's greedy continuations, one per row")

    def start(self, context: Context, rows: Rows) -> None:
        super().start(context, rows)
        if len(rows) and len(self.continuations) != len(rows):
            raise DrafterError(f"{len(self.continuations)} continuations for {len(rows)} rows; pass one per row")
        self._vocab_size = context.target.config.get_text_config(decoder=True).vocab_size
        longest = max(len(tokens) for tokens in self.continuations)
        padded = torch.zeros(len(self.continuations), longest + context.max_draft_tokens, dtype=torch.long)
        for row, tokens in enumerate(self.continuations):
            padded[row, : len(tokens)] = tokens.cpu()
        self._future = padded.to(rows.device)
        self._generator = torch.Generator(rows.device).manual_seed(self.seed)

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        done = (rows.lengths - rows.prompt_lengths)[:, None]
        place = done + torch.arange(max_tokens, device=rows.device)
        future = self._future[torch.from_numpy(rows.row_ids).to(rows.device)]
        draft = future.gather(1, place.clamp(max=self._future.shape[1] - 1))
        wrong = torch.rand(draft.shape, device=rows.device, generator=self._generator) >= self.acceptance_rate
        return Draft(torch.where(wrong, (draft + 1) % self._vocab_size, draft))
