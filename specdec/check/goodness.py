"""Goodness of fit: does a sample follow known probabilities, and how far off would it have to be to be found out?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIN_EXPECTED = 10  # samples that a cell must expect; smaller ones are pooled
POWER = 0.9  # the detectable deviation is found with this probability


class GoodnessOfFit(NamedTuple):
    """statistic: about chi-square distributed with `freedom` degrees of freedom if the sample follows; inf if something
    happened that cannot."""

    statistic: float
    freedom: int

    @property
    def p_value(self) -> float:
        return chi_square_tail(self.statistic, self.freedom)


def g_test(counts: Tensor, probs: Tensor) -> GoodnessOfFit:
    """The likelihood-ratio test with Williams' correction, without which many small tests do not add up.

    counts: [cells] integers. probs: [cells] float64, sums to 1. Cells that expect too few are pooled into one.
    """
    n = int(counts.sum())
    if bool(((probs == 0) & (counts > 0)).any()):
        return GoodnessOfFit(math.inf, 1)
    big = probs * n >= MIN_EXPECTED
    observed, expected = counts[big].double(), probs[big] * n
    rest = n - float(expected.sum())
    if rest >= MIN_EXPECTED:
        observed = torch.cat([observed, (n - observed.sum())[None]])
        expected = torch.cat([expected, expected.new_tensor([rest])])
    elif len(expected):  # too little even together: it goes with the smallest of the others
        smallest = int(expected.argmin())
        observed[smallest] += n - observed.sum()
        expected[smallest] += rest
    freedom = len(expected) - 1
    if freedom < 1:
        return GoodnessOfFit(0.0, 0)
    statistic = 2 * float(torch.xlogy(observed, observed / expected).sum())
    correction = 1 + (float((n / expected).sum()) - 1) / (6 * n * freedom)
    return GoodnessOfFit(statistic / correction, freedom)


def pooled(fits: Sequence[GoodnessOfFit]) -> GoodnessOfFit:
    """Independent tests as one."""
    return GoodnessOfFit(sum(fit.statistic for fit in fits), sum(fit.freedom for fit in fits))


def chi_square_tail(value: float, freedom: float | Tensor) -> float:
    """P(chi-square > value); 1 without degrees of freedom."""
    return float(_tail(value, torch.as_tensor(freedom, dtype=torch.float64)))


def _tail(value: float, freedom: Tensor) -> Tensor:
    if value == math.inf:
        return torch.zeros_like(freedom)
    half = torch.full_like(freedom, value / 2)
    return torch.where(freedom > 0, torch.special.gammaincc(freedom.clamp(min=1) / 2, half), 1.0)


def detectable_distance(num_samples: int, freedom: int, alpha: float) -> float:
    """The total variation d that a test at level alpha finds with probability POWER, whatever its shape.

    The noncentrality of a deviation of total variation d is at least 4 n d^2 (Cauchy-Schwarz).
    """
    if not freedom or not num_samples:
        return 1.0
    critical = _bisect(lambda x: chi_square_tail(x, freedom) < alpha, float(freedom))
    noncentrality = _bisect(lambda x: _noncentral_tail(critical, freedom, x) > POWER, 1.0)
    return min(1.0, math.sqrt(noncentrality / (4 * num_samples)))


def _noncentral_tail(value: float, freedom: int, noncentrality: float) -> float:
    """A Poisson mixture of central ones."""
    mean = noncentrality / 2
    spread = 10 * math.sqrt(mean) + 20
    j = torch.arange(max(0, int(mean - spread)), int(mean + spread), dtype=torch.float64)
    weights = torch.exp(j * math.log(mean) - mean - torch.lgamma(j + 1))
    return float((weights * _tail(value, freedom + 2 * j)).sum())


def _bisect(holds, start: float) -> float:
    """The least x > 0 from which on `holds`, to 1e-4 of it."""
    high = start
    while not holds(high):
        high *= 2
    low = 0.0
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
