"""When each row got its tokens, and how many in each step, observed from inside a decoding call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from specdec.batch.report import StepReport


@dataclass
class RowTimes:
    """first_token, last_token: seconds from the beginning of the call. accept_lengths: tokens that each forward of the
    target gave the row, including the one over its prompt, so that they sum to its new tokens. num_steps: the number of
    these forwards that could verify a draft. num_step_tokens: what those gave; None for peers, whose first forward may
    verify a draft together with the prompt."""

    first_token: float
    last_token: float
    accept_lengths: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_step_tokens: int | None = None


class StepClock:
    """Usage: call `begin`, let one call decode one batch, then call `rows`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._times: dict[int, RowTimes] = {}
        self._steps: list[tuple[float, int]] = []  # for transformers: seconds, columns after the prompts

    def begin(self) -> None:
        self._begin = self._now()

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def on_commit(self, report: StepReport) -> None:
        """For our methods: record tokens and times of each row."""
        now = self._now() - self._begin
        for slot, row in enumerate(report.row_ids.tolist()):
            times = self._times.setdefault(row, RowTimes(now, now, num_step_tokens=0))
            if count := int(report.num_committed[slot]):
                times.accept_lengths.append(count)
                times.last_token = now
            if not report.is_prefill:
                times.num_steps += 1
                times.num_step_tokens = (times.num_step_tokens or 0) + count

    def criteria(self, input_ids: Tensor) -> StoppingCriteriaList:
        """For transformers: a criterion checked after every step that never stops, and records how long the batch has
        grown.
        """
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
        """For a batch whose rows all grow alike: a row has its n tokens once there are n columns."""
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
