"""How a drafter samples: by the target's processors and from each row's own random stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.drafter import NO_TOKEN
from specdec.kernels.sampled_commit import sample_tokens
from specdec.processors import Processors
from specdec.random_streams import Purpose, RowStreams
from specdec.rows import Rows


class Sampler:
    """Samples draft tokens and keeps the distribution q that each came from, which verification needs."""

    def __init__(self, processors: Processors, streams: RowStreams, vocab_size: int):
        """vocab_size: the target's, to which the drafter's logits are padded or cut."""
        self.processors, self.streams, self.vocab_size = processors, streams, vocab_size

    def draw(self, rows: Rows, max_tokens: int) -> Tensor:
        """The numbers of one step's draft, [rows, max_tokens] float64."""
        return self.streams.uniforms(rows.row_ids, rows.host_lengths, max_tokens, Purpose.DRAFT)

    def sample(self, rows: Rows, drafted: Tensor, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The next draft token of each row, [rows] int64, and its distribution, [rows, vocab] float32.

        NO_TOKEN and zeros where the drafter has no distribution (NaN logits, or every token forbidden).

        drafted: [rows, j] int64, this step's draft so far. logits: [rows, draft vocab]. uniforms: [rows] of `draw`.
        """
        logits = F.pad(logits, (0, self.vocab_size - logits.shape[1]), value=float("-inf"))
        scores = self.processors(rows, drafted, logits[:, None], first=drafted.shape[1])[:, 0]
        probs = torch.softmax(scores, -1, dtype=torch.float32)
        nothing = torch.isnan(probs[:, :1])
        probs = probs.masked_fill(nothing, 0)
        return sample_tokens(probs, uniforms).masked_fill(nothing[:, 0], NO_TOKEN), probs
