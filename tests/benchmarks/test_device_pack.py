"""What a GPU machine without internet is sent: models in small shards, and another revision to compare with."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packed_models_load_as_they_are(tmp_path, monkeypatch):
    packing = script("device_pack")
    monkeypatch.setattr(packing, "PART", 2**16 + 20_000)
    model = tiny_llama(0)
    model.save_pretrained(tmp_path / "pair" / "target")
    (tmp_path / "pair" / "prompts.json").write_text('["a"]')
    packing.pack(tmp_path / "pair", tmp_path / "out")
    shards = sorted((tmp_path / "out" / "target").glob("*.safetensors"))
    assert len(shards) > 1 and max(path.stat().st_size for path in shards) <= packing.PART
    assert (tmp_path / "out" / "prompts.json").read_text() == '["a"]'
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "target", dtype=torch.bfloat16)
    for name, weight in model.bfloat16().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_tensor_larger_than_a_part_is_refused(tmp_path, monkeypatch):
    packing = script("device_pack")
    monkeypatch.setattr(packing, "PART", 2**16 + 1000)
    with pytest.raises(SystemExit, match="more than a part of"):
        packing.save_shards({"big": torch.zeros(1000)}, tmp_path)


def test_a_revision_is_exported_without_records(tmp_path):
    packing = script("device_pack")
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=BENCHMARKS, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    packing.export("HEAD", tmp_path / "head")
    assert (tmp_path / "head" / "specdec" / "version.py").is_file()
    assert (tmp_path / "head" / "kernels").is_dir() and not (tmp_path / "head" / "benchmarks" / "results").exists()


def runs(*speeds, tokens="same"):
    return [{"tokens_per_second": {"plain": list(one)}, "hashes": {"plain": tokens}} for one in speeds]


def test_a_slowdown_is_seen_and_noise_is_not():
    compared = script("revisions").compared
    before = runs((100, 101, 99), (102, 100, 98), (99, 100, 101))
    slower = compared("plain", {"before": before, "after": runs((90, 91, 89), (92, 90, 88), (89, 90, 91))})
    assert slower["ratio"] == pytest.approx(0.9, abs=0.01) and slower["interval"][1] < 0.95
    same = compared("plain", {"before": before, "after": runs((101, 99, 100), (98, 102, 100), (100, 101, 99))})
    assert same["interval"][0] < 1 < same["interval"][1] + 0.01 and same["is_equal"]
    other = compared("plain", {"before": before, "after": runs((100, 100, 100), tokens="other") * 3})
    assert not other["is_equal"]
