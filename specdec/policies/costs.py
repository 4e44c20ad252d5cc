"""What a forward costs and how far drafts are accepted, learned from the steps themselves.

Times are kept by rows, context and tokens, in a way that a busy machine does not disturb.
"""

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

MAX_TOKENS = MAX_STEP_WIDTH  # of a row in a forward: times and acceptance are kept up to here
# Of each time the last ones are kept, and their lower median counts. An odd number, large enough that a few slow
# moments do not show, small enough that a machine that has become slower does.
NUM_SAMPLES = 11
SHORTEST_CONTEXT = 128  # tokens; up to here attention takes so little time that contexts need not be told apart
# One doubling of the rows counts as much as this many doublings of the context: it changes a forward's cost more.
ROWS_OVER_CONTEXT = 4
TOKEN_COUNTS = np.arange(MAX_TOKENS + 1)


class CostClock(Protocol):
    """mark: the present moment of the device's work. seconds: between two marks of the past."""

    def mark(self) -> Any: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


@dataclass(frozen=True)
class HostClock:
    """mark: seconds, by the wall clock or any other."""

    mark: Callable[[], float] = time.perf_counter

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class CudaClock:
    """Events in the stream. Only the last one is waited for, when the step's copy to the host has waited already."""

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

    base: [MAX_TOKENS + 1], the expected shape. It is scaled to what was measured, and between two measured numbers of
        tokens by the interpolated scale. After the last one it rises at least as fast as over what was measured.
    is_guess: base is a shape alone, in no unit of time.
    """

    base: np.ndarray
    is_guess: bool = True
    samples: dict[int, deque[float]] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    _scales: dict[int, float] = field(default_factory=dict)
    _changed: set[int] = field(default_factory=set)  # numbers of tokens whose scale is out of date
    _seconds: np.ndarray | None = None

    def add(self, tokens: int, seconds: float) -> None:
        self.samples.setdefault(tokens, deque(maxlen=NUM_SAMPLES)).append(seconds)
        self._changed.add(tokens)
        self._seconds = None

    def add_warm(self, tokens: int, seconds: float) -> None:
        """Add the time unless it is the first of its shape and longer than expected: that forward may have compiled a
        kernel or captured a graph, and found its memory cold."""
        is_first = tokens not in self._seen
        self._seen.add(tokens)

        is_expected = bool(self.samples) or not self.is_guess
        if not (is_first and is_expected and seconds > self.seconds[tokens]):
            self.add(tokens, seconds)

    @property
    def seconds(self) -> np.ndarray:
        """[MAX_TOKENS + 1]"""
        if not self.samples:
            return self.base

        if self._seconds is None:
            for tokens in self._changed:
                self._scales[tokens] = statistics.median_low(self.samples[tokens]) / float(self.base[tokens])
            self._changed.clear()
            self._seconds = self._scaled()
        return self._seconds

    def _scaled(self) -> np.ndarray:
        measured, scales = zip(*sorted(self._scales.items()), strict=True)
        seconds = self.base * np.interp(TOKEN_COUNTS, measured, scales)

        first, last = measured[0], measured[-1]
        if first < last:
            slope = (seconds[last] - seconds[first]) / (last - first)
            rising = seconds[last] + slope * (TOKEN_COUNTS[last:] - last)
            seconds[last:] = np.maximum(seconds[last:], rising)
        return seconds


class CostTable:
    """Times of one kind of forward. A number of rows or a context that is new begins with the curve of the nearest."""

    def __init__(self, shape: Callable[[np.ndarray], np.ndarray]):
        """shape: seconds by number of tokens, where nothing has been measured yet; above 0."""
        self.first = shape(np.arange(MAX_TOKENS + 1, dtype=np.float64))
        self.curves: dict[tuple[int, int], Curve] = {}  # by number of rows and bucket of the context

    def curve(self, num_rows: int, context: int) -> Curve:
        """context: tokens of the longest row."""
        key = num_rows, context_bucket(context)
        found = self.curves.get(key)
        if found is None:
            found = self.curves[key] = self._new_curve(key)
        return found

    def _new_curve(self, key: tuple[int, int]) -> Curve:
        nearest = min(self.curves, key=lambda other: distance(key, other), default=None)
        if nearest is None:
            return Curve(self.first)

        like = self.curves[nearest]
        return Curve(like.seconds.copy(), is_guess=like.is_guess and not like.samples)


def context_bucket(context: int) -> int:
    """
    >>> [context_bucket(context) for context in (1, 128, 129, 1000)]
    [7, 7, 8, 10]
    """
    return max(context - 1, SHORTEST_CONTEXT - 1).bit_length()


def distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    """In doublings. one, other: number of rows, and bucket of the context."""
    return ROWS_OVER_CONTEXT * abs(math.log2(one[0] / other[0])) + abs(one[1] - other[1])


class Survival:
    """How likely each row's drafts are accepted up to each place, learned from earlier drafts.

    A place's share is the share of tokens accepted there among those that reached it, over all rows. A row's own share
    is remembered for some steps only, and is drawn towards the shares of the places.
    """

    ROW_WEIGHT = 6.0  # tokens: the places' shares count as much as this many tokens of the row
    ROW_MEMORY = 0.9  # kept per step: about the last 10 drafts of a row count, as texts change
    PLACE_MEMORY = 0.995  # kept per row and step: about the last 200 drafts count
    PRIOR, PRIOR_WEIGHT = 0.7, 2.0  # assumed share and its weight in tokens: worth a try, and soon outweighed
    LEAST_PROBABILITY = 1e-6  # what was never seen may still happen, and the model divides by it

    def __init__(self, max_tokens: int):
        self.tried = np.full(max_tokens, self.PRIOR_WEIGHT)
        self.accepted = np.full(max_tokens, self.PRIOR_WEIGHT * self.PRIOR)
        self.rows = np.zeros((2, 64))  # by row id: tried and accepted tokens

    def forget_rows(self) -> None:
        """Row ids stand for other rows from now on."""
        self.rows[:] = 0

    def conditional(self, row_ids: np.ndarray, num_tokens: int) -> np.ndarray:
        """P(token j is accepted | those before it are), [rows, num_tokens]."""
        self._make_room(row_ids)
        tried, accepted = self.rows[:, row_ids, None]
        shares = (accepted + self.ROW_WEIGHT * self.places(num_tokens)) / (tried + self.ROW_WEIGHT)
        return np.maximum(shares, self.LEAST_PROBABILITY)

    def places(self, num_tokens: int) -> np.ndarray:
        """The shares of the first places over all rows, [num_tokens]."""
        shares: np.ndarray = self.accepted[:num_tokens] / self.tried[:num_tokens]
        return shares

    def learn(self, row_ids: np.ndarray, asked: np.ndarray, accepted: np.ndarray) -> None:
        """asked: [rows] integers, the tokens that could have been accepted. accepted: [rows] integers, those that were.

        A drafter that proposes nothing counts as wrong.
        """
        self._make_room(row_ids)
        tried = np.minimum(accepted + 1, asked)
        self.rows[:, row_ids] = self.ROW_MEMORY * self.rows[:, row_ids] + (tried, accepted)

        deepest = int(tried.max())  # the step says nothing about the places after it
        place, memory = np.arange(deepest), self.PLACE_MEMORY ** len(row_ids)
        for total, counts in ((self.tried, tried), (self.accepted, accepted)):
            total[:deepest] = memory * total[:deepest] + (place < counts[:, None]).sum(0)

    def _make_room(self, row_ids: np.ndarray) -> None:
        size = int(row_ids.max(initial=0)) + 1
        if size > self.rows.shape[1]:
            self.rows = np.pad(self.rows, ((0, 0), (0, 2 * size - self.rows.shape[1])))


class Recalibrated:
    """Predicted acceptance, corrected by the outcomes of earlier predictions.

    Predictions fall into bins of equal width; each bin has a correction of its own.
    """

    NUM_BINS = 10
    PRIOR_WEIGHT = 20.0  # tokens: a bin that holds fewer is corrected by less than half of its error

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
