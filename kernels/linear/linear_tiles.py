"""Tiles of the in-order linear, per number of rows and shape. They change its speed, not its bits."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """block_rows x block_out of the result per program, block_in of the inner dimension per step.

    swapped: the weights are the left operand, which suits few rows. num_stages: loads in flight.
    """

    block_rows: int
    block_out: int
    block_in: int
    swapped: bool
    num_stages: int
    num_warps: int


# Largest number of rows for each column of the tables; the last column also serves all larger numbers.
BUCKETS = (16, 32, 64, 128, 256, 1024)
# A float32 product runs on the ordinary cores, where a small tile is as good as any.
FLOAT32 = Tile(16, 32, 32, False, 2, 4)
# For untuned shapes: the tiles that suited most of the shapes below.
DEFAULTS = (
    Tile(16, 32, 256, True, 6, 4),
    Tile(64, 32, 256, False, 4, 4),
    Tile(64, 32, 256, False, 4, 4),
    Tile(64, 64, 128, True, 5, 4),
    Tile(128, 64, 64, False, 6, 8),
    Tile(128, 128, 64, False, 4, 8),
)
# (out, in): a tile per bucket, the fastest on an H200: tiles of the 8B shape's layers within a step, where launches
# overlap (`benchmarks/step_tuning.py`, 1 to 192 rows), the others alone (`benchmarks/invariance.py --parts speed`).
TUNED: dict[tuple[int, int], tuple[Tile, ...]] = {
    (6144, 4096): (
        Tile(16, 64, 128, True, 5, 4),
        Tile(32, 64, 128, True, 6, 4),
        Tile(64, 64, 128, True, 5, 4),
        Tile(128, 64, 128, True, 4, 8),
        Tile(128, 128, 64, True, 5, 8),
        Tile(128, 128, 64, False, 4, 8),
    ),
    (24576, 4096): (
        Tile(16, 64, 128, True, 3, 4),
        Tile(32, 64, 128, True, 3, 4),
        Tile(64, 64, 64, False, 4, 4),
        Tile(128, 64, 64, True, 3, 4),
        Tile(128, 128, 64, True, 6, 8),
        Tile(128, 128, 64, False, 4, 8),
    ),
    (4096, 4096): (
        Tile(16, 32, 256, True, 6, 4),
        Tile(64, 32, 256, False, 4, 4),
        Tile(64, 32, 256, False, 4, 4),
        Tile(64, 64, 128, False, 6, 4),
        Tile(64, 128, 128, False, 4, 8),
        Tile(128, 128, 64, False, 4, 8),
    ),
    (1024, 4096): (
        Tile(16, 16, 256, True, 4, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 64, 128, True, 4, 4),
    ),
    (12288, 4096): (
        Tile(16, 64, 128, True, 3, 4),
        Tile(32, 64, 128, True, 3, 4),
        Tile(64, 64, 64, False, 4, 4),
        Tile(128, 64, 64, True, 3, 4),
        Tile(128, 128, 64, True, 6, 8),
        Tile(128, 128, 64, False, 4, 8),
    ),
    (4096, 12288): (
        Tile(16, 32, 256, True, 6, 4),
        Tile(64, 32, 256, False, 4, 4),
        Tile(64, 32, 256, False, 4, 4),
        Tile(64, 64, 128, True, 5, 4),
        Tile(128, 64, 64, False, 6, 8),
        Tile(128, 128, 64, False, 4, 8),
    ),
    (151936, 4096): (
        Tile(16, 64, 128, True, 4, 4),
        Tile(32, 128, 128, True, 5, 8),
        Tile(64, 128, 128, False, 4, 8),
        Tile(128, 128, 64, False, 6, 8),
        Tile(256, 128, 64, True, 3, 8),
        Tile(256, 128, 64, False, 3, 8),
    ),
    (2048, 1024): (
        Tile(16, 16, 256, True, 6, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 64, 128, True, 4, 4),
        Tile(64, 64, 128, True, 4, 4),
        Tile(128, 64, 128, False, 3, 4),
    ),
    (1024, 1024): (
        Tile(16, 16, 256, True, 4, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 64, 128, True, 4, 4),
    ),
    (1024, 2048): (
        Tile(16, 16, 256, True, 4, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 64, 128, True, 4, 4),
    ),
    (3072, 1024): (
        Tile(16, 32, 256, True, 4, 4),
        Tile(64, 32, 128, False, 6, 4),
        Tile(64, 32, 128, False, 6, 4),
        Tile(128, 64, 128, False, 3, 8),
        Tile(128, 64, 128, False, 3, 8),
        Tile(128, 128, 64, False, 4, 8),
    ),
    (1024, 3072): (
        Tile(16, 16, 256, True, 4, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 64, 128, True, 4, 4),
    ),
    (151936, 1024): (
        Tile(16, 64, 128, True, 4, 4),
        Tile(64, 64, 128, True, 3, 4),
        Tile(64, 64, 128, True, 3, 4),
        Tile(256, 128, 64, True, 3, 8),
        Tile(256, 128, 64, True, 3, 8),
        Tile(256, 128, 64, False, 3, 8),
    ),
}


def choose_tile(num_rows: int, size_out: int, size_in: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return FLOAT32
    bucket = min(bisect_left(BUCKETS, num_rows), len(BUCKETS) - 1)
    return TUNED.get((size_out, size_in), DEFAULTS)[bucket]
