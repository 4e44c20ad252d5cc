"""Small models fall into loops, which are easy to draft and flatter every drafter: benchmarks count them."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PERIOD = 32  # tokens
MIN_LOOP = 16  # tokens


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the text ends in three or more copies of one piece of up to MAX_PERIOD tokens, MIN_LOOP together."""
    for period in range(1, MAX_PERIOD + 1):
        length = max(3 * period, MIN_LOOP)
        tail = tokens[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            return True
    return False
