"""What a drafter hands to the target, as tensors alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ExtraQueries(NamedTuple):
    """A branch that the verify forward takes along after every column of its text.

    embeddings: [extra, hidden], input embeddings of the model. ahead: [extra] int64, how many places after the end of
    the text each query stands, never descending: query i between 1 and i + 1; several may stand in one place.
    """

    embeddings: Tensor
    ahead: Tensor

    @property
    def num(self) -> int:
        return len(self.embeddings)
