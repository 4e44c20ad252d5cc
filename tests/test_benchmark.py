"""The scripts in benchmarks/, on a tiny pair: they run, record and refuse."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from checkpoints import PROMPTS, save_checkpoint
from tiny import tiny_llama

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ARGUMENTS = ["--num-prompts", "2", "--max-new-tokens", "6", "--repeats", "2", "--batch-sizes", "1,2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pair of random models as it lies on disk."""
    root = tmp_path_factory.mktemp("models") / "tiny-pair"
    save_checkpoint(root / "target", tiny_llama(0))
    save_checkpoint(root / "draft", tiny_llama(1, num_hidden_layers=1))
    (root / "prompts.json").write_text(json.dumps(PROMPTS[:4]))
    return root


@pytest.fixture(scope="module")
def load():
    """Imports a module of benchmarks/, whose scripts find each other on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


def test_decode_measures_and_keeps_a_record(load, folder, tmp_path, capsys):
    out = tmp_path / "new" / "out.json"
    arguments = [
        "--models",
        str(folder),
        "--json",
        str(out),
        *ARGUMENTS,
        "--num-speculative-tokens",
        "2",
        "--profile",
    ]
    assert load("decode").main(arguments) == 0
    record = json.loads(out.read_text())
    # batch 1: plain, three assisted, two lookups, our plain, two drafters; batch 2: the same without the five
    assert sorted(entry["batch_size"] for entry in record["results"]) == [1] * 9 + [2] * 4
    assert record["command"].startswith("python decode.py --models tiny-pair --json out.json")
    assert str(folder.parent) not in out.read_text()
    printed = capsys.readouterr().out
    assert printed.count("\n| specdec draft_model | 1 | 2 |") == 4  # speed, latency, positions, stages


def test_layouts_shows_what_each_costs(load, folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    script = load("layouts")
    assert (
        script.main(["--models", str(folder), "--json", str(out), *ARGUMENTS, "--pools", "1,3", "--group-size", "2"])
        == 0
    )
    record = json.loads(out.read_text())
    ours = [entry for entry in record["results"] if entry["is_ours"]]
    assert [entry["options"]["layout"] for entry in ours] == ["ragged", "repad", "grouped"] * 2
    assert all(sum(entry["stages"]["share"].values()) == pytest.approx(1) for entry in ours)
    rates = {rate["pool"]: rate["grouping_rate"] for rate in record["grouping"]}
    assert rates[1] == 1.0 and 0 <= rates[3] <= 1  # one row always ends in one column
    assert "| specdec repad | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--batch-sizes 0", "--num-speculative-tokens 0", "--models nowhere"])
def test_wrong_arguments_are_refused_at_once(load, folder, wrong):
    with pytest.raises(SystemExit) as refused:
        load("decode").main(["--models", str(folder), "--num-prompts", "4", *wrong.split()])
    assert refused.value.code == 2
