"""Tune the in-order linear's tiles within a decode step, where launches overlap and another tile may be best.

A model of random weights and few layers takes captured steps. The tile of one product after another is replaced, the
step captured again, its replays timed and the fastest tile kept. Then the overlap of launches is varied, and the tiles
once more. Every step's output must have the same bits as the first. The head is timed separately. Other processes
compile tiles in advance; tiles that remain when their cell's share of the time is spent are skipped, and the record
says how many were tried.

    python benchmarks/step_tuning.py --seconds 280 --out tuning.json
    python benchmarks/step_tuning.py --table tuning.json other.json    # the table of kernels/linear/linear_tiles.py, no
    GPU
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import linear_tuning
import torch
from gpu_timing import Record, library_linears
from stand_in import SHAPES, Shape
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from specdec.batch.columns import Columns
from specdec.files.environment import environment
from specdec.kernels import overlap
from specdec.kernels.linear import descriptor_linear, in_order_linear
from specdec.kernels.linear.linear_tiles import BUCKETS as BUCKETS_TODAY
from specdec.kernels.linear.linear_tiles import DEFAULTS, TUNED, Tile, choose_tile
from specdec.network.base import NetworkOutput
from specdec.network.captured.graphs import StepGraphs, row_bucket, width_bucket
from specdec.network.invariant import layers as invariant_layers
from specdec.network.invariant.network import InvariantForward

CELLS = "1x1,8x1,32x1,8x6,32x4,32x6"
LAYERS = {"8B": 6, "0.6B": 12}  # enough layers that the weights exceed the cache
BUCKETS = "4,16,32,64,96,128,192,256,512"
CONTEXT = 512
SHARED_BYTES = 227 * 1024  # shared memory that a program may use
ACCUMULATORS = 128  # per thread
NUM_FINALISTS = 2
KERNELS = ((in_order_linear, "_in_order_linear_kernel"), (descriptor_linear, "_descriptor_linear_kernel"))
SECOND_PASS = 6  # number of the best tiles of the first pass that the second tries again
LEAST_GAIN = 0.002  # of the step's time; less is noise


class Product(NamedTuple):
    """One launch: its columns and inner dimension, and the number of weights it reads."""

    size_out: int
    size_in: int
    num_weights: int


@dataclass(frozen=True)
class Setting:
    """tiles: by product. overlap: whether a launch may start before the previous one has ended."""

    tiles: dict[str, Tile]
    overlap: bool = True


class Kernel(NamedTuple):
    """Everything a compilation depends on."""

    num_weights: int
    tile: Tile
    overlap: bool


class Tried(NamedTuple):
    ms: float
    setting: Setting


# A step under a setting: its milliseconds and its output; None if the device cannot run the setting.
Measure = Callable[[Setting], tuple[float, Tensor] | None]


def layer_products(shape: Shape) -> dict[str, Product]:
    """The products of a layer, the longest first."""
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "gate_up": Product(2 * shape.intermediate_size, shape.hidden_size, 2),
        "down": Product(shape.hidden_size, shape.intermediate_size, 1),
        "qkv": Product(heads + 2 * kv_heads, shape.hidden_size, 3),
        "o": Product(shape.hidden_size, heads, 1),
    }


def head_products(shape: Shape) -> dict[str, Product]:
    return {"head": Product(shape.vocab_size, shape.hidden_size, 1)}


def table_setting(products: dict[str, Product], rows: int) -> Setting:
    """The package's own setting."""
    tiles = {name: choose_tile(rows, p.size_out, p.size_in, torch.bfloat16) for name, p in products.items()}
    return Setting(tiles)


