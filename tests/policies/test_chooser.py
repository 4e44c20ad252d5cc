"""The cost model where costs are known beforehand, on an H200's costs: close to the best drafter and K, never far
behind plain decoding, and cheap to ask."""

from __future__ import annotations

import time

import numpy as np
import pytest

from specdec.policies.cost_model import CostModel
from specdec.policies.cost_model.chooser import Chooser, steps_with
from specdec.policies.cost_model.records import Acceptance, AcceptanceInHindsight, acceptance_of
from specdec.policies.cost_model.tables import Choice
from tests.policies.simulated import H200, MOST, Rows, World


def ratio(drafters, rows, num_steps, num_calls=1, seeds=range(4), best=None, **options):
    """Tokens per second over the best fixed drafter and K, on average, behind one call that captures."""
    found = []
    for seed in seeds:
        world = World(rows, drafters, seed, **options)
        world.call(64)
        begin, captures = world.now, world.captures
        rates = [world.call(num_steps) for _ in range(num_calls)]
        # What a capture takes is looked at by itself; it comes once in a process.
        lost = (world.captures - captures) * 0.03 / (world.now - begin)
        found.append(np.mean(rates) / (1 - lost) / (best or world.best()))
    return float(np.mean(found))


@pytest.mark.parametrize("num_steps", [128, 1000])
@pytest.mark.parametrize("rows", sorted(H200))
@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.85, 0.95])
def test_close_to_the_best_number_of_tokens(acceptance, rows, num_steps):
    assert ratio({"draft": acceptance}, rows, num_steps, seeds=range(4 if num_steps == 128 else 1)) >= 0.97


@pytest.mark.parametrize("rows", sorted(H200))
@pytest.mark.parametrize(("draft", "lookup"), [(0.8, 0.2), (0.8, 0.6), (0.5, 0.7), (0.0, 0.6)])
def test_close_to_the_best_drafter_of_a_list(draft, lookup, rows):
    assert ratio({"draft": draft, "lookup": lookup}, rows, 400, seeds=range(2)) >= 0.97


@pytest.mark.parametrize("num_steps", [128, 1000])
@pytest.mark.parametrize("rows", sorted(H200))
@pytest.mark.parametrize("drafters", [{"draft": 0.0}, {"draft": 0.0, "lookup": 0.0}])
def test_a_hostile_drafter_costs_little(drafters, rows, num_steps):
    world = World(rows, drafters)
    world.call(128)
    for _ in range(3):
        begun = world.captures
        assert world.call(num_steps) >= 0.98 * world.plain or world.captures > begun
        assert np.mean(np.array(world.widths) > 0) <= 0.03


@pytest.mark.parametrize("rows", [1, 8])
def test_a_drafter_that_gets_better_is_used_again(rows):
    world = World(rows, {"draft": 0.0})
    world.call(300)
    world.parts[0].acceptance = 0.9
    world.call(2000)
    assert np.mean(np.array(world.widths[-50:]) > 0) > 0.9


def test_a_drafter_that_gets_better_while_another_drafts_is_used():
    """Lookup is watched, so that it costs nothing to notice; the draft model has to be tried."""
    world = World(8, {"draft": 0.8, "lookup": 0.05})
    world.call(200)
    assert world.chosen[-1] == "draft"
    world.parts[1].acceptance = 0.9
    world.call(300)
    assert world.chosen.count("lookup") > 200
    world.parts[0].acceptance, world.parts[1].acceptance = 0.95, 0.5
    world.call(1000)
    assert world.chosen[-1] == "draft"


def test_the_first_call_is_not_slower_than_a_plain_one_with_its_capture():
    """Where drafts pay; what is captured pays within the call."""
    for rows, acceptance in ((1, 0.8), (8, 0.8)):
        world, plain = (World(rows, {"draft": acceptance}) for _ in range(2))
        assert world.call(new_tokens=128) >= 0.95 * plain.call(new_tokens=128, fixed=(0, 0))


@pytest.mark.parametrize("rows", sorted(H200))
@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.85])
def test_whole_texts_whose_rows_end_at_different_times(acceptance, rows):
    """128 tokens a row; the last rows decode alone, so long drafts pay less than a step of all rows says."""

    def mean_of(call, num_seeds=4):
        times = []
        for seed in range(num_seeds):
            world = World(rows, {"draft": acceptance}, seed, spread=0.1)
            calls = [1 / call(world) for _ in range(4)]
            times.append(min(calls[2:]))
        return 1 / np.mean(times)

    fixed = [mean_of(lambda world, k=k: world.call(new_tokens=128, fixed=(0, k))) for k in (0, 1, 2, 3, 5)]
    assert mean_of(lambda world: world.call(new_tokens=128)) >= 0.93 * max(fixed)


