"""The G-test and its power, against scipy and by simulation."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from specdec.check.goodness import POWER, GoodnessOfFit, chi_square_tail, detectable_distance, g_test, pooled


@pytest.mark.parametrize("freedom", [1, 7, 80, 2500])
def test_the_tail_is_scipys(freedom):
    for quantile in (0.5, 0.01, 1e-6):
        value = stats.chi2.isf(quantile, freedom)
        assert chi_square_tail(value, freedom) == pytest.approx(quantile, rel=1e-6)
    assert chi_square_tail(math.inf, freedom) == 0 and chi_square_tail(0.0, 0) == 1


@pytest.mark.parametrize(("num_samples", "freedom"), [(500, 1), (6000, 80), (9000, 300)])
def test_the_detectable_distance_is_scipys(num_samples, freedom):
    alpha = 1e-4
    distance = detectable_distance(num_samples, freedom, alpha)
    critical = stats.chi2.isf(alpha, freedom)
    assert stats.ncx2.sf(critical, freedom, 4 * num_samples * distance**2) == pytest.approx(POWER, abs=2e-3)
    assert detectable_distance(0, 0, alpha) == 1


def test_the_statistic_of_well_filled_cells():
    counts, probs = torch.tensor([120, 60, 20]), torch.tensor([0.5, 0.35, 0.15]).double()
    fit = g_test(counts, probs)
    plain = stats.power_divergence(counts.numpy(), 200 * probs.numpy(), lambda_="log-likelihood").statistic
    assert fit.freedom == 2 and fit.statistic == pytest.approx(plain, rel=0.01) and fit.statistic < plain


def test_small_cells_are_pooled():
    probs = torch.tensor([0.6, 0.2, 0.1, 0.04, 0.03, 0.03]).double()
    assert g_test(torch.tensor([66, 22, 12, 4, 3, 3]), probs).freedom == 3
    assert g_test(torch.tensor([35, 10, 5, 0, 0, 0]), probs).freedom == 1
    alone = g_test(torch.tensor([99, 1]), torch.tensor([0.999, 0.001]).double())
    assert alone == GoodnessOfFit(0.0, 0) and alone.p_value == 1


def test_what_cannot_happen_is_a_certain_rejection():
    assert g_test(torch.tensor([50, 49, 1]), torch.tensor([0.5, 0.5, 0.0]).double()).p_value == 0


def test_p_values_of_many_small_tests_add_up():
    """Would catch a statistic that is too large on average: 400 tests together, 60 times."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(60):
        fits = []
        for _ in range(100):
            probs = (1.5 * torch.randn(30, generator=generator)).double().softmax(0)
            sample = torch.multinomial(probs, 150, replacement=True, generator=generator)
            fits.append(g_test(sample.bincount(minlength=30), probs))
        values.append(pooled(fits).p_value)
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_a_deviation_of_the_detectable_distance_is_found():
    generator = torch.Generator().manual_seed(1)
    probs = torch.full((20,), 0.05).double()
    distance = detectable_distance(4000, 19, 1e-3)
    other = probs.clone()
    other[:10] += distance / 10
    other[10:] -= distance / 10
    found = [
        g_test(torch.multinomial(other, 4000, True, generator=generator).bincount(minlength=20), probs).p_value < 1e-3
        for _ in range(100)
    ]
    assert sum(found) >= 80
