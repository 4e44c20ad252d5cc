"""The mixture of experts in invariance.py, at the small shape: exact on invariant modules, and not on stock ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from specdec.kernels.linear.expert_groups import rows_for

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def invariance(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("invariance")
    torch.set_num_threads(before)


def test_a_mixture_is_compared_on_stock_and_on_invariant_modules(invariance, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = "--device cpu --dtype float32 --parts moe --num-prompts 3 --max-new-tokens 4"
    invariance.main([*options.split(), "--output", str(out)])
    moe = json.loads(out.read_text())["moe"]
    config = moe["config"]
    assert config.get("num_local_experts", config.get("num_experts")) == 16  # by transformers' version
    assert all(entry["different"] == 0 for entry in moe["logits"]["invariant"])
    assert all(entry["different"] > 0 for entry in moe["logits"]["stock"])
    settings = [(e["who"], e["batch_size"], e["num_speculative_tokens"]) for e in moe["tokens"]["invariant"]]
    ours = [("specdec", 1, 0), ("specdec", 1, 5), ("specdec", 32, 0), ("specdec", 32, 5)]
    assert settings == [("transformers", 32, 0), *ours]
    assert [entry["who"] for entry in moe["tokens"]["stock"]] == ["transformers"]
    assert all(entry["num_equal"] == entry["num_prompts"] == 3 for entry in moe["tokens"]["invariant"])
    assert "moe tokens, invariant: 15 of 15 prompts equal in 5 settings" in capsys.readouterr().out


def test_every_number_of_tokens_has_tiles_to_choose_from(invariance):
    moe = importlib.import_module("invariance_moe")
    assert all(tile.block_rows == rows for rows, tiles in moe.CANDIDATES.items() for tile in tiles)
    assert {rows_for(8 * tokens, 128) for tokens in moe.TOKENS} <= set(moe.CANDIDATES)
