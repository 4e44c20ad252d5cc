"""How the speed of a call is counted, for ours, transformers' and another engine's alike, without torch or specdec.

A call is timed as a whole, as its user waits for it. What comes after the prefill is the difference from the same call
for one token, so nothing is attached to the calls themselves.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

PREFILLS = 5  # calls for one token: their median and their worst


@dataclass
class CallTimes:
    """Seconds of the same call, many times. whole: for new_tokens tokens a row; prefill: for one."""

    rows: int
    new_tokens: int
    whole: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)

    @property
    def with_prefill(self) -> float:
        """Tokens per second of all rows, prompts included."""
        return self.rows * self.new_tokens / statistics.median(self.whole)

    @property
    def after_prefill(self) -> float | None:
        """Tokens per second of all rows from the first token on; None if the clock shows no time for them."""
        seconds = statistics.median(self.whole) - statistics.median(self.prefill)
        return self.rows * (self.new_tokens - 1) / seconds if seconds > 0 and self.new_tokens > 1 else None

    def summary(self) -> dict[str, Any]:
        return {
            "tokens_per_second": rounded(self.after_prefill),
            "tokens_per_second_with_prefill": rounded(self.with_prefill),
            "prefill_ms": round(1e3 * statistics.median(self.prefill), 2),
            "worst_prefill_ms": round(1e3 * max(self.prefill), 2),
            "seconds": [round(one, 5) for one in self.whole],
            "prefill_seconds": [round(one, 5) for one in self.prefill],
        }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else round(one / other, 3)


def timed(call: Callable[[], Any], synchronise: Callable[[], Any] = lambda: None) -> tuple[float, Any]:
    """Seconds of a call, with the device idle before and after it, and what it returned."""
    synchronise()
    begin = time.perf_counter()
    found = call()
    synchronise()
    return time.perf_counter() - begin, found


def share(number: int, rounds: int, count: int = PREFILLS) -> int:
    """How many of `count` calls round `number` of `rounds` makes.

    >>> [share(number, 3) for number in range(3)]
    [2, 2, 1]
    """
    return len(range(number, count, rounds))


def digest(rows: Sequence[Sequence[int]]) -> str:
    """The first 16 digits of a hash of token ids."""
    text = ";".join(",".join(map(str, row)) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def equal_rows(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    return sum(list(one) == list(other) for one, other in zip(found, expected, strict=True))
