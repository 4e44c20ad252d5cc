"""The tuner of tiles within a step, with a clock of its own: what it keeps, what it refuses, what it prints."""

from __future__ import annotations

import importlib
import json
import time
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from specdec.kernels import overlap
from specdec.kernels.linear import in_order_linear
from specdec.kernels.linear.linear_tiles import BUCKETS, DEFAULTS, TUNED, Tile

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SLOW, FAST, WRONG, UNFIT = (Tile(16, out, 128, True, 4, 4) for out in (16, 32, 64, 128))


@pytest.fixture(scope="module")
def tuning():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("step_tuning")


@pytest.fixture
def compiler(tuning):
    made = tuning.Compiler(lambda: ThreadPoolExecutor(2), 4, lambda kernel: None)
    yield made
    made.close()


def soon() -> float:
    return time.monotonic() + 20


def test_descent_keeps_what_is_faster_and_nothing_of_other_bits(tuning, compiler):
    """It would keep WRONG, the fastest, if the outputs were not compared, and fail at UNFIT if it were not skipped."""
    products = {"a": tuning.Product(64, 64, 1), "b": tuning.Product(128, 64, 2)}

    def measure(setting):
        if UNFIT in setting.tiles.values():
            return None
        ms = sum({SLOW: 2.0, FAST: 1.0, WRONG: 0.1}.get(tile, 3.0) for tile in setting.tiles.values())
        ms += 0.2 if setting.overlap else 0.0
        return ms, torch.tensor([1.0 if WRONG in setting.tiles.values() else 0.0])

    descent = tuning.Descent(products, 8, measure, compiler, "test", [SLOW, UNFIT, WRONG, FAST])
    descent.run(soon())
    assert descent.best.setting == tuning.Setting({"a": FAST, "b": FAST}, False)
    found = json.loads(json.dumps(descent.found()))
    assert found["best_ms"] == 2.0 and found["table_ms"] == 6.2 and found["different"] == 2
    assert found["first_pass_ms"] == 2.2, "the tiles before anything else was varied"
    assert not any(
        "128" in tried["what"].split("(")[-1].split(",")[1] for tried in found["tried"] if "(" in tried["what"]
    )


def test_noise_does_not_change_the_setting(tuning, compiler):
    ms = iter(range(1000))

    def measure(setting):
        return 1 - 1e-6 * next(ms), torch.zeros(1)

    descent = tuning.Descent({"a": tuning.Product(64, 64, 1)}, 8, measure, compiler, "test", [SLOW, FAST])
    first = descent.best.setting
    descent.run(soon())
    assert descent.best.setting == first


def test_a_deadline_ends_the_descent(tuning, compiler):
    descent = tuning.Descent(
        {"a": tuning.Product(64, 64, 1)}, 8, lambda setting: (1.0, torch.zeros(1)), compiler, "test", [SLOW, FAST]
    )
    descent.run(time.monotonic())
    assert not descent.tried


def test_compiler_survives_a_process_that_its_compiler_took_along(tuning, capsys):
    class Broken(ThreadPoolExecutor):
        def submit(self, function, kernel):
            raise BrokenExecutor

    executors = iter([Broken(1), ThreadPoolExecutor(1)])
    compiled = []

    def compile(kernel):
        compiled.append(kernel)
        return "no registers" if kernel.tile == UNFIT else None

    compiler = tuning.Compiler(lambda: next(executors), 1, compile)
    kernels = [tuning.Kernel(1, tile, True) for tile in (SLOW, UNFIT, FAST)]
    compiler.expect(kernels[:1])
    assert list(compiler.ready([*kernels[1:], kernels[0]], soon())) == [kernels[0], kernels[2]]
    assert sorted(compiled) == sorted(kernels), "each is compiled once"
    assert "no registers" in capsys.readouterr().out
    lost: Future = Future()
    lost.set_exception(BrokenExecutor())
    compiler.futures[kernels[0]] = lost
    assert list(compiler.ready(kernels[:1], soon())) == []
    compiler.close()


@pytest.mark.parametrize("rows", [1, 8, 32, 48, 128, 192])
def test_candidates_are_many_distinct_and_fit_the_device(tuning, rows):
    tiles = tuning.candidates(rows)
    assert len(set(tiles)) == len(tiles) > 50
    for tile in tiles:
        assert tile.num_stages * tile.block_in * 2 * (tile.block_out + tile.block_rows) <= tuning.SHARED_BYTES
    if rows > 64:
        assert {tile.block_rows for tile in tiles} >= {64, 128}
    assert {tile.block_out for tile in tiles} >= {32, 64, 128}


def test_applied_reaches_the_launch_and_is_undone(tuning):
    before = in_order_linear.choose_tile, overlap._can_overlap
    setting = tuning.Setting({"a": FAST}, False)
    with tuning.applied(setting, {"a": tuning.Product(64, 32, 1)}):
        assert in_order_linear.choose_tile(3, 64, 32, torch.float32) == FAST
        assert in_order_linear.choose_tile(3, 65, 32, torch.bfloat16) != FAST
        assert overlap.overlap_options(torch.zeros(1)) == {"OVERLAP": False}
    assert before == (in_order_linear.choose_tile, overlap._can_overlap)


def tiny(tuning):
    return replace(
        tuning.SHAPES["tiny"], hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
        intermediate_size=48, vocab_size=64,
    )  # fmt: skip


