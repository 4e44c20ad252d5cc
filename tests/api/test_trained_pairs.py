"""Equality on trained models and held-out prompts, in float32.

The default run takes a slice; `-m slow` takes every prompt at batch 1, 3 and 8 with K from 1 to 8.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import specdec
from specdec.drafters.look_ahead import LookAhead

NEW_TOKENS = 48
ROOT = Path(__file__).parents[2]
LOOK_AHEAD = {"demo_pair": "specdec/assets/demo_pair/look_ahead", "code-qwen3": "benchmarks/trained/code-qwen3"}


def greedy(pair, prompts):
    """transformers' own greedy continuations, one prompt at a time."""
    out = []
    for prompt in prompts:
        inputs = pair.tokenizer(prompt, return_tensors="pt")
        out.append(pair.target.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs.input_ids.shape[1] :])
    return out


def num_equal(pair, prompts, expected, batch_size, k, drafter):
    equal = 0
    for begin in range(0, len(prompts), batch_size):
        inputs = pair.tokenizer(prompts[begin : begin + batch_size], return_tensors="pt", padding=True)
        out = specdec.generate(
            pair.target, **inputs, drafter=drafter, num_speculative_tokens=k, max_new_tokens=NEW_TOKENS
        )
        for row, want in zip(out[:, inputs.input_ids.shape[1] :], expected[begin:], strict=False):
            behind = row[len(want) :]
            equal += torch.equal(row[: len(want)], want) and bool((behind == pair.tokenizer.pad_token_id).all())
    return equal


@pytest.fixture(scope="session", params=["demo_pair", "code_pair"])
def pair(request):
    return request.getfixturevalue(request.param)


def drafters_of(pair):
    return pair.draft, "prompt_lookup", LookAhead.load(ROOT / LOOK_AHEAD[pair.folder.name])


@pytest.mark.parametrize(("batch_size", "k"), [(1, 5), (6, 3)])
def test_a_slice_of_the_prompts(pair, batch_size, k):
    prompts = pair.prompts[:: len(pair.prompts) // batch_size][: max(batch_size, 3)]
    expected = greedy(pair, prompts)
    for drafter in drafters_of(pair):
        assert num_equal(pair, prompts, expected, batch_size, k, drafter) == len(prompts)


@pytest.mark.slow
def test_every_prompt_at_every_batch_and_k(pair):
    expected = greedy(pair, pair.prompts)
    failures = []
    for drafter in drafters_of(pair):
        for batch_size in (1, 3, 8):
            for k in range(1, 9):
                equal = num_equal(pair, pair.prompts, expected, batch_size, k, drafter)
                print(f"{getattr(drafter, 'name_or_path', drafter)} batch {batch_size} K {k}: {equal}/{len(expected)}")
                if equal != len(expected):
                    failures.append((drafter, batch_size, k, equal))
    assert not failures
