"""The benchmark of the cost model's bars, on a tiny pair: what is compared with what, and who is hostile."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

import specdec

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("cost_model")


def test_all_ways_are_run_and_equal(benchmark):
    models = {"target": tiny_llama(0), "draft": tiny_llama(0)}
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    found = benchmark.Run(models, ids, 12, 2).all()
    assert found["different_rows"] == 0 and found["batch_size"] == 2
    ways = found["ways"]
    lists = ["cost_model", "cost_model, list", "cost_model, hostile"]
    assert list(ways) == [*lists, "plain", "K=1", "K=2", "K=3", "K=5", "lookup K=5"]
    assert all(len(way["calls"]) == 2 for way in ways.values())
    assert ways["K=5"]["mean_acceptance_length"] > 4 and ways["plain"]["mean_acceptance_length"] == 1
    assert list(found["first_calls"]) == ["plain", *lists]


def test_the_hostile_drafter_is_never_right(benchmark):
    target = tiny_llama(0)
    ids = torch.arange(3, 12)[None]
    out = specdec.generate(
        target, ids, drafter=benchmark.HostileDraft(tiny_llama(0)), num_speculative_tokens=3, max_new_tokens=12,
        return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert out.speculation.num_draft_tokens > 0 and out.speculation.num_accepted_draft_tokens == 0


def test_bars_are_measured_against_what_can_be_chosen(benchmark):
    rates = {"cost_model": 90.0, "cost_model, list": 190.0, "cost_model, hostile": 49.0}
    rates |= {"plain": 50.0, "K=1": 80.0, "K=5": 100.0, "lookup K=5": 200.0}
    ways = {name: {"tokens_per_second": rate} for name, rate in rates.items()}
    first = {"cost_model": {"tokens_per_second": 60.0, "with_prefill": 30.0}}
    found = benchmark.judged({"tokens_per_second": 40.0, "with_prefill": 20.0}, first, ways)
    assert found["best"] == "lookup K=5"
    assert list(found["ratios"].values()) == [0.9, 0.95, 0.98, 1.5, 1.5]
