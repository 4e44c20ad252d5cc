"""The grid of the GPU benchmark: which cells, which are left, what is moved, where a step's time goes; on a CPU."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from running_ahead import running_ahead
from tiny import tiny_llama

import specdec
from specdec import Speculation
from specdec.engine.target import Target
from specdec.network.choose import service_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def grid():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("gpu_grid")


@pytest.fixture(scope="module")
def timing(grid):
    return importlib.import_module("gpu_timing")


class FakeEvents:
    """One millisecond passes between two events."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        self.now += 1
        return FakeEvent(self.now)


class FakeEvent:
    def __init__(self, at):
        self.at = at

    def elapsed_time(self, other):
        return other.at - self.at


def test_selection(grid):
    cells = grid.select(["draft", "plain", "peer_assisted", "peer_static"], [8, 1], [4096, 512], [1, 3])
    short = [
        ("plain", 1, None), ("plain", 8, None), ("draft", 1, 1), ("draft", 1, 3), ("draft", 8, 1), ("draft", 8, 3),
        ("peer_static", 1, None), ("peer_static", 8, None), ("peer_assisted", 1, 5),
    ]  # fmt: skip
    found = [(cell.method, cell.batch_size, cell.num_speculative_tokens) for cell in cells]
    assert found == short + [cell for cell in short if cell[0] != "peer_static"]
    assert [cell.context for cell in cells] == [512] * 9 + [4096] * 7
    assert len(set(cells)) == len(cells)
    with pytest.raises(ValueError, match="unknown methods"):
        grid.select(["plian"], [1], [512], [1])


def test_measured_cells_are_not_run_again(grid):
    cells = grid.select(["plain", "draft"], [1], [512], [1, 3])
    done = [{**asdict(cells[1]), "tokens_per_second": 1.0}, {**asdict(cells[0]), "not_served": "memory"}]
    assert grid.missing(cells, done) == [cells[2]]


def test_bytes_moved(grid):
    """Against the sum over steps, written out."""
    model = tiny_llama()
    target = grid.traffic(model)
    config = model.config
    assert target.kv_per_token == 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    speculation = Speculation(num_target_calls=3, num_draft_calls=6, num_spec_steps=5)  # rows: 2, 2, 1
    draft = grid.Traffic(100, 10)
    expected = 3 * target.weights + 5 * 40 * target.kv_per_token + 6 * 100 + 6 * (5 / 3) * 40 * 10
    assert grid.bytes_moved(target, draft, speculation, 40) == pytest.approx(expected)
    assert grid.bytes_moved(target, None, speculation, 40) == pytest.approx(expected - 600 - 4000)


