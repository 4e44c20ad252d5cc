"""Time the in-order linear's tiles against the library's product, with weights read from memory, not the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.linear.in_order_linear import in_order_linear
from specdec.kernels.linear.linear_tiles import BUCKETS, Tile, choose_tile

# (out, in) of the layers of Qwen3-8B and Qwen3-0.6B; layers that share an input are listed together and apart.
SHAPES = {
    "8B qkv": (6144, 4096),
    "8B gate_up": (24576, 4096),
    "0.6B qkv": (4096, 1024),
    "0.6B gate_up": (6144, 1024),
    "8B q, o": (4096, 4096),
    "8B k, v": (1024, 4096),
    "8B gate, up": (12288, 4096),
    "8B down": (4096, 12288),
    "8B head": (151936, 4096),
    "0.6B q": (2048, 1024),
    "0.6B k, v": (1024, 1024),
    "0.6B o": (1024, 2048),
    "0.6B gate, up": (3072, 1024),
    "0.6B down": (1024, 3072),
    "0.6B head": (151936, 1024),
}


def described(*fields: int, parts: int = 1, persistent: int = 0, halves: bool = False, group: int = 8) -> Tile:
    """A tile whose operands come by tensor descriptors; fields: those of every tile."""
    return Tile(*fields, True, parts, persistent, halves, group)  # type: ignore[arg-type]


FEW_ROWS = [
    Tile(16, 16, 256, True, 4, 4),
    Tile(16, 16, 256, True, 6, 4),
    Tile(16, 16, 512, True, 4, 4),
    Tile(16, 32, 256, True, 6, 4),
    Tile(16, 64, 128, True, 3, 4),
    Tile(16, 64, 128, True, 5, 4),
    Tile(16, 64, 256, True, 3, 4),
    Tile(16, 128, 128, True, 4, 8),
    described(16, 32, 256, True, 8, 4, persistent=1),
    described(16, 64, 128, True, 5, 4),
    described(16, 64, 256, True, 5, 4, persistent=1),
    described(16, 128, 128, True, 5, 4, persistent=1),
    described(16, 128, 256, True, 3, 8, persistent=1),
]
MANY_ROWS = [
    Tile(128, 128, 64, False, 4, 8),
    described(64, 64, 128, False, 3, 4),
    described(128, 128, 64, False, 3, 4),
    described(128, 128, 64, False, 4, 4, persistent=1, halves=True),
    described(128, 128, 128, False, 3, 8, persistent=1, halves=True),
    described(128, 256, 64, False, 3, 8, persistent=1),
    described(128, 256, 64, False, 4, 8, persistent=1, halves=True),
    described(128, 256, 64, False, 4, 8, persistent=1, halves=True, group=16),
]
CANDIDATES = {
    1: FEW_ROWS,
    8: FEW_ROWS,
    32: [
        Tile(32, 64, 128, True, 3, 4),
        Tile(32, 64, 128, True, 6, 4),
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 32, 256, False, 4, 4),
        described(32, 32, 256, True, 6, 4, persistent=1),
        described(32, 64, 128, True, 4, 4),
        described(32, 64, 256, True, 4, 4, persistent=1),
        described(64, 32, 256, False, 4, 4),
    ],
    48: [
        Tile(64, 16, 128, False, 5, 4),
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 32, 256, False, 4, 4),
        Tile(64, 64, 64, False, 4, 4),
        Tile(64, 64, 128, True, 5, 4),
        described(32, 128, 64, True, 4, 4, parts=2),
        described(64, 32, 256, False, 4, 4),
        described(64, 64, 128, True, 4, 4),
        described(64, 128, 64, False, 4, 4),
    ],
    96: [
        Tile(64, 64, 128, True, 5, 4),
        Tile(64, 64, 128, False, 6, 4),
        Tile(128, 64, 64, True, 3, 4),
        Tile(128, 64, 128, True, 4, 8),
        described(32, 64, 128, True, 4, 4, parts=3),
        described(32, 128, 64, True, 4, 4, parts=3),
        described(64, 128, 64, False, 6, 4),
        described(128, 64, 64, False, 6, 4),
    ],
    192: [
        Tile(64, 32, 128, False, 5, 4),
        Tile(64, 128, 128, False, 4, 8),
        Tile(128, 64, 64, False, 6, 8),
        Tile(128, 128, 64, True, 6, 8),
        described(64, 64, 64, False, 6, 4, parts=3),
        described(64, 64, 64, True, 6, 4, parts=3),
        described(64, 128, 128, False, 4, 4),
        described(64, 128, 128, False, 4, 4, persistent=1),
        described(64, 128, 128, True, 4, 4),
        described(128, 128, 64, False, 6, 4),
    ],
    512: MANY_ROWS,
    1024: MANY_ROWS,
    4096: MANY_ROWS,
    16384: MANY_ROWS,
}
MOST_HEAD_ROWS = 512  # a prefill's logits are those of its last tokens
BEYOND_CACHE = 300_000_000  # bytes of weights to cycle through; the cache holds 60 MB


def tune(
    shapes: dict[str, tuple[int, int]],
    candidates: dict[int, Sequence[Tile]],
    log: Callable[[str], None],
    beyond_cache: int = BEYOND_CACHE,
) -> list[dict]:
    """One record per shape and number of rows: the table's tile, the best tile and the library, in microseconds."""
    records = []
    for name, (size_out, size_in) in shapes.items():
        generator = torch.Generator(device="cuda").manual_seed(0)
        copies = min(64, max(1, beyond_cache // (2 * size_out * size_in)))
        weights = [random((size_out, size_in), generator) / size_in**0.5 for _ in range(copies)]
        for rows, tiles in candidates.items():
            if name.endswith("head") and rows > MOST_HEAD_ROWS:
                continue
            x = random((rows, size_in), generator)
            expected = in_order_linear(x, weights[0])
            timed, different = [], 0
            for tile in tiles:
                different += (in_order_linear(x, weights[0], tile=tile) != expected).sum().item()
                timed.append((microseconds(lambda w, t=tile, x=x: in_order_linear(x, w, tile=t), weights), tile))
            best_us, best = min(timed)
            table_us = microseconds(lambda w, x=x: in_order_linear(x, w), weights)
            library_us = microseconds(lambda w, x=x: F.linear(x, w), weights)
            gb, tflop = 2e-9 * size_out * size_in, 2e-12 * rows * size_out * size_in
            records.append(
                {
                    "layer": name, "out": size_out, "in": size_in, "rows": rows, "best_tile": list(best),
                    "table_tile": list(choose_tile(rows, size_out, size_in, torch.bfloat16)),
                    "best_us": best_us, "table_us": table_us, "library_us": library_us,
                    "best_gb_s": gb / best_us * 1e6, "table_gb_s": gb / table_us * 1e6,
                    "library_gb_s": gb / library_us * 1e6, "library_over_best": library_us / best_us,
                    "best_tflop_s": tflop / best_us * 1e6, "library_tflop_s": tflop / library_us * 1e6,
                    "different_between_tiles": different,
                    "all_us": [[round(us, 2), list(tile)] for us, tile in timed],
                }
            )  # fmt: skip
            log(
                f"{name:14} rows {rows:5}: best {gb / best_us * 1e6:5.0f} GB/s {tflop / best_us * 1e6:4.0f} TFLOP/s "
                f"{tuple(best)}, table {best_us / table_us:.2f} of it, library {best_us / library_us:.2f}, "
                f"differing {different}"
            )
        del weights
    return records


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def microseconds(call: Callable[[Tensor], Tensor], weights: Sequence[Tensor], num_replays: int = 7) -> float:
    """Median time of one call, replayed as a graph that passes over all weights."""
    passes = max(1, 8 // len(weights))
    call(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for weight in weights:
                call(weight)
    graph.replay()
    times = []
    for _ in range(num_replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (passes * len(weights)))
    return statistics.median(times)


def table_source(records: Sequence[dict]) -> str:
    """The TUNED table of kernels/linear/linear_tiles.py from the best tiles, still to be formatted."""
    best: dict[tuple[int, int], dict[int, str]] = {}
    for record in records:
        best.setdefault((record["out"], record["in"]), {})[record["rows"]] = f"Tile{tuple(record['best_tile'])}"
    tiles = {shape: [found[serving(bucket, sorted(found))] for bucket in BUCKETS] for shape, found in best.items()}
    lines = [f"    {shape}: ({', '.join(found)},)," for shape, found in tiles.items()]
    return "\n".join(["TUNED: dict[tuple[int, int], tuple[Tile, ...]] = {", *lines, "}"])


def serving(bucket: int, tuned_rows: Sequence[int]) -> int:
    """The largest number of rows that was tuned within the bucket or below it; the smallest if there is none.

    >>> [serving(bucket, (1, 8, 48, 192, 512)) for bucket in (1, 16, 64, 256, 512)]
    [1, 8, 48, 192, 512]
    """
    return max((rows for rows in tuned_rows if rows <= bucket), default=min(tuned_rows))
