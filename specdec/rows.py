"""The rows that are still being decoded, as tensors on the device, each row with its own length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from specdec.drafter import NO_TOKEN


@dataclass(frozen=True)
class StepReport:
    """One step as the host sees it, read in a single copy.

    row_ids: [rows] int64, the index of each row in the caller's batch.
    num_committed, num_accepted, num_drafted: [rows] int64.
    finished: [rows] bool. fault: [rows] int64, 0 if all is well, see `verify.py`.
    token_ids: [rows, k + 1] int64, `NO_TOKEN` behind the committed ones.
    is_prefill: the tokens come from the prefill, not from a verify forward.
    """

    row_ids: np.ndarray
    num_committed: np.ndarray
    num_accepted: np.ndarray
    num_drafted: np.ndarray
    finished: np.ndarray
    fault: np.ndarray
    token_ids: np.ndarray
    is_prefill: bool = False


class Rows:
    """Token ids and lengths of the rows still in the batch.

    token_ids: [rows, capacity] int64, left-aligned; what lies behind a row's length is meaningless.
    lengths: [rows] int64, committed tokens, prompt included.
    prompt_lengths: [rows] int64. limits: [rows] int64, the length at which a row ends.
    row_ids: [rows] int64 on the host, each row's index in the caller's batch.
    host_lengths: [rows] int64 on the host, as of the last report.

    Rows start in order of falling prompt length, so that a prefill in chunks touches a shrinking prefix of them.
    """

    def __init__(self, prompts: Sequence[Tensor], max_new_tokens: int, spare: int, device: torch.device):
        """`spare`: slots behind the longest row that a step may write before it knows how much is accepted."""
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        self.row_ids = np.argsort(-lengths, kind="stable")
        self.host_lengths = lengths[self.row_ids]
        self.host_prompt_lengths = self.host_lengths.copy()
        self.host_limits = self.host_lengths + max_new_tokens
        self.capacity = int(self.host_limits.max()) + spare
        token_ids = torch.zeros(len(prompts), self.capacity, dtype=torch.long)
        for slot, row in enumerate(self.row_ids):
            token_ids[slot, : lengths[row]] = prompts[row]
        self.token_ids = token_ids.to(device)
        self.lengths = torch.from_numpy(self.host_lengths.copy()).to(device)
        self.prompt_lengths = self.lengths.clone()
        self.limits = torch.from_numpy(self.host_limits.copy()).to(device)
        # Where finished rows end up, in the caller's order.
        self.output_ids = torch.zeros_like(self.token_ids)
        self.output_lengths = np.zeros(len(prompts), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    @property
    def max_length(self) -> int:
        """The longest row's committed length, known to the host."""
        return int(self.host_lengths.max())

    @property
    def max_limit(self) -> int:
        """No row grows longer than this."""
        return int(self.host_limits.max())

    @property
    def max_remaining(self) -> int:
        """The most tokens that any row may still commit."""
        return int((self.host_limits - self.host_lengths).max())

    @property
    def num_new_tokens(self) -> np.ndarray:
        """Tokens that each row has committed behind its prompt, [rows] int64 on the host."""
        return self.host_lengths - self.host_prompt_lengths

    def last_tokens(self, count: int) -> Tensor:
        """The last `count` committed tokens of each row, [rows, count]; rows must be at least that long."""
        index = self.lengths[:, None] + torch.arange(-count, 0, device=self.device)
        return self.token_ids.gather(1, index)

    def read(
        self,
        num_committed: Tensor,
        num_accepted: Tensor,
        finished: Tensor,
        fault: Tensor,
        draft: Tensor,
        committed: Tensor,
    ) -> StepReport:
        """Bring one step to the host in one copy and advance the host's lengths."""
        num_drafted = (draft != NO_TOKEN).sum(1)
        columns = [num_committed, num_accepted, num_drafted, finished.long(), fault]
        packed = torch.cat([torch.stack(columns, 1), committed], 1).cpu().numpy()
        self.host_lengths = self.host_lengths + packed[:, 0]
        return StepReport(
            self.row_ids,
            packed[:, 0],
            packed[:, 1],
            packed[:, 2],
            packed[:, 3].astype(bool),
            packed[:, 4],
            packed[:, 5:],
        )

    def cut(self, report: StepReport, num_committed: np.ndarray) -> StepReport:
        """Take back committed tokens of this step: row i keeps the first num_committed[i] ([rows] int64)."""
        self.host_lengths = self.host_lengths - (report.num_committed - num_committed)
        self.lengths = torch.from_numpy(self.host_lengths.copy()).to(self.device)
        behind = np.arange(report.token_ids.shape[1]) >= num_committed[:, None]
        return replace(
            report,
            num_committed=num_committed,
            token_ids=np.where(behind, NO_TOKEN, report.token_ids),
            num_accepted=np.minimum(report.num_accepted, num_committed),
        )

    def retire(self, finished: np.ndarray) -> Tensor:
        """Take finished rows out of the batch and return the index that `keep_rows` calls need, [kept rows] int64.

        Rows from the end fill the holes, so that caches move only as many rows as have finished.
        """
        done = torch.from_numpy(np.flatnonzero(finished)).to(self.device)
        done_ids = self.row_ids[finished]
        self.output_ids[torch.from_numpy(done_ids).to(self.device)] = self.token_ids[done]
        self.output_lengths[done_ids] = self.host_lengths[finished]
        keep = fill_holes(finished)
        index = torch.from_numpy(keep).to(self.device)
        for name in ("token_ids", "lengths", "prompt_lengths", "limits"):
            setattr(self, name, getattr(self, name)[index])
        for name in ("row_ids", "host_lengths", "host_prompt_lengths", "host_limits"):
            setattr(self, name, getattr(self, name)[keep])
        return index


def fill_holes(finished: np.ndarray) -> np.ndarray:
    """The kept slots in their new order: slot i stays at i unless it is a hole, which a slot from the end fills.

    >>> fill_holes(np.array([False, True, False, False])).tolist()
    [0, 3, 2]
    """
    num_kept = int((~finished).sum())
    keep = np.arange(num_kept, dtype=np.int64)
    keep[finished[:num_kept]] = num_kept + np.flatnonzero(~finished[num_kept:])
    return keep
