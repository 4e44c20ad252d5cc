"""The benchmark of CPU steps: its record holds every cell, and it times nothing whose logits are wrong."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

from specdec.network.fused import FusedNetwork

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("cpu_step")
    monkeypatch.setattr(script, "smollm2", tiny_llama)
    monkeypatch.setattr(script, "MEMORY_BYTES", 2**18)
    return script


def test_record_of_every_cell(script, tmp_path, capsys):
    assert script.main(["--repeats", "2", "--context", "9", "--out", str(tmp_path / "step.json")]) == 0
    record = json.loads((tmp_path / "step.json").read_text())
    cells = [(cell["network"], cell["rows"], cell["width"]) for cell in record["cells"]]
    assert sorted(cells) == sorted((kind, *cell) for kind in ("native", "torch", "modules") for cell in script.CELLS)
    # two layers: qkv, out, gate and up, down; and the head
    weights = 4 * (2 * (64 * 32 + 32 * 32 + 3 * 64 * 32) + 61 * 32)
    for cell in record["cells"]:
        assert cell["bytes"] == weights and 0 < cell["least_ms"] <= cell["median_ms"]
        assert cell["gb_per_s"] == pytest.approx(weights / cell["least_ms"] / 1e6, rel=0.02, abs=0.01)
    assert all(speed > 0 for speed in record["memory_gb_per_s"].values()) and record["machine"]["processor"]
    assert "| 8 x 6 | native |" in capsys.readouterr().out


def test_a_step_with_other_logits_is_not_timed(script, monkeypatch):
    logits = FusedNetwork._logits
    monkeypatch.setattr(script.FusedNetwork, "_logits", lambda self, hidden, rows: 1.01 * logits(self, hidden, rows))
    with pytest.raises(SystemExit, match="logits of the"), torch.no_grad():
        script.main(["--repeats", "1", "--context", "9"])


def test_without_a_native_step(script, monkeypatch):
    monkeypatch.setattr(script, "library", lambda: None)
    with pytest.raises(script.ConfigError, match="no native step"):
        script.main([])