def test_stages_of_a_step(grid):
    """Between events: propose, gap, forward, commit, gap; the prefill's commit is no step's."""
    model, clock = tiny_llama(), grid.EventClock(FakeEvents())
    before = Target.forward
    with clock.installed():
        out = specdec.generate(
            model, torch.tensor([[5, 6, 7]]), drafter="prompt_lookup", num_speculative_tokens=2, max_new_tokens=6,
            return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip
    assert Target.forward is before
    steps = out.speculation.num_target_calls
    stages = [stage for stage, _ in clock.marks]
    proposals = stages.count("draft")
    assert stages.count("verify") == stages.count("commit") == steps and 0 < proposals <= steps
    ms = clock.ms_per_step()
    assert ms["verify"] == ms["commit"] == 1.0 and ms["draft"] == round(proposals / steps, 4)
    assert sum(ms.values()) * steps == pytest.approx(len(stages) - 1, rel=1e-3)


@pytest.mark.parametrize("drafter", ["prompt_lookup", "draft_model"])
def test_stages_of_what_is_launched_ahead(grid, drafter):
    """It is counted as what it is."""
    model, clock = tiny_llama(), grid.EventClock(FakeEvents())
    draft = drafter if drafter == "prompt_lookup" else model
    with specdec.batch_invariant(model):
        service_of(model)  # tried out before what networks return is overwritten
    with clock.installed(), specdec.batch_invariant(model), running_ahead() as counts:
        out = specdec.generate(
            model, torch.tensor([[5, 6, 7]]), drafter=draft, num_speculative_tokens=2, max_new_tokens=12,
            return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip
    stages = [stage for stage, _ in clock.marks]
    steps = out.speculation.num_target_calls
    assert stages.count("commit") == steps
    assert stages.count("verify") == steps + counts["begun"] - counts["used"]
    assert counts["drafts"] + counts["used"] > 1
    assert stages.count("draft") >= counts["drafts"] + counts["used"]


@pytest.fixture
def measured(grid, timing, tmp_path):
    """A grid over tiny models; prompts of 12 tokens."""

    def run(methods, path=tmp_path / "grid.json", draft=None):
        models = {"target": tiny_llama(), "draft": draft or tiny_llama(1)}
        for model in models.values():
            model.generation_config.eos_token_id = None
        prompts = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
        about = {
            "machine": {"gpu": "none"}, "versions": {}, "stand_ins": "tiny", "dtype": "float32", "new_tokens": 5,
            "command": "this", "git_sha": None, "git_dirty": None,
        }  # fmt: skip
        record = timing.Record.resumed(path, about)
        one = grid.Grid(models, lambda context: prompts[:, :context], 1e9, 5, 1, FakeEvents())
        cells = grid.select(methods, [1, 3], [12], [2])
        return grid.run_grid(cells, one, record), record.content

    return run


def test_a_grid_is_measured_once_and_resumed(grid, measured, monkeypatch):
    status, content = measured(["plain", "draft"])
    assert status == 0 and len(content["grid"]) == 4
    for entry in content["grid"]:
        rows = entry["batch_size"]
        assert entry["equal_to_plain"] == f"{rows}/{rows}" and entry["new_tokens"] == 5 * rows
        assert entry["tokens_per_second"] > 0 and entry["roofline_ratio"] > 0
        assert set(entry["stage_ms"]) == set(grid.EventClock.STAGES)
    ran = []
    original = grid.Grid.run
    monkeypatch.setattr(grid.Grid, "run", lambda self, cells, *more: (ran.extend(cells), original(self, cells, *more)))
    _, content = measured(["oracle", "plain", "draft", "lookup", "peer_plain", "peer_assisted", "peer_lookup"])
    peers = ["peer_plain", "peer_plain", "peer_assisted", "peer_lookup"]
    assert [cell.method for cell in ran] == [*peers, "oracle", "lookup", "lookup"]
    assert len(content["grid"]) == 11 and len(content["resumed_by"]) == 1
    (oracle,) = (entry for entry in content["grid"] if entry["method"] == "oracle")
    assert oracle["equal_to_transformers"] == "2/2"
    lines = grid.table(content["grid"]).splitlines()
    assert lines[0] == "| context | method | batch 1 | batch 3 |" and len(lines) == 2 + 6


def test_a_wrong_output_has_no_speed(grid, measured, monkeypatch):
    original = grid.timed_generate

    def wrong(model, ids, mask, **options):
        out, *seconds = original(model, ids, mask, **options)
        if options.get("drafter") is not None:
            out.sequences[-1, -1] += 1
        return out, *seconds

    monkeypatch.setattr(grid, "timed_generate", wrong)
    status, content = measured(["draft"])
    assert status == 2, "one row of each batch"
    assert [entry["equal_to_plain"] for entry in content["grid"]] == ["0/1", "2/3"]
    assert not any("tokens_per_second" in entry for entry in content["grid"])
    assert "differs" in grid.table(content["grid"])


def test_what_does_not_fit_is_recorded(grid, measured, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(grid, "timed_generate", full)
    status, content = measured(["plain"])
    assert status == 0 and all("tried to allocate" in entry["not_served"] for entry in content["grid"])
    assert "does not fit" in grid.table(content["grid"])


def test_no_cell_is_begun_behind_the_deadline(grid, timing, tmp_path):
    record = timing.Record(tmp_path / "grid.json", {})
    grid.Grid({}, lambda context: None, 1e9, 5, 1).run(grid.select(["plain"], [1], [12], []), record, deadline=0.0)
    assert not record.content


def test_another_gpu_needs_another_record(timing, tmp_path):
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"machine": {"gpu": "one"}, "versions": {}}))
    with pytest.raises(SystemExit, match="pass another --out"):
        timing.Record.resumed(path, {"machine": {"gpu": "other"}, "versions": {}})
