"""The rows that are still being decoded, as tensors on the device, each row with its own length."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from specdec.batch.report import StepReport, on_its_way
from specdec.batch.slots import ON_DEVICE, ON_HOST, Slots, to_device
from specdec.kernels.commit.greedy_commit import (
    FAULT,
    FINISHED,
    FIRST_TOKEN,
    NO_TOKEN,
    NUM_ACCEPTED,
    NUM_COMMITTED,
    NUM_DRAFTED,
    Committed,
)


class Rows:
    """The rows that take part in a step: a run of slots, each row with its own length.

    token_ids: [rows, capacity] int64, left-aligned; values past a row's length are meaningless.
    lengths: [rows] int64, committed tokens, prompt included.
    prompt_lengths: [rows] int64. limits: [rows] int64, the length at which a row ends.
    row_ids: [rows] int64 on the host, each row's index in the caller's batch.
    host_lengths: [rows] int64 on the host, as of the last report.

    All are views of `slots`, which also holds rows that do not take part. Rows start in order of decreasing prompt
    length, so that a prefill in chunks touches a shrinking prefix of them.
    """

    token_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    limits: Tensor
    row_ids: np.ndarray
    host_lengths: np.ndarray
    host_prompt_lengths: np.ndarray
    host_limits: np.ndarray
    _taken: Tensor | None = None  # the slots' token tensor when the views were made; it is replaced only by a resize
    _newest: tuple[Tensor, Tensor] | None = None  # see `newest`
    _num_changes = -1  # of the slots when that was computed

    def __init__(
        self, prompts: Sequence[Tensor], max_new_tokens: int | Sequence[int], spare: int, device: torch.device
    ):
        """max_new_tokens: for every row, or one number per row.
        spare: slots after the longest row that a step may write before it knows how much is accepted.
        """
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        limits = lengths + np.asarray(max_new_tokens, dtype=np.int64)
        row_ids = np.argsort(-lengths, kind="stable")
        lengths, limits = lengths[row_ids], limits[row_ids]
        slots = Slots(len(prompts), int(limits.max()) + spare, device)
        slots.add([prompts[row] for row in row_ids], row_ids, lengths, limits)
        slots.num_residents, slots.num_newcomers = len(prompts), 0
        self.slots, self.first = slots, 0
        self.take(len(prompts))
        # Outputs of finished rows, in the caller's order.
        self.keeps_outputs, self.output_ids = True, torch.zeros_like(slots.token_ids)
        self.output_lengths = np.zeros(len(prompts), dtype=np.int64)

    @classmethod
    def of(cls, slots: Slots, first: int = 0, count: int = 0) -> Rows:
        """The rows in `count` slots from `first` on; their outputs are not kept when they end."""
        rows = cls.__new__(cls)
        rows.slots, rows.first, rows.keeps_outputs = slots, first, False
        rows.take(count)
        return rows

    def take(self, count: int) -> None:
        """Let the rows in `count` slots from `first` on take part; call it again after slots were resized."""
        if self._taken is self.slots.token_ids and count == len(self):
            return
        self._taken = self.slots.token_ids
        for name in (*ON_DEVICE, *ON_HOST):
            setattr(self, name, getattr(self.slots, name)[self.first : self.first + count])
        self._newest = None

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def device(self) -> torch.device:
        return self.slots.device

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return self.slots.capacity

    @property
    def max_length(self) -> int:
        """The longest row's committed length on the host."""
        return int(max(self.host_lengths.tolist()))  # for a few numbers Python's own maximum is the fastest

    @property
    def max_limit(self) -> int:
        """No row grows longer than this."""
        return int(self.host_limits.max())

    @property
    def max_remaining(self) -> int:
        """The most tokens that any row may still commit, as of the last report."""
        return int(max((self.host_limits - self.host_lengths).tolist()))

    @property
    def num_new_tokens(self) -> np.ndarray:
        """Tokens that each row has committed after its prompt, [rows] int64 on the host."""
        num_new: np.ndarray = self.host_lengths - self.host_prompt_lengths
        return num_new

    def last_tokens(self, count: int) -> Tensor:
        """The last `count` committed tokens of each row, [rows, count]; rows must be at least that long."""
        return self.token_ids.gather(1, self.lengths[:, None] + torch.arange(-count, 0, device=self.device))

    def newest(self) -> tuple[Tensor, Tensor]:
        """The position of each row's last committed token, [rows] int64, and the token, [rows, 1]; do not write to
        them.

        A step's first forward needs them, so `reading` computes them while the report is on its way.
        """
        if self._newest is not None and self._num_changes == self.slots.num_changes:
            return self._newest
        places = self.lengths - 1
        return places, self.token_ids.gather(1, places[:, None])

    def reading(self, done: Committed, is_prefill: bool = False) -> Callable[[], StepReport]:
        """Start copying the report of one step to the host. Call the returned function for the report: it waits for the
        copy and advances the host's lengths. On the device the step is already committed."""
        arriving = on_its_way(done.report)
        self._newest = None
        self._newest, self._num_changes = self.newest(), self.slots.num_changes

        def read() -> StepReport:
            report = arriving()
            self.host_lengths += report[:, NUM_COMMITTED]

            return StepReport(
                self.row_ids.copy(),  # a copy, as its rows may move
                report[:, NUM_COMMITTED],
                report[:, NUM_ACCEPTED],
                report[:, NUM_DRAFTED],
                report[:, FINISHED].astype(bool),
                report[:, FAULT],
                report[:, FIRST_TOKEN:],
                is_prefill,
            )

        return read

    def grown(self, num_tokens: int) -> Rows:
        """These rows while a step of at most `num_tokens` tokens per row is on its way to the host.

        The tensors are the same; the host lengths of the view are upper bounds.
        """
        view = copy.copy(self)
        view.host_lengths = np.minimum(self.host_lengths + num_tokens, self.host_limits)
        return view

    def up_to(self, num_tokens: int) -> Rows:
        """These rows as if each ended after at most `num_tokens` tokens; themselves, where none is longer."""
        if not len(self) or self.max_length <= num_tokens:
            return self
        view = copy.copy(self)
        view.lengths, view.host_lengths = self.lengths.clamp(max=num_tokens), np.minimum(self.host_lengths, num_tokens)
        view._newest = None
        return view

    def cut(self, report: StepReport, num_committed: np.ndarray, finished: np.ndarray) -> StepReport:
        """Undo committed tokens of this step and return the changed report: row i keeps the first num_committed[i]
        tokens and is finished if finished[i] is set. num_committed: [rows] int64. finished: [rows] bool."""
        is_shorter = num_committed < report.num_committed
        if not is_shorter.any():
            return replace(report, finished=finished)

        self.host_lengths -= report.num_committed - num_committed
        self.lengths.copy_(to_device(self.host_lengths, self.device))
        self._newest = None

        past_the_end = np.arange(report.token_ids.shape[1]) >= num_committed[:, None]
        return replace(
            report,
            num_committed=num_committed,
            token_ids=np.where(past_the_end, NO_TOKEN, report.token_ids),
            num_accepted=np.minimum(report.num_accepted, num_committed),
            finished=finished,
        )

    def retire(self, finished: np.ndarray) -> Tensor:
        """Take finished rows out of their slots and return the index that `keep_rows` calls need, [kept slots] int64 on
        the host.

        finished: [rows] bool. All remaining residents take part afterwards.
        """
        done = np.flatnonzero(finished)
        if self.keeps_outputs:
            done_ids = self.row_ids[finished]
            place, slot = to_device(np.stack([done_ids, done]), self.device)
            self.output_ids[place] = self.token_ids[slot]
            self.output_lengths[done_ids] = self.host_lengths[finished]
        index = self.slots.remove(done + self.first)
        self.take(max(self.slots.num_residents - self.first, 0))
        return index
