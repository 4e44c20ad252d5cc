"""The chain of layers that kernels are timed in, on a CPU: it computes what layers do, and its record holds all."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("layer_chain")
    tiny = script.Shape(32, 2, 4, 2, 8, 48, 64)
    monkeypatch.setitem(script.SHAPES, "tiny", tiny)
    monkeypatch.setitem(script.LAYERS, "tiny", 2)
    for name, value in {"DEVICE": "cpu", "DTYPE": torch.float32, "CONTEXT": 6, "PREFILL_LAYERS": 2}.items():
        monkeypatch.setattr(script, name, value)
    return script


@pytest.mark.parametrize("rows, width", [(2, 3), (1, 7)])
def test_both_products_run_the_same_layers(script, rows, width):
    """A step over cached tokens and a prefill; fails if a weight, an operand or a span is another in one of them."""
    chain = script.Chain(script.SHAPES["tiny"], 2, rows, width)
    assert chain.spans[0, :, 1].tolist() == [(0 if width > 6 else 6) + 1 + j for j in range(width)]
    ours, library = chain(script.in_order_linears), chain(script.library_linears)
    assert ours.shape == (rows, width, 32) and not torch.equal(ours, chain.x)
    torch.testing.assert_close(ours, library, rtol=1e-4, atol=1e-4)


def test_record_of_a_prefill_and_a_step(script, monkeypatch, tmp_path, capsys):
    timed = []
    monkeypatch.setattr(script, "replayed_us", lambda call: timed.append(call()) or 8.0)
    monkeypatch.setattr(script, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(script, "environment", lambda *arguments: {})
    out = tmp_path / "layers.json"
    assert script.main(["--models", "tiny", "--cells", "1x7,2x3", "--out", str(out)]) == 0
    prefill, step = json.loads(out.read_text())["cells"]
    assert set(prefill["ours"]["parts"]) == {"qkv", "o", "gate_up", "down", "norm", "rotation", "activation"}
    assert prefill["ours"]["parts"]["o"] == {"us": 2.0, "tflop_s": 2e-12 * 7 * 32 * 32 / 2 * 1e6}
    assert "parts" not in step["ours"] and step["ours"]["layer_us"] == 4.0
    assert prefill["attention"]["same_bits"] and "library_us" not in step["attention"]
    assert "tiny 2x3: 4.0 us a layer" in capsys.readouterr().out
