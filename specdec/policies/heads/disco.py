"""DISCO's classifier: whether a drafted token will be accepted, judged by the drafter's distribution.

Mamou et al., "Dynamic Speculation Lookahead Accelerates Speculative Decoding of Large Language Models" (2024),
section 3: a small feed-forward network over the largest probabilities, the entropy and the place in the draft.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.policies.heads.files import PairHead


class Disco(PairHead):
    """C_i = FFN(top-k of q_i, entropy of q_i, i): a logit, above 0 where the token is more likely accepted than not."""

    kind: ClassVar[str] = "disco"

    def __init__(self, top_k: int = 10, hidden_size: int = 64, max_place: int = 32):
        """top_k: the number of probabilities that it looks at. hidden_size: width of the network's one hidden layer.
        max_place: later places in a draft count as this one.
        """
        super().__init__()
        self.shape = {"top_k": top_k, "hidden_size": hidden_size, "max_place": max_place}
        self.top_k, self.max_place = top_k, max_place
        self.layers = nn.Sequential(nn.Linear(top_k + 2, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1))

    def features(self, logits: Tensor, place: int | Tensor) -> Tensor:
        """[..., top_k + 2] float32: the largest probabilities in falling order, entropy in nats, place / max_place.

        logits: [..., vocab], the drafter's own (temperature 1, no processors); at least top_k tokens.
        place: the token's index in its draft, from 0; an int, or a tensor [...].
        """
        log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
        q = log_q.exp()
        entropy = -(q * log_q.clamp(min=-1e4)).sum(-1, keepdim=True)
        place = torch.as_tensor(place, device=logits.device, dtype=torch.float32).expand(logits.shape[:-1])
        return torch.cat(
            [q.topk(self.top_k, -1).values, entropy, place.clamp(max=self.max_place)[..., None] / self.max_place], -1
        )

    def forward(self, features: Tensor) -> Tensor:
        """Logits of acceptance, [...], from `features`."""
        return self.layers(features)[..., 0]

    def log_acceptance(self, logits: Tensor, place: int | Tensor) -> Tensor:
        """log P(the token is accepted), [...] float32; arguments as for `features`."""
        return F.logsigmoid(self(self.features(logits, place)))
