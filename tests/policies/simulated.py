"""A GPU with made-up costs and drafters with made-up acceptance, for policies that know costs beforehand."""

from __future__ import annotations

import time
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch

from specdec.batch.report import StepReport
from specdec.draft import NO_TOKEN
from specdec.drafter import Drafter
from specdec.drafters.candidates import Candidates
from specdec.drafters.draft_model import ONE_BY_ONE
from specdec.limits import MAX_DRAFT_TOKENS, MAX_STEP_WIDTH
from specdec.network.captured.graphs import WORTH_A_CAPTURE, Key, row_bucket, serving_key, waste, width_bucket
from specdec.policies.cost_model.chooser import Chooser
from specdec.policies.cost_model.records import Records, acceptance_of
from specdec.policies.cost_model.tables import Tables

MOST = 20
CAPTURE, GAP = 0.03, 1.5e-4  # seconds: of a new shape, and of a step that was not launched ahead
# Seconds on an H200 by rows: of a plain step, of verifying 5 draft tokens, of a draft model's step.
H200 = {1: (4.4e-3, 4.6e-3, 0.75e-3), 8: (4.6e-3, 5.3e-3, 0.8e-3), 32: (6.0e-3, 9.5e-3, 1.0e-3),
        64: (6.9e-3, 12.0e-3, 1.5e-3)}  # fmt: skip


FREE = np.full(MAX_DRAFT_TOKENS + 1, 2e-5)


@cache
def costs_of(rows: int) -> np.ndarray:
    """[3], between the sizes that were measured by interpolation."""
    return np.array([np.interp(rows, list(H200), column) for column in zip(*H200.values(), strict=True)])


def draft_seconds(rows: int) -> float:
    return float(costs_of(row_bucket(rows))[2])


def verify_seconds(rows: int) -> np.ndarray:
    plain, five, _ = costs_of(row_bucket(rows))
    return plain + (five - plain) / 5 * (np.arange(MAX_STEP_WIDTH + 1) - 1)


class Steps:
    """As `specdec.network.base.Timings`, and the choice of a captured step as `StepGraphs` makes it."""

    def __init__(self, world, seconds):
        """seconds: of one forward, (rows, width) -> seconds."""
        self.world, self.real = world, seconds
        self.captured, self.timed, self.wasted = set(), set(), {}
        self.made = {}  # what was said, until something changes

    def kept(self, key, make):
        if self.made.get(key, (None,))[0] != self.version:
            self.made[key] = self.version, make()
        return self.made[key][1]

    @property
    def version(self):
        return len(self.captured) + len(self.timed)

    def has(self, num_rows, width, used_slots):
        return Key(row_bucket(num_rows), width, 0) in self.timed

    def ready_seconds(self, num_rows, used_slots):
        rows = row_bucket(num_rows)
        return self.kept(("ready", rows), lambda: self.ready_of(rows))

    def ready_of(self, rows):
        found = np.full(MAX_STEP_WIDTH + 1, np.inf)
        for width in range(1, MAX_STEP_WIDTH + 1):
            serving = serving_key(Key(rows, width_bucket(width), 0), self.captured)
            if serving is not None:
                found[width] = self.real(serving.rows, serving.width)
        return found

    def measure(self, num_rows, width, used_slots):
        key = Key(row_bucket(num_rows), width, 0)
        if key not in self.timed:
            self._capture(key)
            self.world.now += 2 * self.real(key.rows, width)
            self.timed.add(key)

    def seconds(self, num_rows, used_slots):
        assert self.timed
        rows = row_bucket(num_rows)
        return self.kept(rows, lambda: np.array([self.real(rows, width) for width in range(MAX_STEP_WIDTH + 1)]))

    def run(self, num_rows, width):
        """Seconds of a step, with those of its capture if it has to be captured."""
        begin = self.world.now
        key = Key(row_bucket(num_rows), width, 0)
        serving = key if key in self.captured else serving_key(key, self.captured)
        if serving != key:
            if serving is not None:
                self.wasted[key] = self.wasted.get(key, 0.0) + waste(key, serving)
            if serving is None or self.wasted[key] >= WORTH_A_CAPTURE:
                serving = key
        self._capture(serving)
        captured = self.world.now - begin
        self.world.now = begin
        return captured + self.real(serving.rows, serving.width)

    def _capture(self, key):
        if key not in self.captured:
            self.captured.add(key)
            self.world.captures += 1
            self.world.now += CAPTURE


class Made(Drafter):
    """A draft model, or a free drafter that can be watched."""

    def __init__(self, world, name, acceptance, is_free=False):
        self.world, self.name, self.acceptance, self.is_free = world, name, acceptance, is_free
        self.steps = Steps(world, lambda rows, width: draft_seconds(rows) * (1 + 0.02 * (width - 1)))
        self.proposes_ahead = is_free
        self.lag = 0

    def propose(self, rows, max_tokens):
        raise AssertionError

    def expected(self, width):
        """Tokens of a row and step."""
        return float(sum(self.acceptance**i for i in range(width + 1)))

    @property
    def timings(self):
        return self

    @property
    def version(self):
        return self.steps.version

    def seconds(self, num_rows, used_slots):
        if self.is_free:
            return FREE
        return self.drafts(self.steps.seconds(num_rows, used_slots))

    def ready_seconds(self, num_rows, used_slots):
        if self.is_free:
            return FREE
        return self.drafts(self.steps.ready_seconds(num_rows, used_slots))

    def drafts(self, by_width):
        return by_width[2] + by_width[1] * ONE_BY_ONE

    def catch_up(self, num_rows, num_missed):
        return 0.0 if self.is_free or num_missed <= 2 else 5e-3

    def has(self, num_rows, used_slots):
        return self.is_free or all(self.steps.has(num_rows, width, used_slots) for width in (1, 2))

    def measure(self, num_rows, used_slots):
        for width in () if self.is_free else (1, 2):
            self.steps.measure(num_rows, width, used_slots)

    def run(self, num_rows, width):
        if self.is_free:
            return 2e-5
        return self.steps.run(num_rows, 2) + sum(self.steps.run(num_rows, 1) for _ in range(width - 1))


