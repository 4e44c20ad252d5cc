"""The rows that are still being decoded, as tensors on the device, each row with its own length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from specdec.batch.slots import ON_DEVICE, ON_HOST, Slots, to_device
from specdec.drafter import NO_TOKEN
from specdec.kernels.commit.greedy_commit import (
    FAULT,
    FINISHED,
    FIRST_TOKEN,
    NUM_ACCEPTED,
    NUM_COMMITTED,
    NUM_DRAFTED,
    Committed,
)


@dataclass(frozen=True)
class StepReport:
    """One step as the host sees it, read in a single copy.

    row_ids: [rows] int64, the index of each row in the caller's batch.
    num_committed, num_accepted, num_drafted: [rows] int64.
    finished: [rows] bool. fault: [rows] int64, 0 if all is well, see `verify.py`.
    token_ids: [rows, k + 1] int64, `NO_TOKEN` after the committed ones.
    is_prefill: the tokens come from the prefill, not from a verify forward.
    predicted: [rows, places] float64, the length policy's predicted acceptance of drafted tokens, if all before them
    are accepted; NaN where it predicted nothing. None if it makes no predictions.
    """

    row_ids: np.ndarray
    num_committed: np.ndarray
    num_accepted: np.ndarray
    num_drafted: np.ndarray
    finished: np.ndarray
    fault: np.ndarray
    token_ids: np.ndarray
    is_prefill: bool = False
    predicted: np.ndarray | None = None


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
    _num_changes = -1  # the slots' num_changes when that was computed
    num_steps = 0  # steps whose reports were read
    num_unread = 0  # most tokens that a row may have committed beyond `host_lengths` while a report is on its way

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
        """An upper bound of all rows' committed lengths; exact while no report is on its way."""
        if self.num_unread:
            return int(np.minimum(self.host_lengths + self.num_unread, self.host_limits).max())
        return max(self.host_lengths.tolist())  # for a few numbers Python's own maximum is the fastest

    @property
    def max_limit(self) -> int:
        """No row grows longer than this."""
        return int(self.host_limits.max())

    @property
    def max_remaining(self) -> int:
        """The most tokens that any row may still commit, as of the last report."""
        return max((self.host_limits - self.host_lengths).tolist())

    @property
    def num_new_tokens(self) -> np.ndarray:
        """Tokens that each row has committed after its prompt, [rows] int64 on the host."""
        return self.host_lengths - self.host_prompt_lengths

    def last_tokens(self, count: int) -> Tensor:
        """The last `count` committed tokens of each row, [rows, count]; rows must be at least that long."""
        return self.token_ids.gather(1, self.lengths[:, None] + torch.arange(-count, 0, device=self.device))

    def newest(self) -> tuple[Tensor, Tensor]:
        """The position of each row's last committed token, [rows] int64, and the token, [rows, 1]; do not write to
        them.

        A step's first forward needs them, so `read` computes them while the host waits for the report.
        """
        if self._newest is not None and self._num_changes == self.slots.num_changes:
            return self._newest
        places = self.lengths - 1
        return places, self.token_ids.gather(1, places[:, None])

    def read(self, done: Committed, meanwhile: Callable[[], None] | None = None) -> StepReport:
        """Bring one step to the host in one copy and advance the host's lengths.

        meanwhile: called before waiting for the report. On the device the step is then already committed; the host's
        lengths are those before the step, and `max_length` bounds the new ones.
        """
        arriving = on_its_way(done.report)
        self._newest = None
        self._newest, self._num_changes = self.newest(), self.slots.num_changes
        if meanwhile is not None:
            self.num_unread = done.report.shape[1] - FIRST_TOKEN
            meanwhile()
            self.num_unread = 0
        report = arriving()
        self.num_steps += 1
        self.host_lengths += report[:, NUM_COMMITTED]
        return StepReport(
            self.row_ids.copy(),  # a copy, as its rows may move
            report[:, NUM_COMMITTED],
            report[:, NUM_ACCEPTED],
            report[:, NUM_DRAFTED],
            report[:, FINISHED].astype(bool),
            report[:, FAULT],
            report[:, FIRST_TOKEN:],
        )

    def cut(self, report: StepReport, num_committed: np.ndarray) -> StepReport:
        """Undo committed tokens of this step: row i keeps the first num_committed[i] ([rows] int64)."""
        self.host_lengths -= report.num_committed - num_committed
        self.lengths.copy_(to_device(self.host_lengths, self.device))
        self._newest = None
        behind = np.arange(report.token_ids.shape[1]) >= num_committed[:, None]
        return replace(
            report,
            num_committed=num_committed,
            token_ids=np.where(behind, NO_TOKEN, report.token_ids),
            num_accepted=np.minimum(report.num_accepted, num_committed),
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


def on_its_way(values: Tensor) -> Callable[[], np.ndarray]:
    """Start copying a tensor to the host; call the returned function for the result. Work launched in between does not
    delay it."""
    if not values.is_cuda:
        return values.cpu().numpy
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    has_arrived = torch.cuda.Event()
    has_arrived.record(torch.cuda.current_stream(values.device))

    def arrive() -> np.ndarray:
        has_arrived.synchronize()
        return host.numpy().copy()  # pinned memory is reused for the next step

    return arrive
