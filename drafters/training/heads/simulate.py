"""What a rule for the draft's length gains, computed from where the drafter agrees with the target's greedy text.

Up to its first rejected token, a draft follows the text that the target writes. So acceptance after every prefix of
that text determines a whole run of greedy speculative decoding without running it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_TOKENS = 20
FIXED = range(1, MAX_TOKENS + 1)
THRESHOLDS = [0.02, 0.05, *np.round(np.arange(0.1, 0.96, 0.05), 2).tolist(), 0.98]


@dataclass(frozen=True)
class Trace:
    """One continuation. accepted: [tokens] bool, whether the draft for a token is right. acceptance: [tokens] float64,
    the predicted probability of that; top_prob: [tokens] float64, the drafter's own for its token."""

    accepted: np.ndarray
    acceptance: np.ndarray
    top_prob: np.ndarray


Rule = Callable[[Trace, int], int]  # how many tokens to draft from a position on, at least 1


def fixed(num_tokens: int) -> Rule:
    return lambda trace, start: num_tokens


def product(name: str, threshold: float) -> Rule:
    """Stop after the token at which 1 - prod a_i exceeds the threshold (SpecDec++, eq. of section 3.2)."""

    def rule(trace: Trace, start: int) -> int:
        doubt = 1 - np.cumprod(getattr(trace, name)[start : start + MAX_TOKENS])
        over = np.flatnonzero(doubt > threshold)
        return int(over[0]) + 1 if len(over) else MAX_TOKENS

    return rule


def below(threshold: float) -> Rule:
    """Stop after the first token whose own probability is below the threshold, as transformers does."""

    def rule(trace: Trace, start: int) -> int:
        under = np.flatnonzero(trace.top_prob[start : start + MAX_TOKENS] < threshold)
        return int(under[0]) + 1 if len(under) else MAX_TOKENS

    return rule


def oracle(trace: Trace, start: int) -> int:
    """Draft exactly the tokens that will be accepted."""
    wrong = np.flatnonzero(~trace.accepted[start : start + MAX_TOKENS])
    return int(wrong[0]) if len(wrong) else MAX_TOKENS


def speed(traces: Sequence[Trace], rule: Rule, draft_cost: float) -> float:
    """Tokens per time of a target call. draft_cost: time of a draft token, in target calls."""
    num_tokens, time = 0, 0.0
    for trace in traces:
        start = 0
        while start < len(trace.accepted):
            drafted = min(rule(trace, start), len(trace.accepted) - start)
            wrong = np.flatnonzero(~trace.accepted[start : start + drafted])
            gained = (int(wrong[0]) if len(wrong) else drafted) + 1
            num_tokens += min(gained, len(trace.accepted) - start)
            time += 1 + draft_cost * drafted
            start += gained
    return num_tokens / time


def compare_rules(traces: Sequence[Trace], draft_cost: float) -> dict[str, dict[str, float]]:
    """Each kind of rule at its best setting: chosen on every other trace, measured on the rest.

    setting: K for `fixed`, the threshold for the others. gain: speed over the best fixed K's, less 1.
    share_of_oracle: gain over that of an oracle, both over the best fixed K.
    """
    kinds: dict[str, dict[float, Rule]] = {
        "fixed": {k: fixed(k) for k in FIXED},
        "confidence": {t: below(t) for t in THRESHOLDS},
        "product of confidences": {t: product("top_prob", t) for t in THRESHOLDS},
        "head": {t: product("acceptance", t) for t in THRESHOLDS},
        "oracle": {0.0: oracle},
    }
    chosen: dict[str, dict[str, float]] = {}
    for kind, rules in kinds.items():
        setting = max(rules, key=lambda value: speed(traces[::2], rules[value], draft_cost))
        chosen[kind] = {"setting": setting, "speed": speed(traces[1::2], rules[setting], draft_cost)}
    base, best = chosen["fixed"]["speed"], chosen["oracle"]["speed"]
    for found in chosen.values():
        found["gain"] = found["speed"] / base - 1
        found["share_of_oracle"] = (found["speed"] - base) / (best - base) if best > base else 0.0
    return {kind: {name: round(value, 4) for name, value in found.items()} for kind, found in chosen.items()}
