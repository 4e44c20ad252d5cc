"""Acceptance that is not lossless: more draft tokens are kept, and the output no longer follows the target.

Pass one of these as `verification=`. None is ever a default, and every report of a run names what it used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from specdec.errors import ConfigError


@dataclass(frozen=True)
class Lenient:
    """Accept with probability min(1, p / (l q)), recover from norm((p - l q)+): q counts l times.

    No token then has more than p / l of the probability; l towards 1 is rejection sampling. Deterministic drafts count
    as q = 1. Greedy: accept where p is at least l times the largest. After Leviathan et al. 2023 (arXiv 2211.17192),
    appendix A.5.

    lenience: l, above 0 and below 1.
    """

    lenience: float

    def __post_init__(self) -> None:
        check_number("lenience", self.lenience, 0, 1)
        if self.lenience == 1:
            raise ConfigError("lenience=1 is lossless; pass verification='token'")

    def __str__(self) -> str:
        return f"lenient(lenience={self.lenience:g})"


@dataclass(frozen=True)
class Typical:
    """Accept where p is at least min(epsilon, delta exp(-H(p))), H the entropy in nats; then a sample of p.

    How the draft was sampled plays no part. Sampling only: at temperature 0 it is greedy decoding. After Cai et al.
    2024 (Medusa, arXiv 2401.10774), section 2.3.1.

    epsilon: above 0, at most 1. delta: above 0.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, 0, 1)
        check_number("delta", self.delta, 0, math.inf)

    def __str__(self) -> str:
        return f"typical(epsilon={self.epsilon:g}, delta={self.delta:g})"


@dataclass(frozen=True)
class TopBeta:
    """Accept a token among the target's `beta` likeliest whose log probability is within `tau` of the largest.

    Greedy decoding only. beta=1 is greedy decoding itself. After Xia et al. 2023 (SpecDec, arXiv 2203.16487).

    beta: at least 1. tau: at least 0, in nats.
    """

    beta: int
    tau: float

    def __post_init__(self) -> None:
        if not isinstance(self.beta, int) or isinstance(self.beta, bool) or self.beta < 1:
            raise ConfigError(f"beta={self.beta!r} must be a whole number of at least 1")
        if self.tau != 0:
            check_number("tau", self.tau, 0, math.inf)

    def __str__(self) -> str:
        return f"top_beta(beta={self.beta}, tau={self.tau:g})"


Lossy = Lenient | Typical | TopBeta
LOSSY = {"lenient": Lenient, "typical": Typical, "top_beta": TopBeta}
SAMPLED, GREEDY = (Lenient, Typical), (Lenient, TopBeta)


def check_number(name: str, value: object, above: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most or value == math.inf:
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise ConfigError(f"{name}={value!r} must be a number above {above:g}{limit}")


def verification_named(text: str) -> str | Lossy:
    """The value that a command line gives: "token", "block", or a lossy rule with its numbers, "typical:0.09:0.3".

    Raises ConfigError for a rule with other numbers than it takes.
    """
    name, *numbers = text.split(":")
    rule: Any = LOSSY.get(name)
    if rule is None:
        return text
    names = [field.name for field in fields(rule)]
    try:
        values = [int(number) if key == "beta" else float(number) for key, number in zip(names, numbers, strict=True)]
    except ValueError:
        raise ConfigError(f"--verification {text}: pass {':'.join([name, *map(str.upper, names)])}") from None
    try:
        return rule(*values)
    except ConfigError as error:
        raise ConfigError(f"--verification {text}: {error}") from None