@pytest.mark.interpreter
def test_a_cell_on_the_interpreter(tuning, compiler, monkeypatch):
    """All of a cell but the capture: the kernel runs with the tiles under trial, and the record holds the choice."""
    shape, launched, first, timed = tiny(tuning), [], {}, {}
    sizes = [(p.size_out, p.size_in) for p in (tuning.layer_products(shape) | tuning.head_products(shape)).values()]
    monkeypatch.setattr(
        tuning.invariant_layers, "in_order_linears",
        lambda x, weights, biases: in_order_linear.in_order_linears(x, weights, biases, "triton"),
    )  # fmt: skip
    launch = in_order_linear._in_order_linears_triton
    inner = in_order_linear.choose_tile

    def replayed(step, forward, ids, starts, used_slots):
        """Each choice of tiles and products runs once: the interpreter is slow, and this clock never differs."""
        tiles = tuple(in_order_linear.choose_tile(2, *size, torch.float32) for size in sizes)
        what = step, tiles, tuning.invariant_layers.in_order_linears
        if what not in timed:
            launched.clear()
            output = step(ids, starts, used_slots, ()).logits
            # Bits are a GPU's matter: on some CPUs numpy's products round by where their operands lie.
            torch.testing.assert_close(output, first.setdefault(step, output))
            timed[what] = 1.0 if fast in launched else 2.0
        return timed[what], first[step]

    def spy(x, weights, biases, tile):
        launched.append(in_order_linear.choose_tile(len(x), sum(map(len, weights)), x.shape[1], x.dtype))
        return launch(x, weights, biases, tile)

    small, fast = Tile(16, 16, 16, False, 2, 4), Tile(16, 32, 16, True, 2, 4)
    monkeypatch.setattr(in_order_linear, "_in_order_linears_triton", spy)
    monkeypatch.setattr(tuning, "replayed", replayed)
    monkeypatch.setattr(tuning, "table_setting", lambda products, rows: tuning.Setting(dict.fromkeys(products, small)))
    model = tuning.random_model(shape, 1, "cpu", torch.float32)
    entry = tuning.tune_cell(
        tuning.Steps(model, 2, 1, 5), "tiny", shape, 1, (2, 1), [small, fast], compiler, time.monotonic() + 300
    )
    assert entry["layers"]["different"] == entry["head"]["different"] == 0
    assert entry["head"]["best"]["tiles"] == {"head": fast}
    assert entry["best_step_ms"] == 3 * 1.0 + 1.0 and entry["table_step_ms"] == 8.0
    shown = tuning.summary(entry)
    assert entry["head"]["tried"] and "tried" not in shown["head"] and shown["head"]["best_ms"] == 1.0
    assert set(entry["timed_layers_and_head"]) == {"table", "best", "library"}
    assert in_order_linear.choose_tile is inner


def test_the_table_of_a_record(tuning, tmp_path, capsys):
    """Measured rows go to their bucket, the largest of several; all else stays what the package's table says."""

    def cell(rows, tile):
        shape = tuning.SHAPES["8B"]
        parts = {"layers": tuning.layer_products(shape), "head": tuning.head_products(shape)}
        best = {
            part: {"best": asdict(tuning.Setting(dict.fromkeys(products, tile)))} for part, products in parts.items()
        }
        return {"model": "8B", "total_rows": rows, **best}

    record = tmp_path / "record.json"
    record.write_text(json.dumps({"cells": [cell(32, SLOW), cell(48, FAST), cell(192, WRONG)]}))
    assert tuning.main(["--table", str(record), "--buckets", "16,64,192,512"]) == 0
    printed = capsys.readouterr().out
    names = {"Tile": Tile}
    exec(printed.replace(": dict[tuple[int, int], tuple[Tile, ...]]", ""), names)
    assert names["BUCKETS"] == (16, 64, 192, 512)
    assert names["DEFAULTS"] == tuple(DEFAULTS[BUCKETS.index(bucket)] for bucket in (16, 64, 192))
    old = TUNED[6144, 4096]
    assert names["TUNED"][6144, 4096] == (old[BUCKETS.index(16)], FAST, WRONG, old[BUCKETS.index(512)])
    assert names["TUNED"][2048, 1024][0] == TUNED[2048, 1024][BUCKETS.index(16)]
    assert f"# (6144, 4096), 32 rows: {tuple(SLOW)}" in printed


def test_a_run_shares_its_time_and_records_each_cell(tuning, monkeypatch, tmp_path, capsys):
    shares = []

    def tune_cell(steps, name, shape, num_layers, cell, tiles, compiler, deadline):
        shares.append(deadline - time.monotonic())
        setting = asdict(tuning.table_setting(tuning.layer_products(shape), cell[0] * cell[1]))
        part = {"best": {**setting, "tiles": {}}, "different": 0, "tried": [{"what": "hidden"}]}
        return {"model": name, "rows": cell[0], "total_rows": cell[0] * cell[1], "layers": part, "head": part}

    monkeypatch.setattr(tuning, "environment", lambda *arguments: {})
    monkeypatch.setattr(tuning, "random_model", lambda *arguments: None)
    monkeypatch.setattr(tuning, "Steps", lambda model, rows, width: None)
    monkeypatch.setattr(tuning, "tune_cell", tune_cell)
    monkeypatch.setattr(tuning, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(1))
    out = tmp_path / "tuning.json"
    arguments = ["--cells", "1x1,7x6", "--seconds", "4000", "--max-candidates", "2", "--out", str(out)]
    assert tuning.main([*arguments, "--num-processes", "1"]) == 0
    # each has what is left by an even share, and these take no time
    assert shares == pytest.approx([1000, 4000 / 3, 2000, 4000], rel=0.02)
    cells = json.loads(out.read_text())["cells"]
    assert [(cell["model"], cell["total_rows"]) for cell in cells] == [("8B", 1), ("8B", 48), ("0.6B", 1), ("0.6B", 48)]
    printed = capsys.readouterr().out
    assert "hidden" not in printed and "TUNED" in printed


def test_out_is_needed(tuning):
    with pytest.raises(SystemExit):
        tuning.main([])