def candidates(rows: int) -> list[Tile]:
    """The tiles of `linear_tuning.py` first, then a grid in shuffled order, so that any part of it covers it evenly."""
    nearest = min(linear_tuning.CANDIDATES, key=lambda column: abs(math.log(column / rows)))
    known = list(linear_tuning.CANDIDATES[nearest])
    if rows <= 16:
        block_rows, ways, outs, inners = (16,), (True,), (16, 32, 64, 128), (64, 128, 256, 512)
    elif rows <= 64:
        block_rows, ways, outs, inners = (32, 64), (True, False), (16, 32, 64, 128), (64, 128, 256)
    else:
        block_rows, ways, outs, inners = (64, 128, 256), (True, False), (32, 64, 128), (64, 128)
    grid = [Tile(*fields) for fields in itertools.product(block_rows, outs, inners, ways, (3, 4, 5, 6), (4, 8))]
    grid = [tile for tile in grid if is_sensible(tile, rows) and tile not in known]
    random.Random(0).shuffle(grid)
    return known + grid


def is_sensible(tile: Tile, rows: int) -> bool:
    """Whether the tile fits the device, keeps it busy, and is at least half full."""
    left, right = (tile.block_out, tile.block_rows) if tile.swapped else (tile.block_rows, tile.block_out)
    in_flight = tile.num_stages * tile.block_in * 2
    if in_flight * (left + right) > SHARED_BYTES or left * right > ACCUMULATORS * 32 * tile.num_warps:
        return False
    if rows > 16 and left < 64:  # the tensor cores' fast instruction takes 64 rows on the left
        return False
    if tile.num_warps == 8 and left * right < 64 * 32 and tile.block_out < 64:
        return False
    if tile.block_rows > max(64, 2 * rows - 1) or (rows > 32 and tile.block_rows < 64):
        return False
    return in_flight * tile.block_out >= 16 * 1024


@contextmanager
def applied(setting: Setting, products: dict[str, Product]) -> Iterator[None]:
    """Inside this context, launches use the setting."""
    tiles = {(p.size_out, p.size_in): setting.tiles[name] for name, p in products.items() if name in setting.tiles}

    def choose(num_rows: int, size_out: int, size_in: int, dtype: torch.dtype) -> Tile:
        return tiles.get((size_out, size_in)) or choose_tile(num_rows, size_out, size_in, dtype)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(in_order_linear, "choose_tile", choose))
        if not setting.overlap:
            stack.enter_context(mock.patch.object(overlap, "_can_overlap", lambda device: False))
        yield


