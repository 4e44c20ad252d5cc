"""How the harness checks, counts and clocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import tiny_llama

import specdec
from specdec.batch.report import StepReport
from specdec.bench import methods
from specdec.bench.latency import StepClock
from specdec.bench.loops import ends_in_loop
from specdec.bench.measure import Result, measure, observe
from specdec.bench.memory import PeakMemory
from specdec.bench.methods import (
    PLAIN,
    Batch,
    Decoded,
    Method,
    Pair,
    batches,
    new_tokens,
    our_method,
    transformers_method,
)
from specdec.bench.report.record import describe_result
from specdec.bench.report.tables import speed_table
from specdec.bench.stages import STAGES, profile
from specdec.bench.suite import Asked, Suite
from specdec.check.oracle import run_plain
from specdec.check.settings import greedy_settings
from specdec.check.ways import Way

NEW = 8


@pytest.fixture(scope="module")
def pair() -> Pair:
    prompts = [torch.arange(3 + i, 8 + 2 * i) for i in range(4)]
    return Pair("tiny", tiny_llama(0), tiny_llama(1, num_hidden_layers=1), prompts)


@pytest.fixture(scope="module")
def reference(pair) -> list[list[int]]:
    with greedy_settings(pair.target):
        return run_plain(pair.target, pair.prompts, NEW).outputs


def test_a_method_that_turns_wrong_while_timed_loses_its_times(pair, reference):
    plain = transformers_method(pair, PLAIN, 1, None, NEW)
    calls = []

    def decode(batch, clock=None):
        calls.append(batch)
        decoded = plain.decode(batch, clock)
        if len(calls) == 10:  # 4 prompts a run: the second timed run
            decoded.sequences[0, -1] += 1
        return decoded

    for is_ours, num_timed in ((True, 0), (False, 3)):
        calls.clear()
        method = Method("turns wrong", 1, is_ours, None, decode)
        (result,) = measure(pair, reference, [method], 3, lambda line: None)
        assert (result.num_equal, len(result.seconds), result.observed is None) == (3, num_timed, is_ours)


def test_a_wrong_method_is_never_timed(pair, reference, monkeypatch):
    right = specdec.generate

    def wrong(model, input_ids, *args, **options):
        output = right(model, input_ids, *args, **options)
        output.sequences[0, input_ids.shape[1]] += 1
        return output

    monkeypatch.setattr(methods, "speculative_generate", wrong)
    lines = []
    method = our_method(pair, Way("prompt_lookup", 2, 2), "prompt_lookup", NEW)
    (result,) = measure(pair, reference, [method], 3, lines.append)
    assert (result.num_equal, result.seconds, result.refused) == (2, [], True)
    assert lines == ["specdec prompt_lookup K=2, batch 2: 2/4 equal, NOT TIMED"]


@pytest.mark.parametrize("fails_at", [1, 9, 13])  # in the check, in a timed run, in the observed one: 4 prompts a run
def test_a_peer_that_fails_is_reported_and_the_others_go_on(pair, reference, fails_at):
    plain, calls, said = transformers_method(pair, PLAIN, 1, None, NEW), [], []

    def decode(batch, clock=None):
        calls.append(batch)
        if len(calls) == fails_at:
            raise IndexError("index 16 is out\nof bounds")
        return plain.decode(batch, clock)

    peer = Method("peer", 1, False, None, decode)
    ours = our_method(pair, Way("none", None, 1), None, NEW)
    with greedy_settings(pair.target):
        failed, good = measure(pair, reference, [peer, ours], 2, said.append)
    assert failed.failure == "IndexError: index 16 is out of bounds" and not failed.is_timed and not failed.observed
    assert good.is_timed and good.all_equal and not good.failure
    assert "peer, batch 1: FAILED, IndexError: index 16 is out of bounds" in said

    suite = Suite("prompts", pair.prompts, [Asked(i, None, 0) for i in range(4)], reference)
    entries = [describe_result(result, [failed, good], suite) for result in (failed, good)]
    assert entries[0]["failure"] == failed.failure and not entries[0]["timed"] and "failure" not in entries[1]
    assert next(iter(speed_table(entries)[1]))[4] == "FAILED, IndexError"


def test_an_error_of_ours_is_a_bug(pair, reference):
    def decode(batch, clock=None):
        raise IndexError("ours")

    with pytest.raises(IndexError, match="ours"):
        measure(pair, reference, [Method("ours", 1, True, None, decode)], 1, lambda line: None)


def test_another_clock_times_the_calls(pair, reference):
    """Each call reads it twice: one second by this clock."""
    ticks = itertools.count()
    plain = transformers_method(pair, PLAIN, 1, None, NEW)
    (result,) = measure(pair, reference, [plain], 2, lambda line: None, lambda: float(next(ticks)))
    assert result.seconds == [[1.0] * 4] * 2


def test_a_missing_prompt_is_an_error_not_a_match(pair, reference):
    with pytest.raises(ValueError):
        measure(pair, reference[:3], [transformers_method(pair, PLAIN, 1, None, NEW)], 1, lambda line: None)


def test_tokens_are_counted_through_the_first_end_of_sequence():
    batch = Batch(range(2), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3))
    sequences = torch.tensor([[2, 0, 0, 5, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0]])  # pad 0 is also a token
    assert new_tokens(Decoded(sequences), batch, frozenset([2])) == [[5, 2], [0, 0, 0, 0]]


def test_the_last_batch_may_be_smaller(pair):
    assert [list(batch.prompt_indices) for batch in batches(pair, 3)] == [[0, 1, 2], [3]]
    counts = Result(Method("m", 3, True, None, None), [[7] * n for n in (1, 2, 3, 4)], 4, None, [[1.0, 2.0]])
    assert counts.timing.tokens.tolist() == [6, 4]


def test_single_prompts_can_be_left_out_at_batch_1_only():
    outputs = [[7] * 6, [7] * 2]
    result = Result(Method("m", 1, True, None, None), outputs, 2, None, [[1.0, 4.0]])
    assert result.timing.rates() == [8 / 5] and result.timing_of([1]).rates() == [0.5]
    batched = Result(Method("m", 2, True, None, None), outputs, 2, None, [[5.0]])
    with pytest.raises(ValueError, match="batch 1, not at 2"):
        batched.timing_of([1])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_clock_inside_sees_every_token_of_every_row(pair, reference, batch_size):
    """Of ours by reports, of transformers by its growing sequences: the same tokens, in order of time."""
    ours = our_method(pair, Way("draft_model", 3, batch_size), pair.draft, NEW)
    plain = transformers_method(pair, PLAIN, batch_size, None, NEW)
    for method in (ours, plain):
        observed = observe(pair, method)
        assert [sum(row.accept_lengths) for row in observed.rows] == [len(tokens) for tokens in reference]
        for row in observed.rows:
            assert 0 < row.first_token <= row.last_token
            assert row.num_steps == len(row.accept_lengths) - 1
    assert observe(pair, plain).rows[0].accept_lengths == [1] * len(reference[0])
    assert not pair.target._forward_pre_hooks


def test_forwards_of_a_peer_are_counted(pair, reference):
    observed = observe(pair, transformers_method(pair, PLAIN, 1, None, NEW))
    assert observed.num_target_forwards == sum(map(len, reference))
    assert observe(pair, our_method(pair, Way("none", None, 1), None, NEW)).num_target_forwards is None


def test_a_row_has_its_tokens_at_the_step_that_brought_them(monkeypatch):
    clock = StepClock(torch.device("cpu"))
    times = iter([10.0, 11.0, 13.0, 17.0])
    monkeypatch.setattr(clock, "_now", lambda: next(times))
    clock.begin()
    report = dict(num_drafted=np.array([0, 2]), fault=np.zeros(2), token_ids=np.zeros((2, 3)))
    ended = np.array([False, False])
    rows = np.array([1, 0])
    clock.on_commit(StepReport(rows, np.array([1, 1]), np.array([0, 0]), finished=ended, is_prefill=True, **report))
    clock.on_commit(StepReport(rows, np.array([0, 3]), np.array([0, 2]), finished=ended, **report))
    clock.on_commit(StepReport(rows, np.array([2, 0]), np.array([1, 0]), finished=ended, **report))
    first, second = clock.rows([[0] * 4, [0] * 3])
    assert (first.first_token, first.last_token, first.accept_lengths, first.num_step_tokens) == (1.0, 3.0, [1, 3], 3)
    assert (second.first_token, second.last_token, second.accept_lengths) == (1.0, 7.0, [1, 2])


def test_stages_add_up_and_the_clock_is_removed(pair):
    with greedy_settings(pair.target):
        for way, drafter in (
            (Way("draft_model", 3, 2, (("layout", "repad"),)), pair.draft),
            (Way("none", None, 2), None),
        ):
            share = profile(pair, our_method(pair, way, drafter, NEW), 2)["share"]
            assert sum(share.values()) == pytest.approx(1) and min(share.values()) >= 0 and share["verify"] > 0
            assert (share["draft prefill"] > 0) == (share["draft"] > 0) == (drafter is not None)
    for places in STAGES.values():
        assert places and not any(hasattr(getattr(owner, name), "__wrapped__") for owner, name in places)


def test_peak_memory_of_the_process_is_new_each_time():
    device = torch.device("cpu")
    peak = PeakMemory(device)
    if peak.mib() is None:
        pytest.skip("this system does not reset a process's peak")
    del peak
    before = PeakMemory(device).mib()
    high = PeakMemory(device)
    block = torch.ones(2**24)  # 64 MiB
    peak_mib = high.mib()
    assert peak_mib > before + 50
    del block
    assert PeakMemory(device).mib() < peak_mib - 50


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([1, 2, 3] * 6, True),
        ([9, 8, *([5] * 16)], True),
        ([9, *([5] * 15)], False),  # shorter than 16 tokens together
        (list(range(32)) * 3, True),
        (list(range(33)) * 3, False),  # a longer period than 32
        (list(range(30)) * 2, False),  # two copies only
        ([*([1, 2, 3] * 6), 4], False),  # not to the end
        ([], False),
    ],
)
def test_periodic_endings(tokens, loops):
    assert ends_in_loop(tokens) is loops
