"""Captured prompts: their padding, rows and lengths change no bit of the logits and of what is cached."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama

import specdec
from specdec import batch_invariant
from specdec.network.captured import prompts as step_graphs
from specdec.network.captured.prompts import CAPTURED_PROMPT_TOKENS, MOST_PROMPT_SHAPES, PROMPT_ROUNDING, PromptGraphs
from specdec.network.invariant.network import InvariantNetwork


@pytest.fixture
def captures(monkeypatch):
    """The calls that were captured; a replay runs them again."""
    made = []

    def capture(call, pool=None):
        made.append(call)
        logits = call()
        return SimpleNamespace(replay=lambda: logits.copy_(call())), logits

    monkeypatch.setattr(step_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


def texts(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (length,), generator=generator) for length in lengths]


def check_prompts(network, prompts, plain):
    """The same logits and keys as from a network that launches everything by itself."""
    found = []
    for one in (network, plain):
        rows = specdec.Rows(prompts, 8, 0, one.model.device)
        logits = one.prefill(rows)
        kept = [layer.keys[row, : len(ids)] for layer in one.cache.layers for row, ids in enumerate(prompts)]
        found.append([logits, *kept])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_bits_of_prompts_that_are_launched(captures):
    model = tiny_llama()
    rng = random.Random(0)
    with batch_invariant(model), torch.no_grad():
        network, plain = InvariantNetwork(model, 3, 200), InvariantNetwork(model, 3, 200)
        with network.running(), plain.running():
            network.kept.prompts = PromptGraphs(model.device)
            for seed in range(12):
                lengths = sorted((rng.randint(1, 100) for _ in range(rng.choice((1, 3)))), reverse=True)
                check_prompts(network, texts(lengths, seed), plain)
    assert 2 <= len(captures) <= 4, "two roundings of the length, each with one row and with three"


def test_newcomers_stand_in_later_rows(captures):
    model = tiny_llama()
    with batch_invariant(model), torch.no_grad():
        network = InvariantNetwork(model, 4, 100)
        with network.running():
            network.kept.prompts = PromptGraphs(model.device)
            (ids,) = texts([9], 0)
            expected = network.prefill_columns(ids[None], torch.tensor([9]), 0, 0, 9).logits
            for first_row in (2, 2, 1, 1):
                out = network.prefill_columns(ids[None], torch.tensor([9]), first_row, 0, 9)
                assert torch.equal(out.logits, expected)
                for layer in network.cache.layers:
                    assert torch.equal(layer.keys[first_row, :9], layer.keys[0, :9])
    assert len(captures) == 2


def test_the_result_outlives_the_next_replay(captures):
    graphs = PromptGraphs(torch.device("cpu"))

    def forward(token_ids, last, first_row):
        return token_ids.gather(1, last[:, None])[:, :, None].float()

    results = [graphs.replay(forward, torch.tensor([[5, token]]), torch.tensor([1]), 0, 64) for token in (6, 7, 8)]
    assert results[0] is None and [result.item() for result in results[1:]] == [7, 8]


def test_what_is_too_large_is_launched_and_old_shapes_go(captures):
    graphs = PromptGraphs(torch.device("cpu"))

    def forward(token_ids, last, first_row):
        return torch.zeros(len(token_ids), 1, 3)

    def replay(rows, width, first_row=0, num_slots=10**6):
        ids = torch.zeros(rows, width, dtype=torch.long)
        return graphs.replay(forward, ids, torch.zeros(rows, dtype=torch.long), first_row, num_slots)

    for _ in range(3):
        assert replay(1, CAPTURED_PROMPT_TOKENS + 1) is None and replay(2, CAPTURED_PROMPT_TOKENS) is None
        assert replay(1, 9, num_slots=PROMPT_ROUNDING - 1) is None
    assert not captures
    for first_row in range(MOST_PROMPT_SHAPES + 5):
        assert replay(1, 9, first_row) is None and replay(1, 9, first_row) is not None
    assert len(graphs._captured) == MOST_PROMPT_SHAPES
    count = len(captures)
    assert replay(1, 9, MOST_PROMPT_SHAPES + 4) is not None and len(captures) == count
    assert replay(1, 9, 0) is not None and len(captures) == count + 1, "captured again"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_of_prompts_that_are_launched_on_a_gpu(dtype):
    model = tiny_llama().to("cuda", dtype)
    rng = random.Random(0)
    with torch.no_grad():
        network, plain = InvariantNetwork(model, 3, 200), InvariantNetwork(model, 3, 200)
        plain.captures = False
        with network.running(), plain.running():
            for seed in range(12):
                lengths = sorted((rng.randint(1, 100) for _ in range(rng.choice((1, 3)))), reverse=True)
                check_prompts(network, texts(lengths, seed), plain)
            assert network.kept.prompts._captured
