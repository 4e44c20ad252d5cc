"""What a forward costs, measured while it is used: times by rows, context and tokens, robust against a busy machine."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from specdec.limits import MAX_STEP_WIDTH

MAX_TOKENS = MAX_STEP_WIDTH  # of one row in a step
NUM_SAMPLES = 11  # of each time the last ones, of which the lower median counts
SHORTEST_CONTEXT = 128
NUMBERS = np.arange(MAX_TOKENS + 1)


class Clock(Protocol):
    """mark: this moment of the device's work. seconds: between two marks of the past."""

    def mark(self) -> Any: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


@dataclass(frozen=True)
class HostClock:
    """mark: seconds, of the wall's clock or any other."""

    mark: Callable[[], float] = time.perf_counter

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class CudaClock:
    """Events in the stream; nothing waits but for the last, when the step's copy to the host has already waited."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1000


@dataclass
class Curve:
    """Seconds by number of tokens, at one number of rows and about one length of context.

    base: [MAX_TOKENS + 1], the expected shape: where something was measured it is scaled to that, in between by what
    lies around. Beyond it rises at least as fast as over what was measured.
    is_guess: base is a shape alone, in no unit of time.
    """

    base: np.ndarray
    is_guess: bool = True
    samples: dict[int, deque[float]] = field(default_factory=dict)
    _met: set[int] = field(default_factory=set)
    _scales: dict[int, float] = field(default_factory=dict)
    _changed: set[int] = field(default_factory=set)  # what `_scales` has not yet seen
    _seconds: np.ndarray | None = None

    def add(self, tokens: int, seconds: float) -> None:
        self.samples.setdefault(tokens, deque(maxlen=NUM_SAMPLES)).append(seconds)
        self._changed.add(tokens)
        self._seconds = None

    def add_warm(self, tokens: int, seconds: float) -> None:
        """The first time of a shape may have compiled it or captured a graph, and found its memory cold: it counts only
        where it is less than was expected."""
        is_first, self._met = tokens not in self._met, self._met | {tokens}
        knows = bool(self.samples) or not self.is_guess
        if not (is_first and knows and seconds > self.seconds[tokens]):
            self.add(tokens, seconds)

    @property
    def seconds(self) -> np.ndarray:
        """[MAX_TOKENS + 1]"""
        if self._seconds is None:
            if not self.samples:
                return self.base
            for tokens in self._changed:
                self._scales[tokens] = statistics.median_low(self.samples[tokens]) / float(self.base[tokens])
            self._changed.clear()
            known, scale = zip(*sorted(self._scales.items()), strict=True)
            self._seconds = seconds = self.base * np.interp(NUMBERS, known, scale)
            first, last = known[0], known[-1]
            if first < last:
                slope = (seconds[last] - seconds[first]) / (last - first)
                seconds[last:] = np.maximum(seconds[last:], seconds[last] + slope * (NUMBERS[last:] - last))
        return self._seconds


class CostTable:
    """Times of one kind of call. A number of rows or a context that is met for the first time begins with the curve of
    the nearest one."""

    def __init__(self, shape: Callable[[np.ndarray], np.ndarray]):
        """shape: seconds by number of tokens, where nothing has been measured yet; above 0."""
        self.first = shape(np.arange(MAX_TOKENS + 1, dtype=np.float64))
        self.curves: dict[tuple[int, int], Curve] = {}

    def curve(self, num_rows: int, context: int) -> Curve:
        """context: tokens of the longest row."""
        key = num_rows, context_bucket(context)
        found = self.curves.get(key)
        if found is None:
            nearest = min(self.curves, key=lambda other: distance(key, other), default=None)
            if nearest is None:
                found = Curve(self.first)
            else:
                like = self.curves[nearest]
                found = Curve(like.seconds.copy(), is_guess=like.is_guess and not like.samples)
            self.curves[key] = found
        return found


def context_bucket(context: int) -> int:
    """
    >>> [context_bucket(context) for context in (1, 128, 129, 1000)]
    [7, 7, 8, 10]
    """
    return max(context - 1, SHORTEST_CONTEXT - 1).bit_length()


def distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Rows count by their logarithm, and before contexts."""
    return 4 * abs(math.log2(one[0] / other[0])) + abs(one[1] - other[1])


