"""How far the drafter's distribution q is from the target's p: the losses of DistillSpec.

Zhou et al., "DistillSpec: Improving Speculative Decoding via Knowledge Distillation" (2023), section 3.2 and appendix.
All take log-probabilities, [..., vocab] float32, and give nats (TVD: a probability) per position, [...].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from specdec.errors import ConfigError

Divergence = Callable[[Tensor, Tensor], Tensor]  # (log p, log q) -> [...]
NAMES = ("fkl", "rkl", "jsd", "tvd")


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q)."""
    return expectation(log_p, log_p - log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p)."""
    return expectation(log_q, log_q - log_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    weights = log_p.new_tensor([beta, 1 - beta]).log()
    log_m = torch.logaddexp(weights[0] + log_p, weights[1] + log_q)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of |p - q|: 1 - the probability that the target accepts a sample of q."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def expectation(log_weights: Tensor, values: Tensor) -> Tensor:
    """Values with weight 0 do not count, though they may be infinite or undefined."""
    weights = log_weights.exp()
    return (weights * values.masked_fill(weights == 0, 0)).sum(-1)


def divergence_of(name: str, beta: float = 0.5) -> Divergence:
    """Raises ConfigError for an unknown name, or a beta outside (0, 1)."""
    if not 0 < beta < 1:
        raise ConfigError(f"beta={beta} must be between 0 and 1; 0.5 weighs both models equally")
    known: dict[str, Divergence] = {
        "fkl": forward_kl,
        "rkl": reverse_kl,
        "jsd": partial(jensen_shannon, beta=beta),
        "tvd": total_variation,
    }
    if name not in known:
        raise ConfigError(f"loss {name!r} is unknown; choose one of {', '.join(known)}, or ce for plain cross-entropy")
    return known[name]
