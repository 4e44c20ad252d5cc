"""Captured steps timed by themselves: once a shape, over text that stays what it is; what lies between follows."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_llama

import specdec
from specdec.batch.cache import RaggedCache
from specdec.drafters.draft_model import DraftModel
from specdec.limits import MAX_STEP_WIDTH
from specdec.network.base import NetworkOutput
from specdec.network.captured import graphs as step_graphs
from specdec.network.captured import timings as step_timings
from specdec.network.captured.graphs import WORTH_A_CAPTURE, Key, StepGraphs, serving_key, waste
from specdec.network.captured.seconds import StepSeconds
from specdec.network.captured.timings import CapturedTimings
from specdec.policies.cost_model import CostModel
from specdec.policies.cost_model.chooser import Chooser


class FakeStream:
    def wait_stream(self, other):
        pass


@contextmanager
def running(*arguments, **options):
    yield


@pytest.fixture
def timings(monkeypatch):
    """Of a forward that writes ones where it is told to. A step takes 4 ms and 0.1 ms for each of its tokens."""
    fake = SimpleNamespace(
        graph_pool_handle=lambda: None,
        Stream=FakeStream,
        current_stream=FakeStream,
        stream=running,
        graph=running,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
    )
    monkeypatch.setattr(step_graphs, "torch", SimpleNamespace(**vars(torch) | {"cuda": fake}))
    cache = RaggedCache(2, 8, 2048 + 64, torch.device("cpu"))
    cache.allocate(1, 4, torch.float32)
    graphs, seen = StepGraphs(cache), []

    def forward(token_ids, starts, used_slots, layers):
        seen.append((*token_ids.shape, used_slots))
        return NetworkOutput(torch.zeros(*token_ids.shape, 7), ())

    def seconds_of(graph):
        (step,) = [step for step in graphs.captured.values() if step.graph is graph]
        for row, start in enumerate(step.starts.tolist()):
            for layer in cache.layers:
                layer.keys[row, start : start + step.token_ids.shape[1]] = 1.0
        made.timed.append(step.starts.tolist())
        return 4e-3 + 1e-4 * step.token_ids.numel()

    monkeypatch.setattr(step_timings, "seconds_of", seconds_of)
    made = CapturedTimings(graphs, forward, 2048)
    made.timed, made.seen = [], seen
    return made


def test_a_shape_is_timed_once_over_a_usual_context(timings):
    for rows, width, used in ((3, 2, 600), (4, 2, 900), (4, 2, 1100), (4, 6, 600)):
        timings.measure(rows, width, used)
    assert timings.timed == [[768] * 4, [1536] * 4, [768] * 4]
    assert timings.has(3, 2, 10) and timings.has(4, 6, 1024) and not timings.has(4, 3, 600)
    assert not timings.has(5, 2, 600), "five rows are of the next bucket"
    assert timings.seconds(4, 600)[2] == pytest.approx(4.8e-3)
    assert timings.seconds(4, 600)[6] == pytest.approx(6.4e-3)


def test_what_was_timed_with_an_earlier_cache_is_captured_but_not_timed_again(timings):
    timings.measure(4, 2, 600)
    version, graphs = timings.version, StepGraphs(timings.graphs.cache, timings.graphs.seconds)
    later = CapturedTimings(graphs, timings.forward, 2048)
    assert later.version > version and not later.has(4, 2, 600) and np.isinf(later.ready_seconds(4, 600)[2])
    assert later.seconds(4, 600)[2] == pytest.approx(4.8e-3)
    later.measure(4, 2, 600)
    assert later.has(4, 2, 600) and len(timings.timed) == 1 and np.isfinite(later.ready_seconds(4, 600)[2])


def test_texts_stay_what_they_are(timings):
    cache = timings.graphs.cache
    before = torch.rand_like(cache._buffers)
    cache._buffers.copy_(before)
    timings.measure(8, 6, 1500)
    assert timings.timed and torch.equal(cache._buffers, before)


def test_the_next_replay_takes_its_own_starts(timings):
    timings.measure(4, 2, 600)
    timings.graphs.replay(timings.forward, torch.ones(2, 2, dtype=torch.long), torch.tensor([9, 7]), 600, ())
    (step,) = timings.graphs.captured.values()
    assert step.starts.tolist() == [9, 7] + [2048 + 64 - MAX_STEP_WIDTH] * 2


def test_what_runs_now_is_what_a_larger_step_takes(timings):
    timings.measure(4, 1, 600)
    timings.measure(8, 6, 600)
    now, best = timings.ready_seconds(3, 600), timings.seconds(3, 600)
    assert now[1] == best[1] == pytest.approx(4.4e-3)
    assert now[2] == now[6] == timings.seconds(8, 600)[6] and now[6] > best[6] and np.isinf(now[7])
    version = timings.version
    timings.measure(4, 9, 600)
    assert timings.version != version and timings.ready_seconds(3, 600)[7] == pytest.approx(7.6e-3)


def test_between_timed_steps_costs_grow_as_expected():
    seconds = StepSeconds()
    seconds.add((8, 1024), 1, 4.6e-3)
    seconds.add((8, 1024), 6, 5.3e-3)
    curve = seconds.curve((8, 1024))
    assert (np.diff(curve) >= 0).all() and curve[3] == pytest.approx(4.6e-3 + 2 / 5 * 0.7e-3, rel=0.02)
    assert 5.3e-3 < curve[9] < 6.5e-3
    more_rows = seconds.curve((16, 1024))
    assert (more_rows[1:] > curve[1:]).all() and more_rows[1] < 1.1 * curve[1]
    seconds.add((16, 1024), 1, 9e-3)
    assert seconds.curve((16, 1024))[1] == 9e-3, "what was timed counts from then on"
    assert np.allclose(seconds.curve((16, 2048)), seconds.curve((16, 1024))), "the nearest one, by its rows"


def test_a_plain_step_is_not_slower_than_a_wider_one():
    seconds = StepSeconds()
    seconds.add((1, 1024), 1, 4.5e-3)
    seconds.add((1, 1024), 6, 4.4e-3)
    assert seconds.curve((1, 1024))[1] == seconds.curve((1, 1024))[6]


def test_a_shape_that_is_asked_for_often_is_captured():
    captured = [Key(8, 6, 1024), Key(32, 6, 1024), Key(8, 6, 2048), Key(8, 6, 1024, (-1,))]
    assert serving_key(Key(4, 3, 1024), captured) == Key(8, 6, 1024)
    assert serving_key(Key(12, 3, 1024), captured) == Key(32, 6, 1024)
    assert serving_key(Key(8, 7, 1024), captured) is None and serving_key(Key(8, 1, 512), captured) is None
    assert waste(Key(8, 1, 1024), Key(8, 2, 1024)) < waste(Key(1, 1, 1024), Key(32, 6, 1024))


def test_larger_steps_serve_until_a_capture_would_have_been_cheaper(timings):
    graphs, forward = timings.graphs, timings.forward
    ids, starts = torch.ones(8, 6, dtype=torch.long), torch.full((8,), 9)
    graphs.replay(forward, ids, starts, 600, ())
    num_uses = int(WORTH_A_CAPTURE / waste(Key(8, 1, 1024), Key(8, 6, 1024)))
    for use in range(num_uses + 2):
        output = graphs.replay(forward, ids[:, :1], starts, 600, ())
        assert output.logits.shape == (8, 1, 7)
        assert (Key(8, 1, 1024) in graphs.captured) == (use >= num_uses), use
    assert len(graphs.captured) == 2


@pytest.mark.gpu
def test_on_a_gpu_no_step_of_the_caller_is_timed(monkeypatch):
    """The table is filled from captured steps, the text is plain greedy, and steps are launched ahead."""
    target, draft = (tiny_llama(seed).cuda().bfloat16() for seed in (0, 0))
    promised, timed = [], []
    next_width = Chooser.next_width

    def noted(self):
        promised.append(next_width(self))
        return promised[-1]

    monkeypatch.setattr(Chooser, "next_width", noted)
    monkeypatch.setattr("specdec.policies.costs.CudaClock.mark", lambda self: timed.append(1))
    ids = torch.randint(3, 60, (4, 24), device="cuda")
    options = {"max_new_tokens": 200, "eos_token_id": None, "pad_token_id": 0}
    with specdec.batch_invariant(target), specdec.batch_invariant(draft):
        plain = specdec.generate(target, ids, **options)
        for drafter in (draft, [DraftModel(draft), "prompt_lookup", None]):
            for call in range(2):
                promised.clear()
                policy = CostModel()
                out = specdec.generate(target, ids, drafter=drafter, length_policy=policy, **options)
                assert torch.equal(out, plain) and not timed
                tables = policy._chooser.tables
                assert call == 0 or sum(width is not None for width in promised) >= 3
        known = tables._made
    assert known and all(np.isfinite(made[1]).any() for made in known.values())
