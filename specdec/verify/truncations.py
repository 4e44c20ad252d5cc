"""Where a step gets the truncation of each of its rows from."""

from __future__ import annotations

from typing import Protocol

from specdec.batch.rows import Rows
from specdec.kernels.commit.truncation import Truncation, Truncations


class HasTruncations(Protocol):
    """Whatever knows the temperature, top-k, top-p and min-p of rows."""

    def truncations(self, rows: Rows) -> Truncations:
        """Those of the rows of this step, in their order."""


class SameForAllRows:
    """One truncation for every row; the tensors are made anew only when the number of rows changes."""

    def __init__(self, truncation: Truncation):
        self.truncation = truncation
        self._held: Truncations | None = None

    def truncations(self, rows: Rows) -> Truncations:
        held = self._held
        if held is None or len(held) != len(rows) or held.temperature.device != rows.device:
            held = self._held = Truncations.same(self.truncation, len(rows), rows.device)
        return held
