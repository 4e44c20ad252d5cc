"""What steps take on the device, by their shape: those that were timed, and in between what follows from them."""

from __future__ import annotations

import math

import numpy as np

from specdec.limits import MAX_STEP_WIDTH

# A token adds this share of what reading the weights takes: the ratio of a GPU's bandwidth to its arithmetic, alike for
# models of all sizes. On an H200 with a model of 8 billion parameters 160 more tokens add 3.5 ms to 4.4.
TOKEN_SHARE = 0.005
# One doubling of the rows counts as much as this many doublings of the slots: it changes a step more.
ROWS_OVER_SLOTS = 4
WIDTHS = np.arange(MAX_STEP_WIDTH + 1)

Shape = tuple[int, int]  # rows and slots that a captured step has


class StepSeconds:
    """Seconds by rows, slots and width."""

    def __init__(self) -> None:
        self.timed: dict[Shape, dict[int, float]] = {}  # by width
        self.num_changes = 0  # captures, too
        # Of what runs now in place of each width, as of so many captured steps.
        self.ready: dict[Shape, tuple[int, np.ndarray]] = {}
        self._curves: dict[Shape, np.ndarray] = {}

    def taken_over(self) -> StepSeconds:
        """For another cache, in which nothing was captured yet."""
        self.ready.clear()
        self.num_changes += 1
        return self

    def add(self, shape: Shape, width: int, seconds: float) -> None:
        self.timed.setdefault(shape, {})[width] = seconds
        self.num_changes += 1
        self._curves.clear()
        self.ready.clear()

    def curve(self, shape: Shape) -> np.ndarray:
        """[MAX_STEP_WIDTH + 1] by width, do not write to it. At least one step must have been timed.

        Between two timed widths the growth that was expected is scaled to what was found. A shape without any takes the
        curve of the nearest one, with the growth that its rows are expected to add.
        """
        found = self._curves.get(shape)
        if found is None:
            found = self._curves[shape] = self._new_curve(shape)
        return found

    def _new_curve(self, shape: Shape) -> np.ndarray:
        if shape in self.timed:
            widths, seconds = zip(*sorted(self.timed[shape].items()), strict=True)
            scales = np.array(seconds) / expected(shape[0])[list(widths)]
            curve = expected(shape[0]) * np.interp(WIDTHS, widths, scales)
        else:
            nearest = min(self.timed, key=lambda other: distance(shape, other))
            curve = self.curve(nearest) * expected(shape[0]) / expected(nearest[0])
        # A wider step takes no less time than a narrower one; where it seems so, that is noise.
        rising: np.ndarray = np.minimum.accumulate(curve[::-1])[::-1]
        return rising


def expected(rows: int) -> np.ndarray:
    """[MAX_STEP_WIDTH + 1], the shape of a step's time by its width, in no unit."""
    return 1 + TOKEN_SHARE * rows * WIDTHS


def distance(one: Shape, other: Shape) -> float:
    """In doublings."""
    return ROWS_OVER_SLOTS * abs(math.log2(one[0] / other[0])) + abs(math.log2(one[1] / other[1]))
