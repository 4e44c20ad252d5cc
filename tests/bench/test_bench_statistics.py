"""Intervals that cover, comparisons that see a planted slowdown and nothing where there is none."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from specdec.bench.methods import PLAIN
from specdec.bench.report.compare import FASTER, NOT_EQUAL, SAME, SLOWER, UNCLEAR, compare, read_record, verdict_of
from specdec.bench.report.record import FORMAT
from specdec.bench.report.statistics import Timing, estimate, percentiles, rate, speedup
from specdec.errors import ConfigError, InputError

NUM_CALLS, REPEATS, TOKENS = 12, 5, 64


def times(generator, seconds=1.0, noise=0.02, repeats=REPEATS, num_calls=NUM_CALLS):
    """[repeats, calls]: calls of different size, and noise of every call and every repeat."""
    size = np.linspace(0.5, 1.5, num_calls)
    own = generator.lognormal(0, noise, (repeats, num_calls))
    return seconds * size * own * generator.lognormal(0, noise, (repeats, 1))


def entry(method, seconds, is_ours=True, **more):
    return {
        "suite": "prompts", "method": method, "is_ours": is_ours, "batch_size": 1, "num_speculative_tokens": None,
        "options": {}, "timed": True, "num_equal": NUM_CALLS, "num_prompts": NUM_CALLS,
        "tokens_per_second": {"median": NUM_CALLS * TOKENS / float(np.median(seconds.sum(1)))},
        "speedup_over_plain": {"median": 1.0}, "foreign_cores": [0.0] * len(seconds),
        "calls": {"seconds": seconds.tolist(), "num_new_tokens": [TOKENS] * NUM_CALLS}, **more,
    }  # fmt: skip


def record(seed, slow_down=1.0, machine=1.0, noise=0.01, num_methods=6):
    """A run of several methods; method 0 is slowed down, the machine as a whole too."""
    generator = np.random.default_rng(seed)
    results = [entry(PLAIN, machine * times(generator, 2.0, noise), is_ours=False)]
    for number in range(num_methods):
        factor = slow_down if number == 0 else 1.0
        results.append(entry(f"specdec {number}", machine * factor * times(generator, 1 + 0.1 * number, noise)))
    return {
        "format": FORMAT, "repeats": REPEATS, "models": {"name": "m"}, "max_new_tokens": 8, "dtype": "float32",
        "device": "cpu", "batch_invariant": False, "seed": 0, "machine": {"processor": "p"}, "versions": {"torch": "2"},
        "suites": [{"name": "prompts", "digest": "d"}], "results": results,
    }  # fmt: skip


def test_a_planted_slowdown_is_found_and_named():
    """10 % more time for the same tokens, under 1 % noise of each call and repeat, in every of 20 pairs of runs."""
    for seed in range(20):
        found = compare(record(seed), record(1000 + seed, slow_down=1.1))
        assert [change.label for change in found.regressions] == ["specdec 0, batch 1"]
        assert found.changes[0].verdict == SLOWER and found.changes[0].ratio == pytest.approx(1 / 1.1, abs=0.03)


def test_two_runs_of_the_same_are_quiet_even_on_a_slower_machine():
    assert not any(compare(record(seed), record(1000 + seed, machine=1.3)).regressions for seed in range(50))


def test_false_alarms_under_much_noise_are_as_rare_as_promised():
    """Noise of 4 % in every repeat moves ratios beyond 5 % by chance; only the interval keeps these alarms to 5 %.

    A rule without the interval would give an alarm in a quarter of these pairs and more.
    """
    pairs = [compare(record(seed, noise=0.04), record(1000 + seed, noise=0.04)) for seed in range(60)]
    assert sum(any(change.ratio <= 0.95 for change in found.changes) for found in pairs) > 15
    assert sum(bool(found.regressions) for found in pairs) <= 6


def test_disturbed_repeats_do_not_count():
    """Two repeats of five disturbed: left out, with whatever they say. Three: too few are left for a verdict."""
    after = record(1)
    for repeat in (0, 3):
        after["results"][1]["foreign_cores"][repeat] = 1.5
        after["results"][1]["calls"]["seconds"][repeat] = [9.0] * NUM_CALLS
    found = compare(record(0), after)
    assert not found.regressions and not found.unjudged and found.changes[0].ratio == pytest.approx(1, abs=0.04)
    after["results"][1]["foreign_cores"][4] = 0.3
    assert [change.label for change in compare(record(0), after).unjudged] == ["specdec 0, batch 1"]
    assert not compare(record(0), after, max_foreign_cores=0.5).unjudged


def test_a_gain_is_no_regression():
    found = compare(record(0), record(1, slow_down=1 / 1.3))
    assert found.changes[0].verdict == FASTER and not found.regressions


def test_a_method_that_is_not_equal_any_more_is_a_regression():
    after = record(1)
    after["results"][2] |= {"timed": False, "num_equal": 3, "speedup_over_plain": None, "tokens_per_second": None}
    del after["results"][2]["calls"]
    (change,) = compare(record(0), after).regressions
    assert change.verdict == NOT_EQUAL and change.after is None


def test_what_only_one_run_has_is_said():
    after = record(1)
    after["results"][2]["method"] = "specdec new"
    after["versions"] = {"torch": "3"}
    found = compare(record(0), after)
    assert found.only_before == ["prompts, specdec 1, batch 1"] and found.only_after == [
        "prompts, specdec new, batch 1"
    ]
    assert found.notes == ["torch: 2, then 3"]


@pytest.mark.parametrize("name", ["models", "max_new_tokens", "dtype", "device", "batch_invariant"])
def test_other_work_is_refused(name):
    after = record(1) | {name: "other"}
    with pytest.raises(ConfigError, match=f"differ in {name}"):
        compare(record(0), after)


def test_other_prompts_too_few_repeats_and_nothing_in_common_are_refused():
    other = record(1)
    other["suites"] = [{"name": "prompts", "digest": "e"}]
    with pytest.raises(ConfigError, match="differ in prompts"):
        compare(record(0), other)
    with pytest.raises(ConfigError, match="second record has 2 repeats"):
        compare(record(0), record(1) | {"repeats": 2})
    nothing = copy.deepcopy(record(1))
    nothing["results"] = nothing["results"][:1]
    with pytest.raises(ConfigError, match="share no method"):
        compare(record(0), nothing)
    with pytest.raises(ConfigError, match="min_effect=1"):
        compare(record(0), record(1), 1)


def test_what_is_no_record_is_refused(tmp_path):
    for text, reason in (("{", "not JSON"), ("[]", "not a record"), ('{"format": 99}', "format 99")):
        path = tmp_path / "r.json"
        path.write_text(text)
        with pytest.raises(InputError, match=reason):
            read_record(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_record(tmp_path / "none.json")


def test_verdicts_need_significance_and_size():
    assert verdict_of(0.92, 0.88, 0.97, 0.05) == SLOWER
    assert verdict_of(0.92, 0.84, 1.01, 0.05) == UNCLEAR  # may be chance
    assert verdict_of(0.97, 0.96, 0.98, 0.05) == SAME  # certain, and too small to matter
    assert verdict_of(1.08, 1.02, 1.2, 0.05) == FASTER and verdict_of(1.0, 0.9, 1.1, 0.05) == UNCLEAR


def test_intervals_cover_about_as_often_as_they_say():
    """Of 200 runs whose true speedup is 2, the 95 % interval holds it in most: percentile intervals of a median of five
    repeats are a little narrow, so 85 % is asked for. An interval of the wrong tail, or of one repeat, fails."""
    inside = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        tokens = np.full(NUM_CALLS, TOKENS)
        ours, plain = (Timing.of(times(generator, seconds), tokens) for seconds in (1.0, 2.0))
        found = speedup(ours, plain)
        assert found.low <= found.median <= found.high
        inside += found.low <= 2.0 <= found.high
    assert 170 <= inside <= 199


def test_speedup_is_the_median_of_paired_ratios():
    """Machine noise that slows both down cancels; the ratio of medians would say 1.5."""
    ours, plain = (Timing.of(seconds, [6]) for seconds in ([[1.0], [2.0], [30.0]], [[3.0], [1.5], [90.0]]))
    found = speedup(ours, plain)
    assert found.median == 3.0 and found.low >= 0.75 and found.high <= 3.0 and found.repeats == (3.0, 0.75, 3.0)


def test_a_rate_is_tokens_over_seconds_and_its_interval_knows_both_sources():
    steady = rate(Timing.of([[1.0, 1.0]] * 5, [10, 10]))
    assert steady.low == steady.median == steady.high == 10.0
    other_calls = rate(Timing.of([[1.0, 1.0]] * 5, [10, 30]))
    other_repeats = rate(Timing.of([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]], [10, 10]))
    assert other_calls.low < other_calls.median < other_calls.high and other_repeats.low < other_repeats.median


def test_an_estimate_of_repeats_lies_within_them():
    found = estimate([3.0, 1.0, 2.0])
    assert (found.median, found.low, found.high, found.repeats) == (2.0, 1.0, 3.0, (3.0, 1.0, 2.0))
    assert estimate([4.0]).low == estimate([4.0]).high == 4.0


def test_percentiles_of_a_row():
    assert percentiles([1.0, 2.0, 3.0]) == {"p50": 2.0, "p90": pytest.approx(2.8), "p99": pytest.approx(2.98)}
