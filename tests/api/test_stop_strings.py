"""Stop strings inside a block that is accepted at once: the row ends after them, whatever drafts it."""

from __future__ import annotations

import pytest
import torch

import specdec
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.either import Either
from specdec.drafters.look_ahead import LookAhead
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.synthetic import Synthetic

NEW = 32


def plain(pair, prompt, **options):
    ids = prompt[None]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1, **options}
    return pair.target.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]


@pytest.mark.parametrize("drafter", ["draft_model", "itself", "prompt_lookup", "either", "look_ahead", "known"])
def test_a_stop_string_inside_an_accepted_block(demo_pair, drafter):
    tokenizer = demo_pair.tokenizer
    prompt = tokenizer("import numpy as np\n" * 3, return_tensors="pt").input_ids[0]
    text = plain(demo_pair, prompt)
    drafters = {
        "draft_model": lambda: DraftModel(demo_pair.draft),
        "itself": lambda: DraftModel(demo_pair.target),
        "prompt_lookup": PromptLookup,
        "either": lambda: Either(PromptLookup(), DraftModel(demo_pair.draft)),
        "look_ahead": lambda: LookAhead.load(demo_pair.folder / "look_ahead"),
        "known": lambda: Synthetic(1.0, [text]),
    }
    words, inside = tokenizer.decode(text), 0
    for begin in range(0, min(len(words) - 3, 40), 5):
        stop = {"stop_strings": [words[begin : begin + 3]], "tokenizer": tokenizer}
        expected = plain(demo_pair, prompt, **stop).tolist()
        out = specdec.generate(
            demo_pair.target, prompt[None], drafter=drafters[drafter](), num_speculative_tokens=8, max_new_tokens=NEW,
            length_policy="fixed", return_dict_in_generate=True, pad_token_id=1, **stop,
        )  # fmt: skip
        assert out.sequences[0, len(prompt) :].tolist() == expected
        found = out.speculation
        assert found.num_new_tokens == len(expected) and found.num_step_tokens == len(expected) - 1
        inside += found.num_step_tokens < found.num_accepted_draft_tokens + found.num_spec_steps
    if drafter in ("itself", "known"):
        assert inside, "no row ended inside an accepted block, so that this tests nothing"
