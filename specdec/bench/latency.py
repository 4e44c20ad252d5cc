"""When each row got its tokens, and how many in each step, seen from within a decoding call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from specdec import StepReport


@dataclass
class RowTimes:
    """first_token, last_token: seconds from the beginning of the call. accept_lengths: tokens that each forward of the
    target gave the row, the one over its prompt included, so that they sum to its new tokens. num_steps: those of them
    that could verify a draft. num_accepted: draft tokens accepted, None for peers, which do not tell."""

    first_token: float
    last_token: float
    accept_lengths: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_accepted: int | None = None


class StepClock:
    """Begin it, let one call decode one batch, then ask for `rows`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._times: dict[int, RowTimes] = {}
        self._steps: list[tuple[float, int]] = []  # of transformers: seconds, columns behind the prompts

    def begin(self) -> None:
        self._begin = self._now()

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def on_commit(self, report: StepReport) -> None:
        """Ours: tokens and times of each row."""
        now = self._now() - self._begin
        for slot, row in enumerate(report.row_ids.tolist()):
            times = self._times.setdefault(row, RowTimes(now, now, num_accepted=0))
            if count := int(report.num_committed[slot]):
                times.accept_lengths.append(count)
                times.last_token = now
            if not report.is_prefill:
                times.num_steps += 1
                times.num_accepted = (times.num_accepted or 0) + int(report.num_accepted[slot])

    def criteria(self, input_ids: Tensor) -> StoppingCriteriaList:
        """transformers': asked after every step, stops nothing. It tells how long all rows together have grown."""
        columns = input_ids.shape[1]

        class Watch(StoppingCriteria):
            def __call__(watch, ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
                self._steps.append((self._now() - self._begin, ids.shape[1] - columns))
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        return StoppingCriteriaList([Watch()])

    def rows(self, outputs: Sequence[list[int]]) -> list[RowTimes]:
        """outputs: the new tokens of each row of the batch, in order."""
        if self._times:
            return [self._times[row] for row in range(len(outputs))]
        return [self._row_of_steps(len(tokens)) for tokens in outputs]

    def _row_of_steps(self, num_tokens: int) -> RowTimes:
        """Of a batch that grows in all rows alike: a row has its tokens once there are so many columns."""
        lengths, before = [], 0
        for seconds, columns in self._steps:
            now = min(columns, num_tokens)
            if now > before:
                lengths.append(now - before)
                last, before = seconds, now
        return RowTimes(self._steps[0][0], last, lengths, max(len(lengths) - 1, 0))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