class CompileOnly:
    """Replaces a kernel: compiles the code that a launch would run, and runs nothing that would disturb a timing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)


def compile_kernel(wanted: Kernel) -> str | None:
    """Run in a separate process: fill the compiler's cache. Returns the reason of a failure, or None."""
    from triton.errors import TritonError

    size = 1024  # any number divisible by 16 and by any inner block
    product = {"product": Product(size * wanted.num_weights, size, wanted.num_weights)}
    setting = Setting({"product": wanted.tile}, wanted.overlap)
    with ExitStack() as stack:
        stack.enter_context(applied(setting, product))
        for module, name in KERNELS:
            stack.enter_context(mock.patch.object(module, name, CompileOnly(getattr(module, name))))
        try:
            x, *weights = torch.empty(1 + wanted.num_weights, size, size, dtype=torch.bfloat16, device="cuda")
            in_order_linear.in_order_linears(x, weights, [None] * wanted.num_weights)
        except (TritonError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"[:200]
    return None


class Compiler:
    """Kernels compiled in advance, each once; requested kernels come before merely expected ones."""

    def __init__(
        self, new_executor: Callable[[], Executor], limit: int, compile: Callable[[Kernel], str | None] = compile_kernel
    ):
        """limit: kernels that the executor holds at once."""
        self.new_executor, self.limit, self.compile = new_executor, limit, compile
        self.executor = new_executor()
        self.expected: deque[Kernel] = deque()
        self.futures: dict[Kernel, Future] = {}

    def expect(self, kernels: Sequence[Kernel]) -> None:
        known = {*self.futures, *self.expected}
        self.expected.extend(kernel for kernel in dict.fromkeys(kernels) if kernel not in known)
        self._feed()

    def ready(self, kernels: Sequence[Kernel], deadline: float) -> Iterator[Kernel]:
        """Yields the kernels that compile, in the given order where available, until the deadline."""
        pending = list(dict.fromkeys(kernels))
        urgent = [kernel for kernel in pending if kernel not in self.futures]
        later = set(self.expected).difference(urgent)
        self.expected = deque([*urgent, *(kernel for kernel in self.expected if kernel in later)])
        while pending and time.monotonic() < deadline:
            self._feed()
            running = [self.futures[kernel] for kernel in pending if kernel in self.futures]
            done = next((kernel for kernel in pending if (f := self.futures.get(kernel)) and f.done()), None)
            if done is None:
                wait(running, min(0.2, max(0.0, deadline - time.monotonic())), FIRST_COMPLETED)
                continue
            pending.remove(done)
            problem = self._problem(done)
            if problem is None:
                yield done
            else:
                print("not compiled:", done, problem, flush=True)

    def close(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)

    def _feed(self) -> None:
        num_running = sum(not future.done() for future in self.futures.values())
        for _ in range(min(len(self.expected), self.limit - num_running)):
            kernel = self.expected.popleft()
            try:
                self.futures[kernel] = self.executor.submit(self.compile, kernel)
            except BrokenExecutor:
                self.executor = self.new_executor()
                self.futures[kernel] = self.executor.submit(self.compile, kernel)

    def _problem(self, kernel: Kernel) -> str | None:
        try:
            return self.futures[kernel].result()
        except BrokenExecutor as error:  # the compiler crashed its process
            return f"{type(error).__name__}: {error}"


class Descent:
    """Coordinate descent over the setting of one step."""

    def __init__(
        self, products: dict[str, Product], rows: int, measure: Measure, compiler: Compiler, label: str,
        tiles: Sequence[Tile],
    ):  # fmt: skip
        self.products, self.rows, self.measure, self.compiler, self.label = products, rows, measure, compiler, label
        self.tiles = {name: list(tiles) for name in products}
        self.tried: list[dict] = []
        self.different = 0
        first = table_setting(products, rows)
        found = measure(first)
        assert found is not None, f"{label}: the table's tiles do not run"
        self.expected = found[1].clone()
        self.table_ms = found[0]
        self.best = self.first_pass = Tried(found[0], first)
        self._say("table", first, found[0])

    def run(self, deadline: float) -> None:
        for second in (False, True):
            for index, name in enumerate(self.products):
                left = max(0.0, deadline - time.monotonic())
                # The second pass is short, and settings after the first need their share.
                shares = 3 if second else len(self.products) - index + 1
                self._vary_tile(name, time.monotonic() + left / shares)
            if second:
                break
            self.first_pass = self.best
            self._vary_overlap(deadline)

    def _vary_tile(self, name: str, deadline: float) -> None:
        setting = self.best.setting
        kernels = {kernel_of(self.products[name], setting, tile): tile for tile in self.tiles[name]}
        found = []
        for kernel in self.compiler.ready(list(kernels), deadline):
            tile = kernels[kernel]
            ms = self._time(replace(setting, tiles={**setting.tiles, name: tile}), f"{name} {tuple(tile)}")
            if ms is not None:
                found.append((ms, tile))
        found.sort()
        self.tiles[name] = [tile for _, tile in found[:SECOND_PASS]]
        self._choose([
            replace(setting, tiles={**setting.tiles, name: tile})
            for _, tile in found[:NUM_FINALISTS] if tile != setting.tiles[name]
        ])  # fmt: skip

    def _vary_overlap(self, deadline: float) -> None:
        setting = replace(self.best.setting, overlap=not self.best.setting.overlap)
        kernels = {kernel_of(self.products[name], setting, tile) for name, tile in setting.tiles.items()}
        compiled = len(list(self.compiler.ready(list(kernels), deadline))) == len(kernels)
        if compiled and self._time(setting, f"overlap {setting.overlap}") is not None:
            self._choose([setting])

    def _choose(self, finalists: list[Setting]) -> None:
        """Time the finalists and the best so far again, in turn."""
        if not finalists:
            return
        settings = [self.best.setting, *finalists]
        rounds = [[found[0] for s in settings if (found := self.measure(s))] for _ in range(3)]
        times = [statistics.median(column) for column in zip(*rounds, strict=True)]
        fastest = min(range(len(settings)), key=lambda index: times[index])
        if times[fastest] > times[0] * (1 - LEAST_GAIN):
            fastest = 0
        self.best = Tried(times[fastest], settings[fastest])
        self._say("kept", self.best.setting, self.best.ms)

    def _time(self, setting: Setting, what: str) -> float | None:
        found = self.measure(setting)
        if found is None:
            print(f"{self.label}: {what} does not fit the device", flush=True)
            return None
        ms, output = found
        same = torch.equal(output, self.expected)
        self.different += not same
        self.tried.append({"what": what, "ms": round(ms, 5), "same_bits": same})
        print(f"{self.label}: {what} {ms:.4f} ms{'' if same else ', OTHER BITS'}", flush=True)
        return ms if same else None

    def _say(self, what: str, setting: Setting, ms: float) -> None:
        tiles = {name: tuple(tile) for name, tile in setting.tiles.items()}
        print(f"{self.label}: {what} {ms:.4f} ms {tiles} {setting.overlap}", flush=True)

    def found(self) -> dict:
        return {
            "table_ms": round(self.table_ms, 5), "first_pass_ms": round(self.first_pass.ms, 5),
            "first_pass": asdict(self.first_pass.setting),
            "best_ms": round(self.best.ms, 5), "best": asdict(self.best.setting),
            "num_tried": len(self.tried), "different": self.different, "tried": self.tried,
        }  # fmt: skip


def kernel_of(product: Product, setting: Setting, tile: Tile) -> Kernel:
    return Kernel(product.num_weights, tile, setting.overlap)


def random_model(shape: Shape, num_layers: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        hidden_size=shape.hidden_size, num_hidden_layers=num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size, max_position_embeddings=4096, tie_word_embeddings=False, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


class Steps:
    """The steps of one model and cell, over a cache of random keys and values."""

    def __init__(self, model: Qwen3ForCausalLM, rows: int, width: int, context: int = CONTEXT):
        self.forward, self.used_slots = InvariantForward(model, rows, context + 256), context + width
        for layer in self.forward.cache.layers:
            layer.keys.normal_(), layer.values.normal_()
        self.ids = torch.randint(0, model.config.vocab_size, (rows, width), device=model.device)
        self.starts = torch.full((rows,), context, device=model.device)
        hidden_size = model.config.hidden_size
        self.hidden = torch.randn(rows, width, hidden_size, device=model.device, dtype=model.dtype)

    def layers(self, ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]) -> NetworkOutput:
        forward = self.forward
        step = forward.step_of(Columns.chain(starts, ids.shape[1]), used_slots)
        return NetworkOutput(forward.run(forward.embed(ids), step, slice(0, len(ids)), layers)[0], ())

    def head(self, ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]) -> NetworkOutput:
        with torch.no_grad():
            return NetworkOutput(self.forward.logits(self.forward.norm(self.hidden)), ())

    def measure(self, part: str, products: dict[str, Product], setting: Setting) -> tuple[float, Tensor] | None:
        """part: "layers", "head", or "forward" for both."""
        from triton.runtime.errors import OutOfResources

        with applied(setting, products):
            try:
                return replayed(getattr(self, part), self.forward, self.ids, self.starts, self.used_slots)
            except OutOfResources:
                return None


