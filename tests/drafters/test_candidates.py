"""A list of drafters: the text is plain greedy, whoever drafts when, and the ones that let steps pass catch up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from running_ahead import running_ahead
from tiny import continuations, left_pad, plain_greedy, tiny_llama

import specdec
from specdec.drafters.candidates import Candidates
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.policy import LengthPolicy
from tests.engine.test_ahead import CLOSE, TARGET, some_prompts


class InTurn(LengthPolicy):
    """Candidates and widths in a fixed order; promises as many steps as it is told to."""

    name, chooses = "in_turn", True

    def __init__(self, turns, promises=True):
        self.turns, self.promises = turns, promises

    def start(self, target, drafter, max_tokens):
        self.drafter, self.step, self.is_promised = drafter, -1, False

    def turn(self, step):
        return self.turns[step % len(self.turns)]

    def widths(self, rows, max_tokens):
        self.step += 1
        index, width = self.turn(self.step)
        self.drafter.choose(index)
        return np.full(len(rows), width)

    def next_width(self, max_tokens):
        if not self.promises:
            return None
        index, width = self.turn(self.step + 1)
        self.drafter.choose(index, is_ahead=True)
        return width


ORDERS = {
    "in turn": [(0, 3), (1, 2), (0, 1), (1, 4)],
    "with plain steps": [(0, 3), (0, 0), (1, 3), (1, 0), (0, 0), (0, 2)],
    "a long wait": [(1, 3)] + [(0, 2)] * 5 + [(0, 0)] * 3,
}


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_tokens_are_plain_greedy_ones(order, is_ahead):
    prompts = some_prompts(5, 3, 9)
    options = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None}
    expected = [plain_greedy(TARGET, prompt, **options) for prompt in prompts]
    ids, mask = left_pad(prompts)
    drafter = Candidates([PromptLookup(), DraftModel(CLOSE)])
    arguments = {"drafter": drafter, "num_speculative_tokens": 4, "length_policy": InTurn(ORDERS[order])}
    if is_ahead:
        with running_ahead() as counts:
            out = specdec.generate(TARGET, ids, mask, **arguments, return_dict_in_generate=True, **options)
        assert counts["used"] + counts["drafts"] > 5
    else:
        out = specdec.generate(TARGET, ids, mask, **arguments, return_dict_in_generate=True, **options)
    assert continuations(out.sequences, 9, expected, 0) == expected
    assert out.speculation.num_accepted_draft_tokens > 0


def test_a_draft_model_that_let_steps_pass_drafts_as_if_it_had_not():
    """It is the target itself, so each of its drafts is accepted if what it has missed is cached."""
    prompts = some_prompts(6)
    ids, mask = left_pad(prompts)
    target = tiny_llama(0)
    turns = [(1, 3)] + [(0, 2)] * 6 + [(0, 0)] * 9
    drafter, reports = Candidates([PromptLookup(), DraftModel(target)]), []
    policy = InTurn(turns, promises=False)
    own = []

    def on_commit(report):
        reports.append(report)
        if not report.is_prefill and policy.turn(policy.step)[0] == 1:
            own.append((int(report.num_drafted[0]), int(report.num_accepted[0])))

    specdec.generate(
        target, ids, mask, drafter=drafter, num_speculative_tokens=4, length_policy=policy, max_new_tokens=70,
        eos_token_id=None, on_commit=on_commit, pad_token_id=0,
    )  # fmt: skip
    assert len(own) >= 3 and all(drafted == accepted for drafted, accepted in own)


@pytest.mark.parametrize("order", ["arrival", "longest_first"])
def test_rows_that_join_and_the_cost_model(order):
    """On a CPU, where steps are timed."""
    prompts = some_prompts(5, 3, 9, 4, 7)
    options = {"max_new_tokens": 24, "eos_token_id": None}
    drafter = Candidates([PromptLookup(), DraftModel(CLOSE)], has_plain=True)
    found = {
        done.index: done.token_ids
        for done in specdec.generate_many(
            TARGET, prompts, drafter=drafter, length_policy="cost_model", max_rows=2, order=order, **options
        )
    }
    for index, prompt in enumerate(prompts):
        assert found[index] == plain_greedy(TARGET, prompt, pad_token_id=0, **options)


def test_hindsight_is_what_a_draft_would_have_been():
    """What lookup is said to have got right five tokens ago is what it gets right of a text cut there."""
    from specdec.batch.rows import Rows
    from specdec.kernels.prompt_lookup import prompt_lookup

    texts = [torch.tensor([3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5, 7]), torch.arange(3, 13), torch.tensor([9, 8] * 6)]
    rows = Rows(texts, 10, 4, torch.device("cpu"))
    found = PromptLookup().in_hindsight(rows, 5).tolist()
    for row, count in zip(rows.row_ids.tolist(), found, strict=True):
        cut = texts[row][:-5]
        drafted = prompt_lookup(cut[None], torch.tensor([len(cut)]), len(cut), 5, 3, 1)[0]
        assert count == int((drafted == texts[row][-5:]).long().cumprod(0).sum())
    assert sorted(found) == [0, 4, 5]
