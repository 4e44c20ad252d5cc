"""Grammars of xgrammar, outlines and llguidance: every row is transformers' own, alone and with a processor of its own.

`make integration` installs the libraries.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import left_pad
from tiny_xlnet import tiny_xlnet
from transformers import LogitsProcessor, LogitsProcessorList

import specdec
from specdec import Engine, Request, generate_many
from specdec.drafters.any_subset import AnySubsetDrafter
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.either import Either
from specdec.drafters.look_ahead import LookAhead, LookAheadEmbeddings
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.engine import schedule

LIBRARIES = Path(__file__).parents[2] / ".integration_libraries"
# The libraries' own warnings are theirs.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("default")]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"[a-z]{2,8}( [a-z]{2,8}){3}\."
TEXTS = [
    "def f(x):",
    "A person",
    "x",
    "The name of the",
    "{",
    "once upon a time there was",
    "x = [1, 2",
    "import os, sys",
]
NEW = 48
GRAMMARS = ["json", "regex"]
SOURCES = ["xgrammar", "llguidance", "outlines:outlines_core", "outlines:xgrammar", "outlines:llguidance"]


class OfLLGuidance(LogitsProcessor):
    """The library has none for transformers; this is what its documentation says to do."""

    def __init__(self, matcher):
        self.matcher, self.is_begun = matcher, False

    def __call__(self, input_ids, scores):
        if self.is_begun:
            assert self.matcher.consume_token(int(input_ids[0, -1]))
        self.is_begun = True
        allowed = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        bits = allowed[:, None] >> torch.arange(8) & 1
        return scores.masked_fill(bits.flatten()[: scores.shape[1]] == 0, float("-inf"))


@pytest.fixture(scope="module")
def makers(demo_pair):
    """(source, grammar) -> a function that makes a processor nobody asked before."""
    sys.path.append(str(LIBRARIES))
    try:
        yield made_of(demo_pair)
    finally:
        sys.path.remove(str(LIBRARIES))


def made_of(pair):
    import llguidance.hf
    import outlines
    import xgrammar
    from outlines import backends
    from xgrammar.contrib.hf import LogitsProcessor as OfXGrammar

    schema, found = json.dumps(SCHEMA), {}
    info = xgrammar.TokenizerInfo.from_huggingface(pair.tokenizer, vocab_size=pair.target.config.vocab_size)
    compiler = xgrammar.GrammarCompiler(info)
    compiled = {"json": compiler.compile_json_schema(schema), "regex": compiler.compile_regex(REGEX)}
    tokenizer = llguidance.hf.from_tokenizer(pair.tokenizer)
    matcher = llguidance.LLMatcher
    texts = {"json": matcher.grammar_from_json_schema(schema), "regex": matcher.grammar_from_regex(REGEX)}
    model = outlines.from_transformers(pair.target, pair.tokenizer)
    for grammar in GRAMMARS:
        found["xgrammar", grammar] = partial(OfXGrammar, compiled[grammar])
        found["llguidance", grammar] = lambda text=texts[grammar]: OfLLGuidance(matcher(tokenizer, text))
    for backend in ("outlines_core", "xgrammar", "llguidance"):
        source = f"outlines:{backend}"
        found[source, "json"] = partial(backends.get_json_schema_logits_processor, backend, model, schema)
        found[source, "regex"] = partial(backends.get_regex_logits_processor, backend, model, REGEX)
    return found


@pytest.fixture(scope="module")
def prompts(demo_pair):
    return [demo_pair.tokenizer(text, return_tensors="pt").input_ids[0] for text in TEXTS]


@pytest.fixture(scope="module")
def expected_of(demo_pair, makers, prompts):
    """transformers' rows, each alone."""
    found = {}

    def expected(source, grammar):
        if (source, grammar) not in found:
            found[source, grammar] = [
                demo_pair.target.generate(
                    row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=NEW, do_sample=False,
                    logits_processor=LogitsProcessorList([makers[source, grammar]()]),
                )[0, len(row) :].tolist()
                for row in prompts
            ]  # fmt: skip
        return found[source, grammar]

    return expected


