"""Which rows are in the batch: all of them from the first step on, or more prompts than there are places for.

Continuous scheduling (Yu et al. 2022, "Orca"): a finished row's place is taken at once. Newcomers' prompts are cached
in pieces between the steps of the others (chunked prefill, Agrawal et al. 2023), so that nobody waits for a long
prompt. The caches together hold at most `kv_tokens` tokens; when the rows outgrow them the newest row is preempted: it
gives up its keys and values, waits, and is cached again with all it has written, so that nothing is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specdec.batch.rows import Rows, StepReport
from specdec.batch.slots import Slots
from specdec.network.base import prefill_budget

if TYPE_CHECKING:
    from specdec.drafter import Drafter
    from specdec.engine.target import Target

ROUNDING = 64  # a row's capacity grows by so many tokens at a time
PIECE = {"cpu": 128}  # newcomers' tokens per forward between two steps: about what a step costs
PIECE_ELSEWHERE = 2048


class Schedule(ABC):
    """takes_newcomers: rows may join while others are decoded. is_done: no row will join any more."""

    takes_newcomers = False
    is_done: bool

    @abstractmethod
    def admit(self, target: Target, drafter: Drafter, rows: Rows) -> tuple[Rows, StepReport] | None:
        """Called before each step. New rows whose prompts have been cached, and the report of their first tokens."""


class FixedBatch(Schedule):
    """All rows are there from the beginning; who finishes leaves."""

    is_done = False

    def admit(self, target: Target, drafter: Drafter, rows: Rows) -> tuple[Rows, StepReport] | None:
        if self.is_done:
            return None
        self.is_done = True
        return rows, target.prefill(rows)


@dataclass
class Request:
    """One prompt on its way through the batch.

    index: of the row in the caller's order. prompt: [length] int64 on the host. new_ids: what it has been continued
    with. arrival: the larger, the later it was admitted. num_preemptions: how often it had to give up its place.
    """

    index: int
    prompt: Tensor
    max_new_tokens: int
    new_ids: list[int] = field(default_factory=list)
    arrival: int = 0
    num_preemptions: int = 0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.new_ids)

    @property
    def limit(self) -> int:
        return len(self.prompt) + self.max_new_tokens

    @property
    def tokens(self) -> Tensor:
        return torch.cat([self.prompt, torch.tensor(self.new_ids, dtype=torch.long)])


@dataclass
class Joining:
    """Newcomers in the last occupied slots: the first `begin` of `end` columns are cached. is_resumed: rows that were
    preempted, whose newest token is no prediction of the prefill."""

    end: int
    is_resumed: bool
    begin: int = 0
    logits: Tensor | None = None


class Continuous(Schedule):
    """More prompts than rows.

    running: the requests in slots, by index; whoever reads the reports appends to their `new_ids`.
    on_enter: told of each request before its first forward. peak_kv_tokens: the most tokens that the target's cache
        had room for.
    """

    takes_newcomers = True

    def __init__(
        self,
        requests: Iterator[Request],
        max_rows: int,
        spare: int,
        device: torch.device,
        kv_tokens: int | None = None,
        prefill_tokens: int | None = None,
    ):
        """spare: tokens that a step may write behind a row. kv_tokens: the budget, rows times the capacity of each;
        a single row must fit. prefill_tokens: of newcomers, per forward."""
        self.source, self.max_rows, self.spare, self.kv_tokens = requests, max_rows, spare, kv_tokens
        self.piece = prefill_tokens or PIECE.get(device.type, PIECE_ELSEWHERE)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.joining: Joining | None = None
        self.num_admitted = self.num_preemptions = 0
        self.on_enter: Callable[[Request], object] | None = None
        # Room for the first rows, so that nothing is resized before it has begun.
        first = self._look_ahead(max_rows)
        needed = max((self._needed(request) for request in first), default=1)
        count = min(len(first) or 1, max(self._fitting(needed), 1))
        self.slots = Slots(self._fitting(self._rounded(needed, count)), self._rounded(needed, count), device)
        self.peak_kv_tokens = len(self.slots) * self.slots.capacity

    @property
    def is_done(self) -> bool:  # type: ignore[override]
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
        output = target.network.prefill_columns(newcomers.token_ids, newcomers.lengths, newcomers.first, begin, end)
        logits = output.logits[:, 0]
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
        group: list[Request] = []
        budget = prefill_budget(device) if not self.slots.num_residents else self.piece
        needed = max((self._needed(request) for request in self.running.values()), default=1)
        while self._look_ahead(1):
            request = self.waiting[0]
            needed = max(needed, self._needed(request))
            if self.slots.num_residents + len(group) + 1 > self._fitting(needed):
                break
            longest = max(map(lambda other: other.length, [*group, request]))
            if group and (longest * (len(group) + 1) > budget or bool(request.new_ids) != bool(group[0].new_ids)):
                break
            group.append(self.waiting.popleft())
            self._enter(request)
        if not group:
            return
        self._resize_for(target, drafter, max(map(self._needed, self.running.values())))
        prompt_lengths = np.array([len(request.prompt) for request in group])
        limits = np.array([request.limit for request in group])
        indices = np.array([request.index for request in group])
        self.slots.add([request.tokens for request in group], indices, prompt_lengths, limits)
        is_resumed = bool(group[0].new_ids)
        # The newest token of a resumed row gets its keys in the row's next step, like any other row's.
        self.joining = Joining(max(request.length for request in group) - is_resumed, is_resumed)

    def _enter(self, request: Request) -> None:
        self.num_admitted += 1
        request.arrival = self.num_admitted
        self.running[request.index] = request
        if self.on_enter is not None:
            self.on_enter(request)

    def _make_room(self, target: Target, drafter: Drafter) -> None:
        """Before a step: rows that have outgrown their slots get larger ones, if need be at the cost of the newest."""
        while self.running:
            needed = max(request.length for request in self.running.values()) + self.spare
            if needed <= self.slots.capacity:
                return
            if len(self.running) <= self._fitting(needed):
                self._resize_for(target, drafter, needed)
                return
            self._preempt(target, drafter)

    def _preempt(self, target: Target, drafter: Drafter) -> None:
        newest = max(self.running.values(), key=lambda request: request.arrival)
        leaving = [newest]
        if self.joining is not None:  # they stand in a group, and all of them are newer than the residents
            indices = self.slots.row_ids[self.slots.num_residents : self.slots.num_occupied]
            leaving, self.joining = [self.running[index] for index in indices], None
        occupied = self.slots.row_ids[: self.slots.num_occupied]
        places = np.flatnonzero(np.isin(occupied, [request.index for request in leaving]))
        index = self.slots.remove(places)
        target.keep_rows(index)
        drafter.keep_rows(index)
        for request in sorted(leaving, key=lambda request: -request.arrival):
            request.num_preemptions += 1
            self.num_preemptions += 1
            self.waiting.appendleft(self.running.pop(request.index))

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

    def _needed(self, request: Request) -> int:
        """Tokens that a row is given room for: all it can become, or within a budget some steps' worth."""
        whole = request.limit + self.spare
        return whole if self.kv_tokens is None else min(request.length + self.spare + ROUNDING, whole)

    def _fitting(self, capacity: int) -> int:
        """Rows of this capacity that there is room for."""
        return self.max_rows if self.kv_tokens is None else min(self.max_rows, self.kv_tokens // capacity)

    def _rounded(self, needed: int, count: int) -> int:
        rounded = -(-needed // ROUNDING) * ROUNDING
        return rounded if self._fitting(rounded) >= count else needed

    def _look_ahead(self, count: int) -> list[Request]:
        """Up to `count` waiting requests, drawn from the source as far as there are too few."""
        while len(self.waiting) < count:
            request = next(self.source, None)
            if request is None:
                break
            self.waiting.append(request)
        return list(self.waiting)[:count]
