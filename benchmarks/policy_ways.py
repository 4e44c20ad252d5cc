"""The ways that `policies.py` compares: length policies with their settings, and an oracle that cannot be beaten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from stand_in_pair import ByAcceptanceHeadOnStandIn, CostModelOnStandIn, StandIns

import specdec
from specdec.bench.methods import Pair
from specdec.policies.by_estimate import ByAcceptanceHead, ByDisco, Confidence
from specdec.policies.cost_model import CostModel
from specdec.policies.costs import HostClock
from specdec.policies.fixed import Fixed
from specdec.policies.heads.acceptance_head import AcceptanceHead
from specdec.policies.heads.disco import Disco
from specdec.policies.heads.files import PairHead
from specdec.policy import LengthPolicy

MOST = 20
THRESHOLDS = {
    "confidence": (0.2, 0.35, 0.5),
    "acceptance_head": (0.3, 0.4, 0.5, 0.6, 0.7, 0.85),
    "disco": (0.3, 0.45, 0.6),
}
KINDS = ("plain", "fixed", "confidence", "acceptance_head", "disco", "cost_model", "cost_model with head", "oracle")


class Oracle(LengthPolicy):
    """Drafts exactly the tokens that will be accepted, and nothing if the first would be rejected."""

    name = "oracle"

    def __init__(self, agrees: Sequence[np.ndarray]):
        """agrees: per row of the batch [new tokens] bool, whether the draft model proposes the target's token there."""
        self.runs = [run_lengths(row) for row in agrees]

    def widths(self, rows: specdec.Rows, max_tokens: int) -> np.ndarray:
        places = zip(rows.row_ids.tolist(), rows.num_new_tokens.tolist(), strict=True)
        return np.array([self.runs[row][place] if place < len(self.runs[row]) else 0 for row, place in places])


def run_lengths(agrees: np.ndarray) -> list[int]:
    """The number of consecutive agreeing places from each place on.

    >>> run_lengths(np.array([True, True, False, True]))
    [2, 1, 0, 1]
    """
    lengths = [0]
    for agreed in agrees[::-1]:
        lengths.append(lengths[-1] + 1 if agreed else 0)
    return lengths[:0:-1]


@torch.no_grad()
def agreement(pair: Pair, outputs: Sequence[list[int]]) -> list[np.ndarray]:
    """Whether the draft model's argmax after the true text is the target's token, [new tokens] bool per prompt."""
    found = []
    for prompt, new in zip(pair.prompts, outputs, strict=True):
        tokens = torch.cat([prompt, torch.tensor(new)]).to(pair.draft.device)
        guesses = pair.draft(input_ids=tokens[None, :-1], use_cache=False).logits[0].argmax(-1)
        found.append((guesses == tokens[1:])[len(prompt) - 1 :].cpu().numpy())
    return found


@dataclass(frozen=True)
class Way:
    """One length policy with one setting. make: a policy for the prompts of a batch; None is plain decoding."""

    kind: str
    setting: float | None
    most: int
    make: Callable[[range], LengthPolicy] | None

    @property
    def name(self) -> str:
        return self.kind if self.setting is None else f"{self.kind} {self.setting:g}"


def all_ways(
    folder: Path,
    lengths: Sequence[int],
    thresholds: Mapping[str, Sequence[float]],
    agrees: Sequence[np.ndarray],
    clock: HostClock | None,
    stand_ins: StandIns | None = None,
) -> list[Way]:
    """folder: of the heads; missing kinds of heads are left out. lengths: fixed K. clock: of cost models."""
    ways = [Way("plain", None, 1, None)]
    ways += [Way("fixed", k, k, lambda prompts: Fixed()) for k in lengths]
    ways += [Way("confidence", h, MOST, lambda p, h=h: Confidence(h)) for h in thresholds["confidence"]]
    ways.append(Way("cost_model", None, MOST, lambda prompts: CostModel(None, clock)))
    by_head, by_cost = ByAcceptanceHead, CostModel
    if stand_ins is not None:
        by_head = partial(ByAcceptanceHeadOnStandIn, to_small_hidden=stand_ins.to_small_hidden)
        by_cost = partial(CostModelOnStandIn, to_small_hidden=stand_ins.to_small_hidden)
    if (folder / f"{AcceptanceHead.kind}.json").is_file():
        head = adopted(AcceptanceHead.load(folder), stand_ins)
        ways += [
            Way("acceptance_head", h, MOST, lambda p, h=h: by_head(h, head=head)) for h in thresholds["acceptance_head"]
        ]
        ways.append(Way("cost_model with head", None, MOST, lambda prompts: by_cost(head, clock)))
    if (folder / f"{Disco.kind}.json").is_file():
        disco = adopted(Disco.load(folder), stand_ins)
        ways += [Way("disco", c, MOST, lambda p, c=c: ByDisco(c, head=disco)) for c in thresholds["disco"]]
    return [*ways, Way("oracle", None, MOST, lambda prompts: Oracle([agrees[i] for i in prompts]))]


def adopted(head: PairHead, stand_ins: StandIns | None) -> PairHead:
    return head if stand_ins is None else stand_ins.adopt(head)