class Watched(Made):
    def in_hindsight(self, rows, num_tokens):
        return torch.from_numpy(self.world.accepted(self, num_tokens, rows.row_ids))


class World:
    """Decodes; `rate` counts the tokens that a step is expected to commit, so that luck does not blur it."""

    def __init__(self, rows, drafters, seed=0, spread=0.0):
        """drafters: name -> acceptance; "lookup" is free and can be watched. spread: how far the acceptance of the
        first and the last row deviates from it, evenly in between."""
        self.spread = np.linspace(-spread, spread, rows) if rows > 1 else np.zeros(1)
        self.random, self.num_rows = np.random.default_rng(seed), rows
        self.now, self.captures = 0.0, 0
        self.parts = [
            (Watched if name == "lookup" else Made)(self, name, acceptance, name == "lookup")
            for name, acceptance in drafters.items()
        ]
        self.drafter = Candidates(self.parts)
        self.records = Records([acceptance_of(part)() for part in self.parts])
        self.steps = Steps(self, lambda rows, width: float(verify_seconds(rows)[width]))
        self.tables = Tables(SimpleNamespace(timings=self.steps), self.drafter.candidates)

    def accepted(self, part, width, row_ids):
        shares = np.clip(part.acceptance + self.spread[row_ids] * (part.acceptance > 0), 0, 0.99)[:, None]
        return (self.random.random((len(row_ids), width)) < shares).cumprod(1).sum(1)

    def call(self, num_steps=10**6, new_tokens=10**6, fixed=None):
        """One call of at most so many steps and new tokens of each row, with the cost model or fixed (drafter, K).
        Returns tokens per second; of a call that is cut, those that were expected."""
        self.records.begin_call()
        chooser = Chooser(self.drafter, self.tables, self.records, MOST)
        rows = Rows(self.num_rows, new_tokens)
        begin, expected, self.widths, self.chosen, is_ahead = self.now, 0.0, [], [], False
        for part in self.parts:
            part.lag = 0
        for _ in range(num_steps):
            if not len(rows):
                break
            most = min(MOST, rows.max_remaining - 1)
            if fixed is None:
                width = min(int(chooser.widths(rows, most).max()), most)
                part, is_promised = self.parts[chooser.choice.drafter], chooser.next_width() is not None
            else:
                part, width, is_promised = self.parts[fixed[0]], min(fixed[1], most), True
            self.spend(part, width, len(rows), is_ahead)
            is_ahead = is_promised
            expected += len(rows) * part.expected(width)
            self.commit(chooser if fixed is None else None, part, rows, width)
            self.widths.append(width), self.chosen.append(part.name if width else "plain")
        tokens = expected if len(rows) else self.num_rows * new_tokens
        return tokens / (self.now - begin)

    def learn(self, chooser, rows, width):
        """Of a step that took no time; returns what learning took the host."""
        return self.commit(chooser, self.parts[chooser.choice.drafter], rows, width)

    def commit(self, chooser, part, rows, width):
        accepted = self.accepted(part, width, rows.row_ids)
        committed = np.minimum(accepted + 1, rows.host_limits - rows.host_lengths)
        rows.host_lengths = rows.host_lengths + committed
        for other in self.parts:
            other.lag = 0 if width and other is part else other.lag + int(committed.max())
        is_over, zeros = rows.host_lengths >= rows.host_limits, np.zeros(len(rows), dtype=np.int64)
        ids = np.full((len(rows), width + 1), NO_TOKEN)
        report = StepReport(rows.row_ids, committed, accepted, zeros + width, is_over, zeros, ids)
        begin = time.perf_counter()
        if chooser is not None:
            chooser.learn(report)
        seconds = time.perf_counter() - begin
        rows.keep(~is_over)
        return seconds

    def spend(self, part, width, num_rows, is_ahead):
        seconds = self.steps.run(num_rows, width + 1) + (0 if is_ahead else GAP)
        if width:
            seconds += part.catch_up(num_rows, part.lag) + part.run(num_rows, width)
        self.now += seconds

    @property
    def plain(self):
        return self.num_rows / H200[self.num_rows][0]

    def best(self, widths=(1, 2, 3, 5)):
        """Of plain decoding and every fixed drafter and K."""
        return max([self.plain, *(self.fixed(part, width) for part in self.parts for width in widths)])

    def fixed(self, part, width):
        one = draft_seconds(self.num_rows) * (not part.is_free)
        seconds = float(verify_seconds(self.num_rows)[width + 1]) + one * width
        return self.num_rows * part.expected(width) / seconds


class Rows(SimpleNamespace):
    """What a policy reads of rows."""

    def __init__(self, count, new_tokens):
        # A batch that ends; without an end, as if others took the places of rows.
        lengths = np.full(count, 512)
        super().__init__(
            keeps_outputs=new_tokens < 10**6,
            row_ids=np.arange(count),
            host_lengths=lengths,
            host_limits=lengths + new_tokens,
        )

    def __len__(self):
        return len(self.row_ids)

    def keep(self, is_left):
        for name in ("row_ids", "host_lengths", "host_limits"):
            setattr(self, name, getattr(self, name)[is_left])

    @property
    def max_length(self):
        return int(self.host_lengths.max())

    @property
    def max_remaining(self):
        return int((self.host_limits - self.host_lengths).max())

    @property
    def num_new_tokens(self):
        return self.host_lengths - 512
