"""As many tokens as allowed, in every step."""

from __future__ import annotations

import numpy as np

from specdec.batch.rows import Rows
from specdec.policy import LengthPolicy

DEFAULT_FIXED = 5


class Fixed(LengthPolicy):
    """As many tokens as allowed."""

    name = "fixed"
    default_tokens = DEFAULT_FIXED

    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        return np.full(len(rows), max_tokens)

    def next_width(self, max_tokens: int) -> int | None:
        return max_tokens