def replayed(
    step: Callable, forward: InvariantForward, ids: Tensor, starts: Tensor, used_slots: int
) -> tuple[float, Tensor]:
    """The median milliseconds of several replays of the captured step, and its output."""
    graphs = StepGraphs(forward.cache)
    output = graphs.replay(step, ids, starts, used_slots, ()).logits
    (captured,) = graphs.captured.values()
    return replay_ms(captured.graph), output


def replay_ms(graph: torch.cuda.CUDAGraph, sample_ms: float = 4.0, samples: int = 5) -> float:
    def timed(count: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    count = max(1, round(sample_ms / timed(2)))
    return statistics.median(timed(count) for _ in range(samples))


def tune_cell(
    steps: Steps, name: str, shape: Shape, num_layers: int, cell: tuple[int, int], tiles: Sequence[Tile],
    compiler: Compiler, deadline: float,
) -> dict:  # fmt: skip
    """Tune both parts of a step, then compare ours with the library's products in the whole step."""
    rows = cell[0] * cell[1]
    entry: dict = {"model": name, "rows": cell[0], "width": cell[1], "total_rows": rows, "layers_timed": num_layers}
    products = {"layers": layer_products(shape), "head": head_products(shape)}
    best: dict[str, Tile] = {}
    settings = []
    for part, share in (("layers", 0.85), ("head", 1.0)):
        until = time.monotonic() + share * max(0.0, deadline - time.monotonic())
        measure = lambda setting, part=part: steps.measure(part, products[part], setting)  # noqa: E731
        descent = Descent(products[part], rows, measure, compiler, f"{name} {cell[0]}x{cell[1]} {part}", tiles)
        descent.run(until)
        entry[part] = descent.found()
        best.update(descent.best.setting.tiles)
        settings.append(descent.best.setting)
    entry["best_step_ms"], entry["table_step_ms"] = (
        round(entry["layers"][which] / num_layers * shape.num_layers + entry["head"][which], 4)
        for which in ("best_ms", "table_ms")
    )
    both = products["layers"] | products["head"]
    ours = replace(settings[0], tiles=best)
    entry["timed_layers_and_head"] = timed = {}
    for which, setting in (("table", table_setting(both, rows)), ("best", ours)):
        found = steps.measure("forward", both, setting)
        timed[which] = found and round(found[0], 5)
    with mock.patch.object(invariant_layers, "in_order_linears", library_linears):
        found = steps.measure("forward", both, ours)
        timed["library"] = found and round(found[0], 5)
    return entry


def summary(entry: dict) -> dict:
    """The entry without the list of everything tried."""
    shown = {key: value for key, value in entry.items() if key not in ("layers", "head")}
    for part in ("layers", "head"):
        shown[part] = {key: value for key, value in entry[part].items() if key != "tried"}
    return shown


def table_source(entries: Sequence[dict], buckets: Sequence[int]) -> str:
    """BUCKETS, DEFAULTS and TUNED of kernels/linear/linear_tiles.py, still to be formatted, preceded by the results per
    exact number of rows.

    A bucket takes the tile of the largest number of rows measured in it; otherwise it keeps its current tile.
    """
    found: dict[tuple[int, int], dict[int, Tile]] = {shape: {} for shape in TUNED}
    for entry in entries:
        shape = SHAPES[entry["model"]]
        for part, products in (("layers", layer_products(shape)), ("head", head_products(shape))):
            for name, tile in entry[part]["best"]["tiles"].items():
                product = products[name]
                place = found.setdefault((product.size_out, product.size_in), {})
                place[entry["total_rows"]] = Tile(*tile)
    lines = [
        f"# {shape}, {rows} rows: {tuple(tile)}"
        for shape, tiles in found.items()
        for rows, tile in sorted(tiles.items())
    ]
    columns = [bisect_left(BUCKETS_TODAY, high) for high in buckets]
    # Larger numbers of rows have no default tile: the package chooses by shape.
    defaults = ", ".join(f"Tile{tuple(DEFAULTS[column])}" for column in columns if column < len(DEFAULTS))
    lines += [
        f"BUCKETS = {tuple(buckets)}",
        f"DEFAULTS = ({defaults},)",
        "TUNED: dict[tuple[int, int], tuple[Tile, ...]] = {",
    ]
    for shape, tiles in found.items():
        lines.append(f"    {shape}: (")
        for low, high in zip((0, *buckets), buckets, strict=False):
            measured = [rows for rows in tiles if low < rows <= high]
            tile = tiles[max(measured)] if measured else choose_tile(high, *shape, torch.bfloat16)
            lines.append(f"        Tile{tuple(tile)},")
        lines.append("    ),")
    return "\n".join([*lines, "}"])


def parse_cells(text: str) -> list[tuple[int, int]]:
    """Rows and width, rounded up as captured steps are.

    >>> parse_cells("1x1,7x6")
    [(1, 1), (8, 6)]
    """
    cells = [cell.split("x") for cell in text.split(",")]
    return [(row_bucket(int(rows)), width_bucket(int(width))) for rows, width in cells]


def kernels_ahead(shape: Shape, rows: int, tiles: Sequence[Tile]) -> list[Kernel]:
    products = [*layer_products(shape).values(), *head_products(shape).values()]
    return [Kernel(p.num_weights, tile, True) for p in products for tile in tiles]


def run(arguments: argparse.Namespace, record: Record, compiler: Compiler) -> None:
    end = time.monotonic() + arguments.seconds
    names, cells = arguments.models.split(","), parse_cells(arguments.cells)
    tiles = {cell: candidates(cell[0] * cell[1])[: arguments.max_candidates] for cell in cells}
    for name, cell in itertools.product(names, cells):
        compiler.expect(kernels_ahead(SHAPES[name], cell[0] * cell[1], tiles[cell]))
    print(f"{len(compiler.futures) + len(compiler.expected)} kernels to compile", flush=True)
    left = len(names) * len(cells)
    for name in names:
        num_layers = min(LAYERS.get(name, 8), SHAPES[name].num_layers)
        model = random_model(SHAPES[name], num_layers, "cuda")
        # Captures collect garbage; freezing keeps the model's objects from being scanned each time.
        gc.collect(), gc.freeze()
        for cell in cells:
            deadline = time.monotonic() + (end - time.monotonic()) / left
            left -= 1
            steps = Steps(model, *cell)
            entry = tune_cell(steps, name, SHAPES[name], num_layers, cell, tiles[cell], compiler, deadline)
            record.add("cells", entry, shown=summary(entry))
            del steps
            torch.cuda.empty_cache()
        del model
        gc.unfreeze(), gc.collect(), torch.cuda.empty_cache()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8B,0.6B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--cells", default=CELLS, help="rows x width")
    parser.add_argument("--seconds", type=float, default=280, help="shared evenly among cells")
    parser.add_argument(
        "--max-candidates", type=int, help="tiles tried per product; by default all for which there is time"
    )
    parser.add_argument("--num-processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    parser.add_argument("--buckets", default=BUCKETS, help="of the printed table")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these records and do nothing else")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    buckets = [int(rows) for rows in arguments.buckets.split(",")]
    if arguments.table:
        cells = [cell for path in arguments.table for cell in json.loads(path.read_text())["cells"]]
        print(table_source(cells, buckets))
        return 0
    if arguments.out is None:
        parser.error("--out is needed unless --table is given")
    about = environment(torch.device("cuda"), ["benchmarks/step_tuning.py", *argv])
    record = Record(arguments.out, {**about, "dtype": "bfloat16", "context": CONTEXT})
    spawn = multiprocessing.get_context("spawn")
    compiler = Compiler(lambda: ProcessPoolExecutor(arguments.num_processes, spawn), 2 * arguments.num_processes)
    try:
        run(arguments, record, compiler)
    finally:
        compiler.close()
        print(table_source(record.content.get("cells", []), buckets), flush=True)
    return int(any(cell[part]["different"] for cell in record.content.get("cells", []) for part in ("layers", "head")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
