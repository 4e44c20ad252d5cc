"""Random numbers that belong to a row: the same whatever its batch, its slot or what other rows have drawn.

A stateless generator, Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 bits of
counter and 64 bits of key in, 128 random bits out. The key is the seed; the counter holds the row, a position in its
sequence, a purpose and the number of the draw, so that no two draws share a counter and nothing needs to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError

WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
NUM_ROUNDS = 10


class Streams(Protocol):
    """Where the random numbers of rows come from."""

    def uniforms(self, row_ids: np.ndarray, positions: np.ndarray, count: int, purpose: Purpose) -> Tensor:
        """[rows, count] float64 in [0, 1), see `numbers`."""


class Purpose(IntEnum):
    """The use that numbers are put to; those of different purposes are independent."""

    DRAFT = 0  # draw j samples draft token j of a step
    VERIFY = 1  # draw 0 samples the recovered or bonus token, draw 1 + j decides about draft token j


class RowStreams:
    """One random stream for every row of the caller's batch.

    seed: an int s, and row i uses the stream (s, i); or one int per row, and row i uses the stream (seed[i], 0), which
        it would use alone under seed[i], so that rows permuted together with their seeds draw the same numbers.
        Seeds count modulo 2^64.
    num_rows: rows of the caller's batch; None if the number is not known yet.
    device: where `uniforms` puts its numbers. They are computed on the host, which knows a step's rows and lengths: on
        the device some seventy launches for a few numbers per row would take longer than the step may cost.
    """

    def __init__(self, seed: int | Sequence[int], num_rows: int | None, device: torch.device | str = "cpu"):
        self.is_shared = not isinstance(seed, Sequence)
        seeds = [int(s) for s in seed] if isinstance(seed, Sequence) else [int(seed)]
        if not self.is_shared and num_rows is not None and len(seeds) != num_rows:
            raise ConfigError(f"seed has {len(seeds)} entries for {num_rows} rows; give one int, or one per row")
        words = [[s & 0xFFFFFFFF for s in seeds], [s >> 32 & 0xFFFFFFFF for s in seeds]]
        self.keys = np.array(words, dtype=np.uint64)  # [2, seeds]
        self.device = torch.device(device)

    def uniforms(self, row_ids: np.ndarray, positions: np.ndarray, count: int, purpose: Purpose) -> Tensor:
        """[rows, count] float64 in [0, 1), multiples of 2^-53; a function of (seed, row, position, purpose, draw).

        row_ids: [rows] int64 on the host, indices into the caller's batch. positions: see `numbers`.
        """
        keys = self.keys[:, :1] if self.is_shared else self.keys[:, row_ids]
        streams = row_ids if self.is_shared else np.zeros_like(row_ids)
        return numbers(keys, streams, positions, count, purpose, self.device)


class RequestStreams:
    """The random stream of every request: a seed, and which of the seed's streams it is."""

    def __init__(self, device: torch.device):
        self.device = device
        self._of_row: dict[int, tuple[int, int, int]] = {}

    def add(self, row_id: int, seed: int, stream: int = 0) -> None:
        """seed: modulo 2^64. stream: 0 .. 2^32 - 1."""
        self._of_row[row_id] = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, stream

    def drop(self, row_id: int) -> None:
        self._of_row.pop(row_id, None)

    def uniforms(self, row_ids: np.ndarray, positions: np.ndarray, count: int, purpose: Purpose) -> Tensor:
        """[rows, count] float64 in [0, 1); those of rows without a stream are not random, and nobody uses them."""
        words = np.array([self._of_row.get(row, (0, 0, 0)) for row in row_ids.tolist()], dtype=np.uint64)
        words = words.reshape(-1, 3).T
        return numbers(words[:2], words[2], positions, count, purpose, self.device)


def numbers(
    keys: np.ndarray, streams: np.ndarray, positions: np.ndarray, count: int, purpose: Purpose, device: torch.device
) -> Tensor:
    """[rows, count] float64 in [0, 1), multiples of 2^-53.

    keys: [2, rows or 1] uint64, the words of the seeds. streams: [rows] integers.
    positions: [rows] int64 on the host, 0 .. 2^32 - 1: each row's committed length where the step starts. Lengths
        only grow, so every step has numbers of its own. The place of each single token will not do: a place after
        a rejection is drafted again in the next step, and block verification has looked at its number already.
    """
    counter = np.empty((4, len(streams), count), dtype=np.uint64)
    counter[0] = np.arange(count, dtype=np.uint64)
    counter[1] = np.asarray(positions)[:, None]
    counter[2] = streams.astype(np.uint64)[:, None]
    counter[3] = int(purpose)
    words = philox(counter, keys[:, :, None])
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    values = torch.from_numpy(bits * 2.0**-53)
    if device.type == "cuda":  # a copy from other memory would wait for all work queued on the device
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 on 32-bit words held in uint64. counter: [4, ...]; key: [2, ...]; returns [4, ...]."""
    shape = (2,) + (1,) * (counter.ndim - 1)
    multipliers, key_steps = MULTIPLIERS.reshape(shape), KEY_STEPS.reshape(shape)
    even, odd = counter[0::2], counter[1::2]
    for _ in range(NUM_ROUNDS):
        product = even * multipliers
        even, odd = (product >> HALF)[::-1] ^ odd ^ key, (product & WORD)[::-1]
        key = (key + key_steps) & WORD
    return np.stack([even[0], odd[0], even[1], odd[1]])
