"""SpecDec++'s acceptance head: how likely the target is to accept the token that was just drafted.

Huang, Guo, Wang, "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths" (2024), section 3. Where
theirs looks at the state *behind* a token, which is known one draft forward too late to score the newest one, ours
looks at the state that the token was drawn from, and is told how probable the drafter thought the token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.heads import Head

LEAST_LOG_PROB = -12.0


class AcceptanceHead(Head):
    """D residual blocks x + SiLU(Wx + b), then Linear(d, 2); class 1 means accepted.

    x is the drafter's hidden state with two numbers behind it, log q and log(1 - q) of the token, so d is the drafter's
    hidden size + 2.
    """

    kind: ClassVar[str] = "acceptance_head"

    def __init__(self, hidden_size: int, num_blocks: int = 3, rejection_weight: float = 1.0):
        """hidden_size: the drafter's. rejection_weight: how much more a rejection counted in training than an
        acceptance (w of the paper's loss); `log_acceptance` takes it out again, so that what it gives is a probability.
        """
        super().__init__()
        self.shape = {"hidden_size": hidden_size, "num_blocks": num_blocks, "rejection_weight": rejection_weight}
        self.hidden_size, self.rejection_weight = hidden_size, rejection_weight
        width = hidden_size + 2
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.out = nn.Linear(width, 2)
        self.register_buffer("log_weight", torch.tensor(float(rejection_weight)).log(), persistent=False)

    def forward(self, hidden: Tensor, log_probs: Tensor) -> Tensor:
        """Logits of (rejected, accepted), [..., 2], as they are trained.

        hidden: [..., hidden_size], the drafter's last hidden state, behind its final norm (`hidden_states[-1]` of
            transformers), from which the token's distribution was computed.
        log_probs: [...], log q of the token, the softmax taken over the drafter's logits as they are (temperature 1,
            no processors), whatever the token was drawn from.
        """
        log_q = log_probs.to(self.out.weight.dtype).clamp(LEAST_LOG_PROB, -1e-6)[..., None]
        log_rest = torch.log(-torch.expm1(log_q)).clamp(min=LEAST_LOG_PROB)
        x = torch.cat([hidden.to(self.out.weight.dtype), log_q, log_rest], -1)
        for block in self.blocks:
            x = x + F.silu(block(x))
        return self.out(x)

    def log_acceptance(self, hidden: Tensor, log_probs: Tensor) -> Tensor:
        """log P(the token is accepted), [...] float32; arguments as for `forward`."""
        rejected, accepted = self(hidden, log_probs).unbind(-1)
        return F.logsigmoid(accepted - rejected + self.log_weight)
