"""Random numbers that belong to a row: the same whatever its batch, its slot or what other rows have drawn.

A stateless generator, Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 bits of
counter and 64 bits of key in, 128 random bits out. The key is the seed; the counter holds the row, a position in its
sequence, a purpose and the number of the draw, so that no two draws share a counter and nothing needs to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError

WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
NUM_ROUNDS = 10


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

        row_ids: [rows] int64 on the host, indices into the caller's batch.
        positions: [rows] int64 on the host, 0 .. 2^32 - 1: each row's committed length where the step starts. Lengths
            only grow, so every step has numbers of its own. The place of each single token will not do: a place after
            a rejection is drafted again in the next step, and block verification has looked at its number already.
        """
        counter = np.empty((4, len(row_ids), count), dtype=np.uint64)
        counter[0] = np.arange(count, dtype=np.uint64)
        counter[1] = np.asarray(positions)[:, None]
        counter[2] = row_ids.astype(np.uint64)[:, None] if self.is_shared else 0
        counter[3] = int(purpose)
        keys = self.keys[:, :1, None] if self.is_shared else self.keys[:, row_ids, None]
        words = philox(counter, keys)
        bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
        numbers = torch.from_numpy(bits * 2.0**-53)
        if self.device.type == "cuda":  # a copy from other memory would wait for all work queued on the device
            numbers = numbers.pin_memory()
        return numbers.to(self.device, non_blocking=True)


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
