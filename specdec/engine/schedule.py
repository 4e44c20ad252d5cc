"""Which rows are in the batch: all of them from the first step on, or more requests than there are places for.

Continuous scheduling (Yu et al. 2022, "Orca"): a finished row's place is taken at once. Newcomers' prompts are cached
in pieces between the steps of the others (chunked prefill, Agrawal et al. 2023), so that nobody waits for a long
prompt. The caches together hold at most `kv_tokens` tokens. When the rows outgrow them the newest row is preempted: it
gives up its keys and values, waits, and is cached again with all it has written, so that nothing is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.batch.slots import Slots
from specdec.drafter import Drafter
from specdec.engine.job import Job
from specdec.engine.target import Target
from specdec.errors import ConfigError
from specdec.network.base import prefill_budget
from specdec.options.generation import is_whole

ORDERS = ("arrival", "longest_first")
TOGETHER = "together"  # an order of our own: all requests are there before the first step, and none joins
ROUNDING = 64  # a row's capacity grows by this many tokens at a time
PIECE = {"cpu": 128}  # newcomers' tokens per forward between two steps: about what a step costs
PIECE_ELSEWHERE = 2048


class Schedule(ABC):
    """takes_newcomers: rows may join while others are decoded.

    running: the jobs in slots, by row id. The engine appends to their `new_ids` and takes those out that have ended.
    """

    takes_newcomers = False
    running: dict[int, Job]
    slots: Slots

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether no row will join any more, as far as is known."""

    @abstractmethod
    def add(self, job: Job) -> None:
        """One more request. Raises ConfigError where it can never have a place."""

    @abstractmethod
    def rows(self) -> Rows:
        """Make the slots and return the rows that stand in them; called once, before the first step."""

    @abstractmethod
    def admit(self, target: Target, drafter: Drafter, rows: Rows) -> tuple[Rows, StepReport] | None:
        """Called before each step. New rows whose prompts have been cached, and the report of their first tokens."""

    @abstractmethod
    def withdraw(self, job: Job, target: Target | None, drafter: Drafter) -> None:
        """Take a request out between two steps, wherever it is. target: None before the first step."""


class Together(Schedule):
    """All rows are there from the beginning; those that finish leave."""

    def __init__(self, spare: int, device: torch.device):
        """spare: tokens that a step may write after a row."""
        self.spare, self.device = spare, device
        self.running = {}
        self._has_begun = self._is_admitted = False

    @property
    def is_done(self) -> bool:
        return self._is_admitted or not self.running

    def add(self, job: Job) -> None:
        if self._has_begun:
            raise ConfigError("this engine decodes one batch, which has begun; make an engine with order='arrival'")
        self.running[job.index] = job

    def rows(self) -> Rows:
        self._has_begun = True
        jobs = list(self.running.values())
        limits = [job.options.max_new_tokens for job in jobs]
        rows = Rows([job.prompt for job in jobs], limits, self.spare, self.device)
        self.slots = rows.slots
        return rows

    def admit(self, target: Target, drafter: Drafter, rows: Rows) -> tuple[Rows, StepReport] | None:
        if self._is_admitted:
            return None
        self._is_admitted = True
        return rows, target.prefill(rows, drafter)

    def withdraw(self, job: Job, target: Target | None, drafter: Drafter) -> None:
        raise ConfigError(
            "the rows of one batch end together with it; make an engine with order='arrival' to abort some"
        )


@dataclass
class Joining:
    """Newcomers in the last occupied slots: the first `begin` of `end` columns are cached. is_resumed: rows that were
    preempted, whose newest token is not a prediction of the prefill."""

    end: int
    is_resumed: bool
    begin: int = 0
    logits: Tensor | None = None


