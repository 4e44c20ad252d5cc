"""From what a user passes as `length_policy=` to a policy."""

from __future__ import annotations

from collections.abc import Callable

from specdec.errors import ConfigError
from specdec.policies.by_estimate import ByAcceptanceHead, ByDisco, Confidence
from specdec.policies.cost_model import CostModel
from specdec.policies.fixed import Fixed
from specdec.policies.heuristic import Heuristic
from specdec.policy import LengthPolicy

LENGTH_POLICIES: dict[str, Callable[..., LengthPolicy]] = {
    "fixed": Fixed,
    "heuristic": Heuristic,
    "confidence": Confidence,
    "acceptance_head": ByAcceptanceHead,
    "disco": ByDisco,
    "cost_model": CostModel,
}
WITH_THRESHOLD = frozenset({"confidence", "acceptance_head", "disco"})


def resolve_length_policy(policy: LengthPolicy | str) -> LengthPolicy:
    """A LengthPolicy from a LengthPolicy or a name; "name:0.5" gives the threshold of those that have one.

    Raises ConfigError, listing the names, for anything else.
    """
    if isinstance(policy, LengthPolicy):
        return policy
    if isinstance(policy, type) and issubclass(policy, LengthPolicy):
        raise ConfigError(f"length_policy is the class {policy.__name__}; pass an instance, {policy.__name__}(...)")
    name, _, number = policy.partition(":") if isinstance(policy, str) else (policy, "", "")
    if name not in LENGTH_POLICIES:
        raise ConfigError(f"length_policy={policy!r} is unknown; choose {', '.join(map(repr, LENGTH_POLICIES))}")
    if not number:
        return LENGTH_POLICIES[name]()
    try:
        threshold = float(number)
    except ValueError:
        threshold = -1.0
    if name not in WITH_THRESHOLD or not 0 <= threshold <= 1:
        raise ConfigError(
            f"length_policy={policy!r}: a number from 0 to 1 may follow {', '.join(sorted(WITH_THRESHOLD))} alone"
        )
    return LENGTH_POLICIES[name](threshold)
