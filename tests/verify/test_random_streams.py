"""Random streams per row: Philox's published answers, uniformity, independence, and nothing but the key matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from specdec.errors import ConfigError
from specdec.verify.random_streams import Purpose, RowStreams, philox

ALPHA = 1e-3  # every test below has fixed seeds: it passes or fails once and for all


def draw(seed, row_ids, positions, count=4, purpose=Purpose.VERIFY, num_rows=100):
    return RowStreams(seed, num_rows).uniforms(np.array(row_ids), np.array(positions), count, purpose)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_answers_published_with_random123(counter, key, answer):
    out = philox(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None])
    assert out[:, 0].tolist() == answer


def test_numbers_are_pinned():
    """A seed must give the same output in the next release."""
    assert draw(7, [3], [11], 2).tolist() == [[0.6467408248229292, 0.5972419134682868]]


def test_numbers_are_float64_in_the_unit_interval_with_53_bits():
    numbers = draw(1, range(100), [5] * 100, 1000)
    assert numbers.dtype == torch.float64 and numbers.shape == (100, 1000)
    assert numbers.min() >= 0 and numbers.max() < 1
    scaled = numbers * 2.0**53
    assert scaled.eq(scaled.round()).all() and (scaled.long() % 2).bool().any()


@given(st.integers(0, 2**64 - 1), st.permutations(range(8)), st.integers(1, 8), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_a_rows_numbers_depend_on_no_other_row(seed, order, num_kept, count):
    """Would catch: a counter that walks over the batch, a key taken from the slot."""
    positions = np.arange(10, 18)
    everything = RowStreams(seed, 8).uniforms(np.arange(8), positions, 5, Purpose.DRAFT)
    kept = np.array(order[:num_kept])
    some = RowStreams(seed, 8).uniforms(kept, positions[kept], count, Purpose.DRAFT)
    assert torch.equal(some, everything[kept, :count])


def test_seeds_per_row_move_with_their_rows_and_a_row_alone_draws_the_same():
    seeds, order = [5, -1, 2**63, 5, 9], [4, 2, 0, 1, 3]
    positions = np.full(5, 6)
    numbers = draw(seeds, range(5), positions, num_rows=5)
    permuted = draw([seeds[i] for i in order], range(5), positions, num_rows=5)
    assert torch.equal(permuted, numbers[order])
    assert torch.equal(numbers[0], numbers[3])
    for row, seed in enumerate(seeds):
        assert torch.equal(draw(seed, [0], [6], num_rows=1)[0], numbers[row])


def test_seeds_are_64_bits_wide():
    assert not torch.equal(draw(1, [0], [0]), draw(1 + 2**32, [0], [0]))
    assert torch.equal(draw(1, [0], [0]), draw(1 + 2**64, [0], [0]))


def test_every_key_has_numbers_of_its_own():
    """All of 2 seeds x 10 rows x 50 positions x 2 purposes x 10 draws differ."""
    numbers = [
        draw(seed, np.repeat(range(10), 50), np.tile(range(50), 10), 10, purpose)
        for seed in (0, 1)
        for purpose in Purpose
    ]
    assert len(torch.stack(numbers).unique()) == 2 * 10 * 50 * 2 * 10


def along(axis, seed, size=20000, purpose=Purpose.VERIFY):
    """`size` numbers along one axis of the key, the others fixed."""
    index, zeros = np.arange(size), np.zeros(size, dtype=np.int64)
    streams = RowStreams(seed, size)
    if axis == "draw":
        return streams.uniforms(zeros[:1], zeros[:1], size, purpose)[0].numpy()
    rows, positions = (zeros, index) if axis == "position" else (index, zeros)
    return streams.uniforms(rows, positions, 1, purpose)[:, 0].numpy()


def over_seeds(size=20000):
    return (
        RowStreams(list(range(size)), size).uniforms(np.arange(size), np.zeros(size), 1, Purpose.VERIFY)[:, 0].numpy()
    )


@pytest.mark.parametrize("axis", ["draw", "position", "row", "seed"])
def test_numbers_are_uniform_and_uncorrelated_along_every_axis_of_the_key(axis):
    numbers = over_seeds() if axis == "seed" else along(axis, seed=3)
    assert stats.kstest(numbers, "uniform").pvalue > ALPHA
    for lag in (1, 2, 3, 10):
        pairs = np.histogram2d(numbers[:-lag], numbers[lag:], bins=8, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(pairs.ravel()).pvalue > ALPHA
    low_bits = (numbers * 2.0**53).astype(np.int64) & 7
    assert stats.chisquare(np.bincount(low_bits, minlength=8)).pvalue > ALPHA


@pytest.mark.parametrize("axis", ["draw", "position", "row"])
def test_purposes_and_seeds_are_independent(axis):
    numbers = along(axis, seed=3)
    for other in (along(axis, seed=3, purpose=Purpose.DRAFT), along(axis, seed=4)):
        pairs = np.histogram2d(numbers, other, bins=8, range=[[0, 1], [0, 1]])[0]
        assert stats.chi2_contingency(pairs).pvalue > ALPHA


def test_the_tests_above_can_fail():
    numbers = along("position", seed=3)
    assert stats.kstest(numbers**1.05, "uniform").pvalue < ALPHA
    pairs = np.histogram2d(numbers, 0.9 * numbers + 0.1 * along("row", seed=3), bins=8)[0]
    assert stats.chi2_contingency(pairs).pvalue < ALPHA


def test_as_many_seeds_as_rows():
    with pytest.raises(ConfigError, match="2 entries for 3 rows"):
        RowStreams([1, 2], 3)
