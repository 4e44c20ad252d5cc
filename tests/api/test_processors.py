"""Greedy output under logits processors equals transformers' own under the same processors, one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCAB, continuations, left_pad, tiny_llama
from transformers import LogitsProcessor, LogitsProcessorList

import specdec
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup

TARGET = tiny_llama(0, eos_token_id=None)
DRAFT = tiny_llama(1, num_hidden_layers=1, eos_token_id=None)
PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 5, 6, 7], [9], [11, 12, 13, 11, 12, 13, 11, 12], [4, 4])]
NEW = 18


class NeverTwiceInARow(LogitsProcessor):
    """Stands for a user's own: looks at the text, takes one row as well as many."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))


def even_or_odd(row, ids):
    """Allowed tokens differ by row."""
    return [token for token in range(3, VOCAB) if (token + len(ids)) % 2 == row % 2]


OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "no_repeat_unigram": {"no_repeat_ngram_size": 1},
    "bad_words": {"bad_words_ids": [[token] for token in range(30, 50)] + [[5, 6], [9, 12]]},
    "sequence_bias": {"sequence_bias": {(20,): 9.0, (20, 21): 9.0}},
    "suppress": {"suppress_tokens": list(range(20, 40))},
    "begin_suppress": {"begin_suppress_tokens": list(range(3, 40))},
    "forced_bos": {"forced_bos_token_id": 17},
    "forced_eos": {"forced_eos_token_id": 18},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 1.6), "eos_token_id": 2},
    "renormalize": {"renormalize_logits": True},
    "remove_invalid": {"remove_invalid_values": True},
    "custom": {"logits_processor": LogitsProcessorList([NeverTwiceInARow()])},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(2, 30))},
    "many": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [8, 9], "min_new_tokens": 5,
             "eos_token_id": [2, 3, 4, 10, 11], "bad_words_ids": [[12]]},
}  # fmt: skip


def alone(prompt, row, **options):
    """transformers' continuation of one prompt."""
    if "prefix_allowed_tokens_fn" in options:
        allowed = options["prefix_allowed_tokens_fn"]
        options = {**options, "prefix_allowed_tokens_fn": lambda _, ids: allowed(row, ids)}
    ids = prompt[None]
    out = TARGET.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


def without_processors(eos_token_id):
    return [alone(prompt, row, eos_token_id=eos_token_id) for row, prompt in enumerate(PROMPTS)]


def drafters():
    return {"none": None, "draft_model": DRAFT, "itself": DraftModel(TARGET), "prompt_lookup": PromptLookup()}


@pytest.mark.parametrize("name", [*OPTIONS, "prefix_allowed_tokens"])
def test_equal_under_processors(name):
    options = OPTIONS.get(name, {"prefix_allowed_tokens_fn": even_or_odd})
    expected = [alone(prompt, row, **options) for row, prompt in enumerate(PROMPTS)]
    if name not in ("renormalize", "remove_invalid"):
        assert expected != without_processors(options.get("eos_token_id")), "the processors change nothing"

    ids, mask = left_pad(PROMPTS)
    for drafter_name, drafter in drafters().items():
        out = specdec.generate(TARGET, ids, mask, drafter=drafter, max_new_tokens=NEW, pad_token_id=0, **options)
        assert continuations(out, ids.shape[1], expected, 0) == expected, drafter_name


@pytest.mark.parametrize("name", ["repetition_penalty", "begin_suppress", "custom", "many"])
def test_inside_transformers(name):
    """There the processors arrive made for the padded batch."""
    expected = [alone(prompt, row, **OPTIONS[name]) for row, prompt in enumerate(PROMPTS)]
    ids, mask = left_pad(PROMPTS)
    out = TARGET.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0,
        custom_generate=specdec.speculative(DRAFT, num_speculative_tokens=3), **OPTIONS[name],
    )  # fmt: skip
    assert continuations(out, ids.shape[1], expected, 0) == expected
