"""The slots that rows occupy: tensors on the device and their mirror on the host, one entry per slot.

Residents (rows whose prompts are cached) come first, then newcomers (rows whose prompts are being cached); the rest is
free. Caches follow the same order, so that the rows of a step are a prefix of all of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUMBERS = ("lengths", "prompt_lengths", "limits")
ON_DEVICE = ("token_ids", *NUMBERS)
ON_HOST = ("row_ids", "host_lengths", "host_prompt_lengths", "host_limits")


class Slots:
    """token_ids: [slots, capacity] int64, left-aligned. lengths, prompt_lengths, limits: [slots] int64; the host's
    mirrors of the same, and row_ids, which the device does not need. num_changes: how often rows came or moved."""

    def __init__(self, num_slots: int, capacity: int, device: torch.device):
        self.device = device
        self.num_residents = self.num_newcomers = self.num_changes = 0
        self.token_ids = torch.zeros(num_slots, capacity, dtype=torch.long, device=device)
        self._hold(torch.zeros(len(NUMBERS), num_slots, dtype=torch.long, device=device))
        self.row_ids, self.host_lengths, self.host_prompt_lengths, self.host_limits = (
            np.zeros(num_slots, dtype=np.int64) for _ in ON_HOST
        )

    def _hold(self, numbers: Tensor) -> None:
        """numbers: [3, slots] int64, one tensor so that all numbers of a row move at once."""
        self._numbers = numbers
        self.lengths, self.prompt_lengths, self.limits = numbers

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.token_ids.shape[1]

    @property
    def num_occupied(self) -> int:
        return self.num_residents + self.num_newcomers

    def add(self, tokens: list[Tensor], row_ids: np.ndarray, prompt_lengths: np.ndarray, limits: np.ndarray) -> None:
        """Put rows of [length] int64 tokens on the host into the first free slots, as newcomers."""
        first, count = self.num_occupied, len(tokens)
        lengths = np.array([len(row) for row in tokens], dtype=np.int64)
        padded = torch.zeros(count, int(lengths.max()), dtype=torch.long)
        for slot, row in enumerate(tokens):
            padded[slot, : len(row)] = row
        taken = slice(first, first + count)
        self.token_ids[taken, : padded.shape[1]] = padded.to(self.device)
        numbers = np.stack([lengths, prompt_lengths, limits])
        self._numbers[:, taken] = torch.from_numpy(numbers).to(self.device)
        for name, values in zip(NUMBERS, numbers, strict=True):
            getattr(self, f"host_{name}")[taken] = values
        self.row_ids[taken] = row_ids
        self.num_newcomers += count
        self.num_changes += 1

    def arrange(self, order: np.ndarray) -> Tensor:
        """Slot i gets the content of slot order[i] ([kept slots] int64); returns the same index, on the host.

        Slots from len(order) on keep their content; callers that remove rows update the row counts themselves.
        """
        moves = moves_of(order)
        self.num_changes += 1
        if moves.size:
            moved_from, moved_to = to_device(moves, self.device)
            self.token_ids[moved_to] = self.token_ids[moved_from]
            self._numbers[:, moved_to] = self._numbers[:, moved_from]
            for name in ON_HOST:
                array = getattr(self, name)
                array[moves[1]] = array[moves[0]]
        return torch.from_numpy(order)

    def remove(self, leaving: np.ndarray) -> Tensor:
        """Take rows out of their slots ([leaving] int64); returns the index that caches need to follow.

        Residents from the end fill the holes among them, and newcomers close up after them, so that few rows move.
        """
        is_left = np.ones(self.num_occupied, dtype=bool)
        is_left[leaving] = False
        residents = fill_holes(~is_left[: self.num_residents])
        newcomers = np.flatnonzero(is_left[self.num_residents :]) + self.num_residents
        # Only as many newcomers move as slots became free before them.
        begin = len(residents)
        moved = np.setdiff1d(newcomers, np.arange(begin, begin + len(newcomers)))
        order = np.concatenate([residents, np.arange(begin, begin + len(newcomers))])
        order[np.setdiff1d(np.arange(begin, begin + len(newcomers)), newcomers)] = moved
        self.num_residents, self.num_newcomers = len(residents), len(newcomers)
        return self.arrange(order)

    def resize(self, num_slots: int, capacity: int) -> None:
        """Change the number of slots and tokens; occupied slots keep their content."""
        kept, columns = min(num_slots, len(self)), min(capacity, self.capacity)
        token_ids, numbers = self.token_ids, self._numbers
        self.token_ids = token_ids.new_zeros(num_slots, capacity)
        self.token_ids[:kept, :columns] = token_ids[:kept, :columns]
        self._hold(numbers.new_zeros(len(NUMBERS), num_slots))
        self._numbers[:, :kept] = numbers[:, :kept]
        for name in ON_HOST:
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old[:kept], np.zeros(num_slots - kept, dtype=np.int64)]))


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device. On a GPU this does not wait for pending work, as a copy from ordinary memory would."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def moves_of(order: np.ndarray) -> np.ndarray:
    """The moves in `order`: (from, to), [2, moves] int64.

    >>> moves_of(np.array([0, 3, 2])).tolist()
    [[3], [1]]
    """
    moved_to = np.flatnonzero(order != np.arange(len(order)))
    return np.stack([order[moved_to], moved_to])


def fill_holes(finished: np.ndarray) -> np.ndarray:
    """The kept slots in their new order: slot i stays at i; a slot from the end fills each hole.

    >>> fill_holes(np.array([False, True, False, False])).tolist()
    [0, 3, 2]
    """
    num_kept = int((~finished).sum())
    keep = np.arange(num_kept, dtype=np.int64)
    keep[finished[:num_kept]] = num_kept + np.flatnonzero(~finished[num_kept:])
    return keep