class Continuous(Schedule):
    """More requests than rows.

    peak_kv_tokens: the most tokens that the target's cache had room for.
    """

    takes_newcomers = True

    def __init__(
        self,
        max_rows: int,
        spare: int,
        device: torch.device,
        kv_tokens: int | None = None,
        prefill_tokens: int | None = None,
        order: str = "arrival",
        source: Iterable[Job] = (),
    ):
        """spare: tokens that a step may write after a row. kv_tokens: the budget, rows times the capacity of each;
        a single row must fit. prefill_tokens: of newcomers, per forward. source: more jobs, read as places become
        free."""
        self.max_rows, self.spare, self.device, self.kv_tokens = max_rows, spare, device, kv_tokens
        self.piece = prefill_tokens or PIECE.get(device.type, PIECE_ELSEWHERE)
        self.order, self.source = order, iter(source)
        self.waiting: deque[Job] = deque()
        self.running = {}
        self.joining: Joining | None = None
        self.num_admitted = self.num_preemptions = self.peak_kv_tokens = 0

    def add(self, job: Job) -> None:
        needed = job.limit + self.spare
        if self.kv_tokens is not None and needed > self.kv_tokens:
            raise ConfigError(
                f"prompt {job.index} with its new tokens and drafts may need {needed} tokens, but "
                f"kv_tokens={self.kv_tokens}; raise it, shorten the prompt or lower max_new_tokens"
            )
        self.waiting.append(job)
        if self.order == "longest_first":  # rows that were preempted stay in front
            self.waiting = deque(sorted(self.waiting, key=lambda one: (one.arrival == 0, -one.limit)))

    def peek(self) -> None:
        """Read the source as far as the first step needs it, so that its errors come before any work."""
        self._look_ahead(self.max_rows)

    def rows(self) -> Rows:
        # Room for the first rows, so that nothing is resized before it has begun.
        first = self._look_ahead(self.max_rows)
        needed = max((self._needed(job) for job in first), default=1)
        count = min(len(first) or 1, max(self._fitting(needed), 1))
        self.slots = Slots(self._fitting(self._rounded(needed, count)), self._rounded(needed, count), self.device)
        self.peak_kv_tokens = len(self.slots) * self.slots.capacity
        return Rows.of(self.slots)

    def withdraw(self, job: Job, target: Target | None, drafter: Drafter) -> None:
        if job.index not in self.running:
            self.waiting.remove(job)
            return

        assert target is not None
        for other in self._take_out(job, target, drafter):
            if other is not job:  # newcomers leave as one group
                self.waiting.appendleft(other)

    @property
    def is_done(self) -> bool:
        return self.joining is None and not self._look_ahead(1)

    def admit(self, target: Target, drafter: Drafter, rows: Rows) -> tuple[Rows, StepReport] | None:
        self._make_room(target, drafter)
        if self.joining is None:
            self._invite(target, drafter, rows.device)
        return None if self.joining is None else self._prefill_piece(target, drafter, self.joining)

    def _prefill_piece(self, target: Target, drafter: Drafter, joining: Joining) -> tuple[Rows, StepReport] | None:
        slots = self.slots
        newcomers = Rows.of(slots, slots.num_residents, slots.num_newcomers)
        # While nobody waits for the next step, larger pieces cost less.
        piece = self.piece if slots.num_residents else max(self.piece, prefill_budget(slots.device))
        begin, end = joining.begin, min(joining.begin + max(piece // len(newcomers), 1), joining.end)
        logits = target.prefill_columns(newcomers, begin, end, drafter)
        drafter.join(newcomers, begin, end)
        if joining.logits is not None:
            logits = torch.where((newcomers.lengths > begin)[:, None], logits, joining.logits)
        joining.begin, joining.logits = end, logits
        if end < joining.end:
            return None
        self.joining = None
        slots.num_residents, slots.num_newcomers = slots.num_occupied, 0
        return None if joining.is_resumed else (newcomers, target.first_tokens(newcomers, logits))

    def _invite(self, target: Target, drafter: Drafter, device: torch.device) -> None:
        """Put waiting rows into free slots: as many as fit, and as one piece of prefill takes."""
        group: list[Job] = []
        budget = prefill_budget(device) if not self.slots.num_residents else self.piece
        needed = max((self._needed(job) for job in self.running.values()), default=1)
        while self._look_ahead(1):
            job = self.waiting[0]
            needed = max(needed, self._needed(job))
            if self.slots.num_residents + len(group) + 1 > self._fitting(needed):
                break
            longest = max(map(lambda other: other.length, [*group, job]))
            if group and (longest * (len(group) + 1) > budget or bool(job.new_ids) != bool(group[0].new_ids)):
                break
            group.append(self.waiting.popleft())
            self._enter(job)
        if not group:
            return
        self._resize_for(target, drafter, max(map(self._needed, self.running.values())))
        prompt_lengths = np.array([len(job.prompt) for job in group])
        limits = np.array([job.limit for job in group])
        indices = np.array([job.index for job in group])
        self.slots.add([job.tokens for job in group], indices, prompt_lengths, limits)
        is_resumed = bool(group[0].new_ids)
        # The newest token of a resumed row gets its keys in the row's next step, like any other row's.
        self.joining = Joining(max(job.length for job in group) - is_resumed, is_resumed)

    def _enter(self, job: Job) -> None:
        self.num_admitted += 1
        job.arrival = self.num_admitted
        self.running[job.index] = job

    def _make_room(self, target: Target, drafter: Drafter) -> None:
        """Before a step: rows that have outgrown their slots get larger ones, if need be at the cost of the newest."""
        while self.running:
            needed = max(job.length for job in self.running.values()) + self.spare
            if needed <= self.slots.capacity:
                return
            if len(self.running) <= self._fitting(needed):
                self._resize_for(target, drafter, needed)
                return
            self._preempt(target, drafter)

    def _preempt(self, target: Target, drafter: Drafter) -> None:
        newest = max(self.running.values(), key=lambda job: job.arrival)
        for job in self._take_out(newest, target, drafter):
            job.num_preemptions += 1
            self.num_preemptions += 1
            self.waiting.appendleft(job)

    def _take_out(self, job: Job, target: Target, drafter: Drafter) -> Sequence[Job]:
        """Take a job out of its slot, with all newcomers if it is one. Returns those that left, newest first."""
        leaving = [job]
        if self.joining is not None:  # they stand in a group, and all of them are newer than the residents
            newcomers = self.slots.row_ids[self.slots.num_residents : self.slots.num_occupied].tolist()
            if job.index in newcomers:
                leaving, self.joining = [self.running[index] for index in newcomers], None

        occupied = self.slots.row_ids[: self.slots.num_occupied]
        places = np.flatnonzero(np.isin(occupied, [one.index for one in leaving]))
        index = self.slots.remove(places)
        target.keep_rows(index)
        drafter.keep_rows(index)
        for one in leaving:
            del self.running[one.index]
        return sorted(leaving, key=lambda one: -one.arrival)

    def _resize_for(self, target: Target, drafter: Drafter, needed: int) -> None:
        """Slots of at least `needed` tokens for all that are running."""
        count = len(self.running)
        if needed <= self.slots.capacity and count <= len(self.slots):
            return
        capacity = self._rounded(needed, count)
        if self.kv_tokens is None:
            capacity = max(capacity, self.slots.capacity)
        num_slots = self._fitting(capacity)
        self.slots.resize(num_slots, capacity)
        target.network.resize(num_slots, capacity)
        drafter.resize(num_slots, capacity)
        self.peak_kv_tokens = max(self.peak_kv_tokens, num_slots * capacity)

    def _needed(self, job: Job) -> int:
        """Tokens that a row is given room for: all it can become, or within a budget some steps' worth."""
        whole = job.limit + self.spare
        return whole if self.kv_tokens is None else min(job.length + self.spare + ROUNDING, whole)

    def _fitting(self, capacity: int) -> int:
        """Rows of this capacity that there is room for."""
        return self.max_rows if self.kv_tokens is None else min(self.max_rows, self.kv_tokens // capacity)

    def _rounded(self, needed: int, count: int) -> int:
        rounded = -(-needed // ROUNDING) * ROUNDING
        return rounded if self._fitting(rounded) >= count else needed

    def _look_ahead(self, count: int) -> list[Job]:
        """Up to `count` waiting jobs, drawn from the source as far as there are too few."""
        while len(self.waiting) < count:
            job = next(self.source, None)
            if job is None:
                break
            self.add(job)
        return list(self.waiting)[:count]


def check_sizes(max_rows: int, kv_tokens: int | None, prefill_tokens: int | None, order: str) -> None:
    for name, value in (("max_rows", max_rows), ("kv_tokens", kv_tokens), ("prefill_tokens", prefill_tokens)):
        if value is not None and not (is_whole(value) and value >= 1):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
    if order not in (*ORDERS, TOGETHER):
        raise ConfigError(f"order={order!r}; choose {' or '.join(map(repr, ORDERS))}")