class Survival:
    """How likely each row's drafts are accepted up to each place, from what became of earlier ones.

    Places first: the share accepted at place j of those that reached it, over all rows. A row's own share, which is
    forgotten within some steps, is drawn towards these.
    """

    ROW_WEIGHT = 6.0  # tokens that count as much as the places' shares
    ROW_MEMORY = 0.9  # per step
    PLACE_MEMORY = 0.995  # per row and step
    PRIOR, PRIOR_WEIGHT = 0.7, 2.0
    LEAST = 1e-6  # what was never seen may still happen

    def __init__(self, max_tokens: int):
        self.tried = np.full(max_tokens, self.PRIOR_WEIGHT)
        self.accepted = np.full(max_tokens, self.PRIOR_WEIGHT * self.PRIOR)
        self.rows = np.zeros((2, 64))  # by row id: tried and accepted tokens

    def forget_rows(self) -> None:
        """Row ids mean other rows from now on."""
        self.rows[:] = 0

    def conditional(self, row_ids: np.ndarray, num_tokens: int) -> np.ndarray:
        """P(token j is accepted | those before it are), [rows, num_tokens]."""
        self._make_room(row_ids)
        tried, accepted = self.rows[:, row_ids, None]
        places = self.accepted[:num_tokens] / self.tried[:num_tokens]
        return np.maximum((accepted + self.ROW_WEIGHT * places) / (tried + self.ROW_WEIGHT), self.LEAST)

    def learn(self, row_ids: np.ndarray, asked: np.ndarray, accepted: np.ndarray) -> None:
        """asked, accepted: [rows] integers, tokens that might have been accepted and those that were. A drafter that
        proposes nothing is wrong."""
        self._make_room(row_ids)
        tried = np.minimum(accepted + 1, asked)
        self.rows[:, row_ids] = self.ROW_MEMORY * self.rows[:, row_ids] + (tried, accepted)
        most = int(tried.max())  # of the places behind it nothing is learned
        place, memory = np.arange(most), self.PLACE_MEMORY ** len(row_ids)
        for total, counts in ((self.tried, tried), (self.accepted, accepted)):
            total[:most] = memory * total[:most] + (place < counts[:, None]).sum(0)

    def _make_room(self, row_ids: np.ndarray) -> None:
        size = int(row_ids.max(initial=0)) + 1
        if size > self.rows.shape[1]:
            self.rows = np.pad(self.rows, ((0, 0), (0, 2 * size - self.rows.shape[1])))


class Recalibrated:
    """Predicted acceptance, corrected by what became of earlier predictions: bins of equal width, each drawn to the
    prediction itself by a weight of PRIOR_WEIGHT tokens."""

    NUM_BINS = 10
    PRIOR_WEIGHT = 20.0

    def __init__(self) -> None:
        self.tokens, self.excess, self._correction = np.zeros((3, self.NUM_BINS))

    def __call__(self, predicted: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(predicted + self._correction[self._bins(predicted)], 0.0), 1.0)

    def learn(self, predicted: np.ndarray, accepted: np.ndarray) -> None:
        """[tokens] each; accepted: bool."""
        index = self._bins(predicted)
        self.tokens += np.bincount(index, None, self.NUM_BINS)
        self.excess += np.bincount(index, accepted - predicted, self.NUM_BINS)
        self._correction = self.excess / (self.tokens + self.PRIOR_WEIGHT)

    def _bins(self, predicted: np.ndarray) -> np.ndarray:
        return np.minimum((predicted * self.NUM_BINS).astype(np.int64), self.NUM_BINS - 1)