@pytest.mark.parametrize("acceptance", [0.0, 0.85, 0.98])
def test_steps_are_promised_once_it_has_settled(acceptance):
    """Only then the engine launches the next forward early."""
    world = World(8, {"draft": acceptance})
    world.call(60)
    rows, chooser, promised = Rows(8, 10**6), Chooser(world.drafter, world.tables, world.records, MOST), 0
    last = None
    for _ in range(60):
        width = int(chooser.widths(rows, MOST)[0])
        if last is not None:
            assert width == last, "a promise holds"
        last = chooser.next_width()
        promised += last is not None
        world.learn(chooser, rows, width)
    assert promised >= 50


def test_nothing_is_measured_while_a_forward_is_on_its_way():
    """A promised step may have been launched; trying steps out would overwrite what it computes."""
    world = World(32, {"draft": 0.9, "lookup": 0.3})
    rows = Rows(32, 300)
    world.records.begin_call()
    chooser = Chooser(world.drafter, world.tables, world.records, MOST)
    is_ahead, measured = False, []
    for part in (world, *world.parts):
        measure = part.steps.measure
        part.steps.measure = lambda *shape, measure=measure: (measured.append(is_ahead), measure(*shape))
    while len(rows) and rows.max_remaining > 1:
        width = min(int(chooser.widths(rows, min(MOST, rows.max_remaining - 1)).max()), rows.max_remaining - 1)
        is_ahead = chooser.next_width() is not None
        world.learn(chooser, rows, width)
    assert measured and not any(measured)


def test_a_decision_takes_little_of_the_host():
    """Below 50 microseconds a step on this machine, with a margin for a busy one."""
    for count, drafters in ((1, {"draft": 0.8}), (32, {"draft": 0.8}), (64, {"draft": 0.8, "lookup": 0.3})):
        world = World(count, drafters)
        world.call(100)
        rows, chooser = Rows(count, 10**6), Chooser(world.drafter, world.tables, world.records, MOST)
        seconds = []
        for _ in range(200):
            begin = time.perf_counter()
            width = int(chooser.widths(rows, MOST)[0])
            chooser.next_width()
            seconds.append(time.perf_counter() - begin + world.learn(chooser, rows, width))
        print(count, drafters, f"{1e6 * np.mean(seconds):.0f} us a step")
        assert np.median(seconds) < 5e-4


# ---- the parts


def test_shares_of_places_that_were_not_tried_follow_the_last_one():
    acceptance = Acceptance()
    assert np.allclose(acceptance.places(4), Acceptance.PRIOR)
    for _ in range(100):
        acceptance.learn(np.array([0]), np.array([2]), np.array([1]))
    first, second, third, fourth = acceptance.places(4)
    assert first > 0.95 and second < 0.05 and third == pytest.approx(second) and fourth == pytest.approx(second)


def test_the_spread_of_rows_is_learned():
    alike, unlike, random = Acceptance(), Acceptance(), np.random.default_rng(0)
    ids, asked = np.arange(32), np.full(32, 4)
    for _ in range(200):
        for acceptance, shares in ((alike, np.full(32, 0.7)), (unlike, np.linspace(0.4, 0.95, 32))):
            accepted = (random.random((32, 4)) < shares[:, None]).cumprod(1).sum(1)
            acceptance.learn(ids, asked, accepted)
            acceptance.learn_spread(ids)
    assert alike.spread < 0.06 and 0.1 < unlike.spread < 0.25
    assert np.ptp(unlike.spread_out(ids, 1)) > np.ptp(alike.spread_out(ids, 1))


def test_steps_with_fewer_rows():
    steps = np.array([[3.0, 1.0], [5.0, 1.0], [5.0, 4.0]])
    # All three rows take part in 3 steps; then two in 2 more, and none is ever alone. In the second column one is.
    assert steps_with(steps).tolist() == [[0.0, 3.0], [2.0, 0.0], [3.0, 1.0]]


def test_who_can_be_watched():
    world = World(1, {"draft": 0.5, "lookup": 0.5})
    assert [acceptance_of(part) for part in world.parts] == [Acceptance, AcceptanceInHindsight]
    assert Choice(0, 0).is_trial is False


@pytest.mark.parametrize("rows", sorted(H200))
def test_it_begins_with_what_was_compiled(rows):
    """Nothing is known of the pair yet."""
    world = World(rows, {"draft": 0.7})
    world.call(1)
    assert world.widths[0] in CostModel().likely(MOST)
    assert CostModel().likely(4) == (2, 3, 4) and CostModel().likely(1) == (1,)