def drafters(pair):
    embeddings = LookAheadEmbeddings(3, pair.target.config.hidden_size, num_helpers=1)
    torch.nn.init.normal_(embeddings.weight, std=0.4, generator=torch.Generator().manual_seed(0))
    return {
        "none": None,
        "draft_model": pair.draft,
        "prompt_lookup": "prompt_lookup",
        "either": Either(PromptLookup(), DraftModel(pair.draft)),
        "look_ahead": LookAhead(embeddings.trained_for(pair.target, {})),
        "any_subset": AnySubsetDrafter(tiny_xlnet(vocab_size=pair.target.config.vocab_size)),
    }


def cut(out, num_columns, expected):
    return [row[: len(own)] for row, own in zip(out[:, num_columns:].tolist(), expected, strict=True)]


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("source", SOURCES)
def test_equal_with_every_drafter(source, grammar, demo_pair, makers, prompts, expected_of):
    expected = expected_of(source, grammar)
    ids, mask = left_pad(prompts, demo_pair.tokenizer.pad_token_id)
    assert any(len(row) < NEW for row in expected), "some rows end"
    for name, drafter in drafters(demo_pair).items():
        k = {"num_speculative_tokens": 3} if drafter is not None else {}
        processor = makers[source, grammar]()
        for _ in range(2):  # the caller's object serves again
            out = specdec.generate(
                demo_pair.target, ids, mask, drafter=drafter, max_new_tokens=NEW, logits_processor=[processor], **k
            )
            assert cut(out, ids.shape[1], expected) == expected, name


@pytest.mark.parametrize("source", SOURCES)
def test_equal_where_rows_join_are_preempted_and_inside_transformers(
    source, demo_pair, makers, prompts, expected_of, monkeypatch
):
    monkeypatch.setattr(schedule, "ROUNDING", 8)  # rows outgrow their places after a few tokens
    expected = expected_of(source, "json")
    run = generate_many(
        demo_pair.target, prompts, drafter=demo_pair.draft, max_rows=4, kv_tokens=120, max_new_tokens=NEW,
        logits_processor=[makers[source, "json"]()], in_order=True,
    )  # fmt: skip
    assert [one.token_ids for one in run] == expected
    assert run.num_preemptions > 0

    ids, mask = left_pad(prompts, demo_pair.tokenizer.pad_token_id)
    out = demo_pair.target.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
        logits_processor=LogitsProcessorList([makers[source, "json"]()]),
        custom_generate=specdec.speculative(demo_pair.draft),
    )  # fmt: skip
    assert cut(out, ids.shape[1], expected) == expected


def test_requests_of_different_grammars_share_a_batch(demo_pair, makers, prompts, expected_of):
    kinds = [(source, grammar) for source in SOURCES for grammar in GRAMMARS][: len(prompts)]
    found = {}
    with Engine(demo_pair.target, "prompt_lookup", max_rows=3) as engine:
        for kind, prompt in zip(kinds, prompts, strict=True):
            engine.add_request(Request(prompt, processors=[makers[kind]()], max_new_tokens=NEW))
        while not engine.is_finished:
            for event in engine.step():
                assert event.error is None
                found[event.id] = found.get(event.id, []) + event.token_ids
    assert [found[row] for row in range(len(prompts))] == [expected_of(*kind)[i] for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("drafter", ["none", "draft_model", "prompt_lookup"])
def test_samples_follow_the_grammar(source, drafter, demo_pair, makers, prompts):
    """Each row is of the language, and does not depend on its batch."""
    options = dict(drafter=drafters(demo_pair)[drafter], do_sample=True, max_new_tokens=NEW)
    ids, mask = left_pad(prompts, demo_pair.tokenizer.pad_token_id)
    seeds = list(range(len(prompts)))
    out = specdec.generate(
        demo_pair.target, ids, mask, seed=seeds, logits_processor=[makers[source, "regex"]()], **options
    )[:, ids.shape[1] :]
    texts = [demo_pair.tokenizer.decode(row, skip_special_tokens=True) for row in out]
    assert all(re.fullmatch(REGEX, text) for text in texts), texts
    for row in (0, 5):
        own = specdec.generate(
            demo_pair.target, prompts[row][None], seed=[row], logits_processor=[makers[source, "regex"]()], **options
        )[0, len(prompts[row]) :].tolist()
        assert own == out[row, : len(own)].tolist()
