"""How each row's scores become a distribution: temperature, top-k, top-p and min-p, one set of values per request.

Rows of one batch may belong to different requests. A row gets the same numbers in any batch, to the last bit, so
nothing here or in the kernels that read it may depend on the values of other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Truncation(NamedTuple):
    """The values of one request.

    temperature: >= 0; 0 is greedy, all probability on the first of the largest scores, and the other values are
        ignored. top_k: 0 for no limit. top_p: 1 for no limit. min_p: 0 for no limit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


NO_TRUNCATION = Truncation()
GREEDY = Truncation(temperature=0.0)


@dataclass(frozen=True, eq=False)
class Truncations:
    """The values of every row of a batch.

    each: one Truncation per row, on the host. distinct: those that occur, each once.
    temperature, top_k, top_p, log_min_p: [rows] float64 on the device; temperature is 0 in greedy rows and log_min_p is
        -inf where there is no min_p. The logarithm is taken on the host, where its bits do not depend on the device.
    """

    each: tuple[Truncation, ...]
    distinct: tuple[Truncation, ...]
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor

    @classmethod
    def of(cls, each: Sequence[Truncation], device: torch.device | str) -> Truncations:
        """One Truncation per row."""
        each = tuple(GREEDY if truncation.is_greedy else truncation for truncation in each)
        numbers = np.array([_numbers(truncation) for truncation in each], dtype=np.float64).reshape(-1, 4)

        return cls(each, tuple(dict.fromkeys(each)), *_to_device(numbers.T, device))

    @classmethod
    def same(cls, truncation: Truncation, num_rows: int, device: torch.device | str) -> Truncations:
        """The same Truncation for all rows."""
        truncation = GREEDY if truncation.is_greedy else truncation
        numbers = np.array(_numbers(truncation), dtype=np.float64)[:, None].repeat(num_rows, 1)

        return cls((truncation,) * num_rows, (truncation,), *_to_device(numbers, device))

    def __len__(self) -> int:
        return len(self.each)

    def take(self, rows: Sequence[int] | np.ndarray) -> Truncations:
        """The values of some rows, in the order of `rows` (indices on the host); a row may occur more than once."""
        device = self.temperature.device
        if len(self.distinct) == 1:
            return self.same(self.distinct[0], len(rows), device)
        return self.of([self.each[row] for row in rows], device)

    @cached_property
    def has_greedy(self) -> bool:
        return any(truncation.is_greedy for truncation in self.distinct)

    @cached_property
    def has_temperature(self) -> bool:
        """Whether any row has a temperature other than 1."""
        return any(truncation.temperature != 1 for truncation in self.distinct)

    @cached_property
    def has_top_k(self) -> bool:
        return any(truncation.top_k > 0 for truncation in self.distinct)

    @cached_property
    def has_top_p(self) -> bool:
        return any(truncation.top_p < 1 for truncation in self.distinct)

    @cached_property
    def has_min_p(self) -> bool:
        return any(truncation.min_p > 0 for truncation in self.distinct)

    @cached_property
    def _groups(self) -> tuple[list[Tensor], Tensor]:
        """The rows of each distinct truncation, [group] int64 each; and the place of every row in their sequence."""
        number_of = {truncation: number for number, truncation in enumerate(self.distinct)}
        group_of_row = np.array([number_of[truncation] for truncation in self.each])
        order = torch.from_numpy(np.argsort(group_of_row, kind="stable"))
        sizes = np.bincount(group_of_row).tolist()

        return list(order.split(sizes)), order.argsort()

    def apply(self, function: Callable[[Tensor, Truncation], tuple[Tensor, ...]], scores: Tensor) -> tuple[Tensor, ...]:
        """function(scores of some rows, their truncation) for the rows of each distinct truncation, put together again.

        Rows that share a truncation are served in one call. The references use this: a group never sees the values
        of another, so neither the steps taken nor their rounding can depend on them.
        """
        if len(self.distinct) <= 1:
            return function(scores, self.distinct[0] if self.distinct else NO_TRUNCATION)

        groups, place = self._groups
        parts = [function(scores[rows], truncation) for rows, truncation in zip(groups, self.distinct, strict=True)]
        return tuple(torch.cat(values)[place] for values in zip(*parts, strict=True))

    def check_rows(self, scores: Tensor) -> None:
        """Raise ValueError unless there is one truncation per row of scores, [rows, ...]."""
        if len(self) != len(scores):
            raise ValueError(f"{len(self)} truncations for scores of {len(scores)} rows; pass one per row")


def _numbers(truncation: Truncation) -> tuple[float, float, float, float]:
    temperature, top_k, top_p, min_p = truncation
    return temperature, top_k, top_p, math.log(min_p) if min_p > 0 else -math.inf


def _to_device(numbers: np.ndarray, device: torch.device | str) -> tuple[Tensor, ...]:
    """numbers: [4, rows] float64. One copy; a GPU makes it when it gets there, without the host waiting."""
    num_rows = numbers.shape[1]
    # Of even length, so that each of the four is aligned to 16 bytes: Triton compiles anew for other alignments.
    padded = torch.zeros(4, num_rows + num_rows % 2, dtype=torch.float64)
    padded[:, :num_rows] = torch.from_numpy(numbers)
    if torch.device(device).type == "cuda":
        padded = padded.pin_memory()
    return padded.to(device, non_blocking=True)[:, :num_rows].unbind()
