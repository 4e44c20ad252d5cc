"""How a drafter samples: with the target's processors and from each row's own random stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.batch.rows import Rows
from specdec.kernels.commit.sample import sample
from specdec.verify.processors import Processors
from specdec.verify.random_streams import Purpose, Streams


class Sampler:
    """Samples draft tokens and keeps the distribution q that each came from, which verification needs."""

    def __init__(self, processors: Processors, streams: Streams, vocab_size: int):
        """vocab_size: the target's, to which the drafter's logits are padded or cut."""
        self.processors, self.streams, self.vocab_size = processors, streams, vocab_size

    def is_needed(self, rows: Rows) -> bool:
        """Whether any of these rows is sampled."""
        return self.processors.any_sampled(rows)

    def draw(self, rows: Rows, max_tokens: int) -> Tensor:
        """The numbers of one step's draft, [rows, max_tokens] float64."""
        return self.streams.uniforms(rows.row_ids, rows.host_lengths, max_tokens, Purpose.DRAFT)

    def probs(self, rows: Rows, max_tokens: int) -> Tensor:
        """Room for the distributions of one step's draft, [rows, max_tokens, vocab] float32, uninitialised."""
        return torch.empty(len(rows), max_tokens, self.vocab_size, device=rows.device)

    def sample(self, rows: Rows, drafted: Tensor, logits: Tensor, uniforms: Tensor, probs: Tensor) -> Tensor:
        """The next draft token of each row, [rows] int64; its distribution is written into `probs`.

        NO_TOKEN and zeros where the drafter has no distribution (NaN logits, or every token forbidden). A row at
        temperature 0 gets the argmax and a one-hot distribution.

        drafted: [rows, j] int64, this step's draft so far. logits: [rows, draft vocab]. uniforms: [rows] of `draw`.
        probs: [rows, vocab] float32, a part of `probs(...)`.
        """
        if self.processors.name_tokens:
            logits = F.pad(logits, (0, self.vocab_size - logits.shape[1]), value=float("-inf"))
        scores = self.processors.of_draft(rows, drafted, logits)
        return sample(scores[:, : self.vocab_size], self.processors.truncations(rows), uniforms, probs)
