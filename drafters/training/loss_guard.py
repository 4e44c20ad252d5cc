"""Ends a run whose loss is no longer finite, or has lost much of its improvement and stays there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import quantiles

from specdec.errors import NumericalError

WINDOW = 50  # steps
LEAST_RISE = 1.3  # times the best window's median: a smaller rise may come from other text


class LossGuard:
    """Gets the loss of every step, in order; a resumed run first adds the losses of the steps before it.

    A run has diverged when three quarters of a window's losses are above the midpoint between the first window's median
    and the best one's, above LEAST_RISE times the best window's median, and above three quarters of the best window's
    losses. Noise, however large, and single outliers do not move a window's quartiles that far.
    """

    def __init__(self, learning_rate: float):
        self.learning_rate = learning_rate
        self.num_steps = 0
        self._window: list[float] = []
        self._first: float | None = None  # the median of the first window
        self._best = (math.inf, math.inf)  # the lowest median of a window, and that window's upper quartile

    def add(self, losses: Iterable[float]) -> None:
        """Raises NumericalError at the step that ends the run."""
        for loss in losses:
            if not math.isfinite(loss):
                raise NumericalError(f"the loss at step {self.num_steps} is {loss}; {self._remedy()}")
            self._window.append(loss)
            self.num_steps += 1
            if len(self._window) == WINDOW:
                self._judge(*quantiles(self._window))
                self._window = []

    def _judge(self, lower: float, median: float, upper: float) -> None:
        first = self._first = median if self._first is None else self._first
        best, best_upper = self._best = min(self._best, (median, upper))
        if lower > max((first + best) / 2, best + (LEAST_RISE - 1) * abs(best), best_upper):
            raise NumericalError(
                f"the loss has diverged: {median:.4g} over the {WINDOW} steps up to step {self.num_steps - 1}, after "
                f"{best:.4g} at best and {first:.4g} at first; {self._remedy()}"
            )

    def _remedy(self) -> str:
        return (
            f"lower learning_rate={self.learning_rate} (--learning-rate), in another folder or without this one's "
            "checkpoint"
        )
