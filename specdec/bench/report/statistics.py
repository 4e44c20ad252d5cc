"""Medians of repeated measurements, with bootstrap intervals over repeats and calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MAX_CELLS = 4_000_000  # numbers held at once


@dataclass(frozen=True)
class Estimate:
    """median: over repeats. low, high: its bootstrap interval, `CONFIDENCE` wide. repeats: one value each."""

    median: float
    low: float
    high: float
    repeats: tuple[float, ...]

    @staticmethod
    def of(values: np.ndarray, resampled: np.ndarray) -> Estimate:
        low, high = interval(resampled)
        return Estimate(float(np.median(values)), low, high, tuple(values.tolist()))


@dataclass(frozen=True)
class Timing:
    """seconds: [repeats, calls] float64. tokens: [calls], new tokens of each call, the same in every repeat."""

    seconds: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(seconds: Sequence[Sequence[float]], tokens: Sequence[int]) -> Timing:
        return Timing(np.asarray(seconds, dtype=float), np.asarray(tokens, dtype=float))

    def rates(self) -> np.ndarray:
        """Tokens per second of each repeat, [repeats]."""
        return self.tokens.sum() / self.seconds.sum(1)

    def only(self, calls: Sequence[int]) -> Timing:
        return Timing(self.seconds[:, list(calls)], self.tokens[list(calls)])


def interval(resampled: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def resampled_repeats(num_repeats: int, generator: np.random.Generator) -> np.ndarray:
    """[NUM_RESAMPLES, repeats] int64."""
    return generator.integers(num_repeats, size=(NUM_RESAMPLES, num_repeats))


def resampled_calls(num_calls: int, generator: np.random.Generator) -> np.ndarray:
    """[NUM_RESAMPLES, calls] int64."""
    return generator.integers(num_calls, size=(NUM_RESAMPLES, num_calls))


def resampled_rates(timing: Timing, repeats: np.ndarray, calls: np.ndarray) -> np.ndarray:
    """Tokens per second of every resampled repeat over the resampled calls, [NUM_RESAMPLES, repeats]."""
    tokens = timing.tokens[calls].sum(1, keepdims=True)
    step = max(1, MAX_CELLS // (repeats.shape[1] * calls.shape[1]))
    seconds = [
        timing.seconds[repeats[first : first + step, :, None], calls[first : first + step, None, :]].sum(2)
        for first in range(0, len(calls), step)
    ]
    return tokens / np.concatenate(seconds)


def rate(timing: Timing, seed: int = 0) -> Estimate:
    """Tokens per second."""
    generator = np.random.default_rng(seed)
    repeats = resampled_repeats(len(timing.seconds), generator)
    calls = resampled_calls(len(timing.tokens), generator)
    return Estimate.of(timing.rates(), np.median(resampled_rates(timing, repeats, calls), 1))


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Estimate from one value per repeat, of any kind; the bootstrap is over repeats only."""
    measured = np.asarray(values, dtype=float)
    repeats = resampled_repeats(len(measured), np.random.default_rng(seed))
    return Estimate.of(measured, np.median(measured[repeats], 1))


def speedup(ours: Timing, baseline: Timing, seed: int = 0) -> Estimate:
    """Tokens per second over the baseline's, repeat by repeat: noise that slows a whole repeat down cancels.

    Both must have made the same calls; the bootstrap takes the same repeats and calls of both.
    """
    resampled = resampled_speedups(ours, baseline, np.random.default_rng(seed), np.random.default_rng(seed + 1))
    return Estimate.of(ours.rates() / baseline.rates(), resampled)


def resampled_speedups(
    ours: Timing, baseline: Timing, repeats_from: np.random.Generator, calls_from: np.random.Generator
) -> np.ndarray:
    """The median speedup of each resample, [NUM_RESAMPLES]."""
    repeats = resampled_repeats(len(ours.seconds), repeats_from)
    calls = resampled_calls(len(ours.tokens), calls_from)
    rates = resampled_rates(ours, repeats, calls) / resampled_rates(baseline, repeats, calls)
    return np.median(rates, 1)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 with linear interpolation."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
