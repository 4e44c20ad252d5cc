"""A trained pair in the shape of a large one, with its trained heads.

The heads read the small draft's hidden state. A stand-in's state is mapped back to it before a head sees it; this costs
one small product per drafted token, which a head of the large shape would not need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from stand_in import SHAPES, stand_in
from torch import Tensor

import specdec
from specdec.bench.methods import Pair
from specdec.draft import Shown
from specdec.drafter import Drafter
from specdec.policies.by_estimate import ByAcceptanceHead
from specdec.policies.cost_model import CostModel
from specdec.policies.costs import CostClock
from specdec.policies.estimates import HeadEstimate
from specdec.policies.heads.acceptance_head import AcceptanceHead
from specdec.policies.heads.files import PairHead


@dataclass(frozen=True)
class StandIns:
    """pair: of the large shapes. small: the pair they were made from. to_small_hidden: the draft's, see `StandIn`."""

    pair: Pair
    small: Pair
    to_small_hidden: Tensor

    def adopt(self, head: PairHead) -> PairHead:
        """The head, checked against the small pair that it was trained for, as the large pair's own."""
        head.check(self.small.target, self.small.draft)
        return head.trained_for(self.pair.target, self.pair.draft, head.recipe)


@contextmanager
def stand_ins(
    small: Pair, target_shape: str, draft_shape: str, dtype: torch.dtype, device: torch.device
) -> Iterator[StandIns]:
    """Makes batch-invariant stand-ins. Raises ValueError if the pair does not fit into the shapes."""
    target = stand_in(small.target, SHAPES[target_shape], dtype, device).model
    draft = stand_in(small.draft, SHAPES[draft_shape], dtype, device)
    name = f"{target_shape} and {draft_shape} of Qwen3 from {small.name}"
    with specdec.batch_invariant(target), specdec.batch_invariant(draft.model):
        yield StandIns(replace(small, name=name, target=target, draft=draft.model), small, draft.to_small_hidden)


class HeadOnStandIn(HeadEstimate):
    """A head that sees the small draft's hidden states."""

    to_small_hidden: Tensor

    @classmethod
    def with_map(cls, head: AcceptanceHead, target: Any, drafter: Drafter, to_small_hidden: Tensor) -> HeadOnStandIn:
        found = cls.of("acceptance_head", head, target, drafter)
        found.to_small_hidden = to_small_hidden
        return found

    def __call__(self, shown: Shown) -> np.ndarray:
        return super().__call__(self.mapped(shown) if self.is_on_cpu else shown)

    def probabilities(self, shown: Shown) -> Tensor:  # runs within a CUDA graph
        return super().probabilities(self.mapped(shown))

    def mapped(self, shown: Shown) -> Shown:
        return replace(shown, hidden_states=shown.hidden_states.float() @ self.to_small_hidden)


class ByAcceptanceHeadOnStandIn(ByAcceptanceHead):
    def __init__(self, threshold: float, head: AcceptanceHead, to_small_hidden: Tensor):
        super().__init__(threshold, head=head)
        self.to_small_hidden = to_small_hidden

    def estimate_for(self, target: Any, drafter: Drafter) -> HeadOnStandIn:
        return HeadOnStandIn.with_map(self.head, target, drafter, self.to_small_hidden)


class CostModelOnStandIn(CostModel):
    def __init__(self, head: AcceptanceHead, clock: CostClock | None, to_small_hidden: Tensor):
        super().__init__(head, clock)
        self.to_small_hidden = to_small_hidden

    def find_estimate(self, target: Any, drafter: Drafter) -> HeadOnStandIn:
        return HeadOnStandIn.with_map(self.head, target, drafter, self.to_small_hidden)
