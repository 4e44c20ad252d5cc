"""Tiles of the in-order linear, per number of rows and shape. They change its speed, not its bits."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """block_rows x block_out of the result per program, block_in of the inner dimension per step.

    swapped: the weights are the left operand, which suits few rows. num_stages: loads in flight.

    descriptors: operands come by tensor descriptors (`descriptor_linear`), where they can; the rest is for these only.
    parts: blocks of rows per program, which share each tile of weights. persistent: programs per processor, each with
    many tiles; 0: a program per tile. halves: the result leaves in two halves. group: row blocks (of all parts) that
    share a pass over the weights while it is in the cache.
    """

    block_rows: int
    block_out: int
    block_in: int
    swapped: bool
    num_stages: int
    num_warps: int
    descriptors: bool = False
    parts: int = 1
    persistent: int = 0
    halves: bool = False
    group: int = 8


# Largest number of rows for each column of the tables. Without a column (more rows, a shorter tuple): `_of_many_rows`.
BUCKETS = (4, 16, 32, 64, 96, 128, 192, 256, 512)
# A float32 product runs on the ordinary cores, where a small tile is as good as any.
FLOAT32 = Tile(16, 32, 32, False, 2, 4)
# For untuned shapes: the tiles that suited most of the shapes below.
DEFAULTS = (
    Tile(16, 32, 256, True, 6, 4),
    Tile(16, 32, 256, True, 6, 4),
    Tile(64, 32, 256, False, 4, 4),
    Tile(64, 32, 256, False, 4, 4),
    Tile(64, 64, 128, True, 5, 4),
    Tile(64, 64, 128, True, 5, 4),
    Tile(64, 128, 128, False, 4, 4, True),
    Tile(128, 64, 64, False, 6, 8),
)
# For many rows, whatever the shape: tiles and the time that a wave of them takes, relative to one another.
PROCESSORS = 132
MANY_ROWS = (
    (Tile(128, 256, 64, False, 3, 8, True, 1, 1), 2.0),
    (Tile(128, 128, 64, False, 4, 4, True, 1, 1, True), 1.07),
    (Tile(64, 64, 128, False, 3, 4, True), 0.45),
)
# Where operands or GPU do not allow descriptors: a tile per bucket of its own.
POINTER_BUCKETS = (16, 64, 128, 256, 1024)
POINTER_TILES = (
    Tile(16, 32, 256, True, 6, 4),
    Tile(64, 32, 256, False, 4, 4),
    Tile(64, 64, 128, True, 5, 4),
    Tile(128, 64, 64, False, 6, 8),
    Tile(128, 128, 64, False, 4, 8),
)
# (out, in): a tile per bucket, the fastest on an H200: for layers of Qwen3-8B and 0.6B within a chain of layers, where
# launches overlap, for the others alone (`benchmarks/results/linear-tuning-h200-2026-11-28.json`).
TUNED: dict[tuple[int, int], tuple[Tile, ...]] = {
    (6144, 4096): (
        Tile(16, 128, 128, True, 5, 4, True, 1, 1),
        Tile(16, 64, 128, True, 5, 4),
        Tile(32, 64, 128, True, 6, 4),
        Tile(64, 64, 128, True, 5, 4),
        Tile(32, 64, 128, True, 4, 4, True, 3),
        Tile(128, 64, 64, False, 6, 4, True),
        Tile(64, 64, 64, False, 6, 4, True, 3),
        Tile(128, 128, 64, True, 5, 8),
        Tile(128, 256, 64, False, 4, 8, True, 1, 1, True),
    ),
    (24576, 4096): (
        Tile(16, 64, 128, True, 3, 4),
        Tile(16, 64, 128, True, 3, 4),
        Tile(32, 64, 128, True, 3, 4),
        Tile(64, 64, 64, False, 4, 4),
        Tile(32, 128, 64, True, 4, 4, True, 3),
        Tile(128, 64, 64, True, 3, 4),
        Tile(64, 64, 64, True, 6, 4, True, 3),
        Tile(128, 128, 64, True, 6, 8),
        Tile(128, 256, 64, False, 4, 8, True, 1, 1, True),
    ),
    (4096, 4096): (
        Tile(16, 32, 256, True, 6, 4),
        Tile(16, 32, 256, True, 6, 4),
        Tile(64, 32, 256, False, 4, 4),
        Tile(64, 32, 256, False, 4, 4),
        Tile(64, 64, 128, True, 5, 4),
        Tile(128, 32, 128, False, 4, 4, True),
        Tile(64, 128, 128, True, 4, 4, True),
        Tile(64, 128, 128, True, 4, 4, True),
    ),
    (1024, 4096): (
        Tile(16, 16, 256, True, 4, 4),
        Tile(16, 16, 256, True, 4, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
    ),
    (12288, 4096): (
        Tile(16, 64, 128, True, 3, 4),
        Tile(16, 64, 128, True, 3, 4),
        Tile(32, 64, 128, True, 3, 4),
        Tile(64, 64, 64, False, 4, 4),
        Tile(128, 64, 64, True, 3, 4),
        Tile(128, 64, 64, True, 3, 4),
        Tile(128, 128, 64, True, 6, 8),
        Tile(128, 128, 64, True, 6, 8),
    ),
    (4096, 12288): (
        Tile(16, 32, 256, True, 6, 4),
        Tile(16, 32, 256, True, 6, 4),
        Tile(64, 32, 256, False, 4, 4),
        Tile(64, 32, 256, False, 4, 4),
        Tile(64, 64, 128, True, 5, 4),
        Tile(64, 64, 128, True, 5, 4),
        Tile(64, 128, 128, False, 4, 4, True, 1, 1),
        Tile(64, 128, 128, False, 4, 4, True, 1, 1),
    ),
    (151936, 4096): (
        Tile(16, 64, 128, True, 4, 4),
        Tile(16, 64, 128, True, 4, 4),
        Tile(32, 128, 128, True, 5, 8),
        Tile(64, 128, 128, False, 4, 8),
        Tile(128, 128, 64, False, 6, 8),
        Tile(128, 128, 64, False, 6, 8),
        Tile(64, 64, 64, True, 6, 4, True, 3),
        Tile(256, 128, 64, True, 3, 8),
    ),
    (4096, 1024): (
        Tile(16, 16, 256, True, 6, 4),
        Tile(16, 32, 256, True, 6, 4),
        Tile(32, 64, 256, True, 4, 4, True, 1, 1),
        Tile(64, 64, 128, True, 4, 4, True),
        Tile(64, 64, 128, True, 5, 4),
        Tile(64, 64, 128, True, 5, 4),
        Tile(128, 64, 64, False, 6, 8),
        Tile(128, 64, 64, False, 6, 8),
    ),
    (6144, 1024): (
        Tile(16, 64, 128, True, 3, 4),
        Tile(16, 128, 256, True, 3, 8, True, 1, 1),
        Tile(32, 64, 128, True, 4, 4, True),
        Tile(64, 64, 128, True, 4, 4, True),
        Tile(64, 64, 128, True, 5, 4),
        Tile(64, 64, 128, True, 5, 4),
        Tile(64, 128, 64, True, 4, 4, True),
        Tile(64, 128, 64, True, 4, 4, True),
        Tile(128, 128, 64, False, 3, 4, True),
    ),
    (2048, 1024): (
        Tile(16, 16, 256, True, 6, 4),
        Tile(16, 16, 256, True, 6, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 64, 128, True, 4, 4),
        Tile(64, 64, 128, True, 4, 4),
        Tile(64, 64, 128, True, 4, 4),
        Tile(64, 64, 128, True, 4, 4),
    ),
    (1024, 1024): (
        Tile(16, 16, 256, True, 4, 4),
        Tile(16, 16, 256, True, 4, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
    ),
    (3072, 1024): (
        Tile(16, 32, 256, True, 4, 4),
        Tile(16, 32, 256, True, 4, 4),
        Tile(64, 32, 128, False, 6, 4),
        Tile(64, 32, 128, False, 6, 4),
        Tile(128, 64, 128, False, 3, 8),
        Tile(128, 64, 128, False, 3, 8),
        Tile(128, 64, 128, False, 3, 8),
        Tile(128, 64, 128, False, 3, 8),
    ),
    (1024, 2048): (
        Tile(16, 16, 512, True, 4, 4),
        Tile(16, 16, 512, True, 4, 4),
        Tile(32, 64, 256, True, 4, 4, True, 1, 1),
        Tile(64, 32, 256, False, 4, 4, True),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 64, 128, True, 4, 4),
    ),
    (1024, 3072): (
        Tile(16, 64, 256, True, 5, 4, True, 1, 1),
        Tile(16, 64, 256, True, 5, 4, True, 1, 1),
        Tile(32, 64, 256, True, 4, 4, True, 1, 1),
        Tile(64, 32, 256, False, 4, 4, True),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 64, 128, True, 4, 4),
    ),
    (151936, 1024): (
        Tile(16, 128, 256, True, 3, 4, True, 1, 1),
        Tile(16, 128, 256, True, 3, 4, True, 1, 1),
        Tile(32, 64, 256, True, 4, 4, True, 1, 1),
        Tile(64, 128, 64, False, 4, 4, True, 1, 2),
        Tile(256, 128, 64, True, 3, 8),
        Tile(256, 128, 64, True, 3, 8),
        Tile(256, 128, 64, True, 3, 8),
        Tile(256, 128, 64, True, 3, 8),
    ),
}


def choose_tile(num_rows: int, size_out: int, size_in: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return FLOAT32
    tiles, bucket = TUNED.get((size_out, size_in), DEFAULTS), bisect_left(BUCKETS, num_rows)
    return tiles[bucket] if bucket < len(tiles) else _of_many_rows(num_rows, size_out)


def _of_many_rows(num_rows: int, size_out: int) -> Tile:
    """The tile whose waves over all processors take the least time."""

    def time(entry: tuple[Tile, float]) -> float:
        tile, wave = entry
        num_tiles = -(-num_rows // tile.block_rows) * -(-size_out // tile.block_out)
        return -(-num_tiles // PROCESSORS) * wave

    return min(MANY_ROWS, key=time)[0]


def fitted(tile: Tile, itemsize: int, shared_memory: int) -> Tile:
    """With as many loads in flight as shared memory holds. The tables are of GPUs that have much of it; most others
    have less than half."""
    most = shared_memory // (itemsize * tile.block_in * (tile.block_rows + tile.block_out))
    return tile._replace(num_stages=max(1, min(tile.num_stages, most)))


def pointer_tile(num_rows: int, dtype: torch.dtype) -> Tile:
    """Instead of a tile of descriptors, where the operands or the GPU do not allow them."""
    if dtype == torch.float32:
        return FLOAT32
    return POINTER_TILES[min(bisect_left(POINTER_BUCKETS, num_rows), len(POINTER_TILES) - 1)]
