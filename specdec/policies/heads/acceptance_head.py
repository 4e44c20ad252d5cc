"""SpecDec++'s acceptance head: how likely the target is to accept the token that was just drafted.

Huang, Guo, Wang, "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths" (2024), section 3. Their
head looks at the state *after* a token, which is known one draft forward too late to score the newest token. Ours looks
at the state that the token was drawn from, and is also given the drafter's probabilities of the token and of the best
other token, and the entropy of its distribution.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.policies.heads.files import PairHead

# Limits of what the head reads, so that no token or vocabulary takes it far outside of what it was trained on.
LEAST_LOG_PROB = -12.0  # probability 6e-6; less probable tokens look alike
MOST_ENTROPY = 12.0  # nats, the uniform distribution over 163,000 tokens
NUM_NUMBERS = 4  # that follow the hidden state


class AcceptanceHead(PairHead):
    """D residual blocks x + SiLU(Wx + b), then Linear(d, 2); class 1 means accepted.

    x is the drafter's hidden state followed by four numbers: log q and log(1 - q) of the token, log q of the most
    probable other token, and the distribution's entropy. So d is the drafter's hidden size + 4.
    """

    kind: ClassVar[str] = "acceptance_head"
    format: ClassVar[int] = 2

    def __init__(self, hidden_size: int, num_blocks: int = 3, rejection_weight: float = 1.0):
        """hidden_size: the drafter's.
        rejection_weight: how much more a rejection counted in training than an acceptance (w of the paper's loss).
            `log_acceptance` corrects for it and gives a probability.
        """
        super().__init__()
        self.shape = {"hidden_size": hidden_size, "num_blocks": num_blocks, "rejection_weight": rejection_weight}
        self.hidden_size, self.rejection_weight = hidden_size, rejection_weight
        width = hidden_size + NUM_NUMBERS
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.out = nn.Linear(width, 2)
        self.register_buffer("log_weight", torch.tensor(float(rejection_weight)).log(), persistent=False)

    def forward(self, hidden: Tensor, statistics: Tensor) -> Tensor:
        """Logits of (rejected, accepted), [..., 2], without a correction for `rejection_weight`.

        hidden: [..., hidden_size], the drafter's last hidden state, after its final norm (`hidden_states[-1]` of
            transformers), from which the token's distribution was computed.
        statistics: [..., 3] of `kernels.token_statistics`: log q of the token and of the most probable other, and the
            entropy, of the softmax over the drafter's own logits (temperature 1, no processors), even if the token was
            drawn from another distribution. Values out of range are replaced by the nearest in range.
        """
        dtype = self.out.weight.dtype
        x = torch.cat([hidden.to(dtype), numbers(statistics.to(dtype))], -1)
        for block in self.blocks:
            x = x + F.silu(block(x))
        return self.out(x)

    def log_acceptance(self, hidden: Tensor, statistics: Tensor) -> Tensor:
        """log P(the token is accepted), [...] float32; arguments as for `forward`."""
        rejected, accepted = self(hidden, statistics).unbind(-1)
        return F.logsigmoid(accepted - rejected + self.log_weight)


def numbers(statistics: Tensor) -> Tensor:
    """The numbers that follow the hidden state, [..., NUM_NUMBERS], finite unless NaN. statistics: [..., 3]."""
    log_q, log_other, entropy = statistics.split(1, -1)
    log_q = log_q.clamp(LEAST_LOG_PROB, -1e-6)
    log_rest = torch.log(-torch.expm1(log_q)).clamp(min=LEAST_LOG_PROB)
    return torch.cat([log_q, log_rest, log_other.clamp(LEAST_LOG_PROB, 0.0), entropy.clamp(0.0, MOST_ENTROPY)], -1)
