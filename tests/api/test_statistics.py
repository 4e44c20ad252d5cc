"""What a generation's statistics say of every kind of end, against figures counted by hand.

The drafter knows the text: of the tokens after the first, it drafts four a step, right or with a wrong one at a place.
"""

from __future__ import annotations

import pytest
import torch
from tiny import VOCAB, plain_greedy, tiny_llama
from transformers import StoppingCriteria, StoppingCriteriaList

import specdec
from specdec import generate_many
from specdec.draft import Draft
from specdec.drafter import Drafter

TARGET = tiny_llama(0)
PROMPT = torch.tensor([51, 15, 41, 49, 23])
TEXT = plain_greedy(TARGET, PROMPT, max_new_tokens=120, eos_token_id=None)
K = 4


class Knows(Drafter):
    """Drafts the text, with a wrong token at place `wrong` of every draft."""

    name = "knows"
    shares_slots = True

    def __init__(self, wrong: int | None = None):
        self.wrong = wrong

    def propose(self, rows, max_tokens):
        drafts = []
        for done in rows.num_new_tokens.tolist():
            draft = torch.tensor([*TEXT, *[3] * K][done : done + max_tokens])
            if self.wrong is not None and self.wrong < max_tokens:
                draft[self.wrong] = (draft[self.wrong] + 1) % VOCAB
            drafts.append(draft)
        return Draft(torch.stack(drafts))


class EndsAfter(StoppingCriteria):
    def __init__(self, count):
        self.length = len(PROMPT) + count

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


MANY = {"drafter": Knows(), "num_speculative_tokens": K, "length_policy": "fixed", "eos_token_id": None}


def statistics(drafter=None, **options):
    options = {"max_new_tokens": 24, "eos_token_id": None, **options}
    out = specdec.generate(
        TARGET, PROMPT[None], drafter=drafter or Knows(), num_speculative_tokens=K, length_policy="fixed",
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.speculation


def figures(found):
    return found.num_new_tokens, found.num_spec_steps, found.num_step_tokens, found.num_accepted_draft_tokens


def test_the_text_has_no_early_end():
    assert len(set(TEXT[:8])) == 8, "the tests below end the row at a token that stands nowhere before"


def test_an_end_of_sequence_inside_the_draft_brings_no_bonus():
    found = statistics(eos_token_id=TEXT[3], pad_token_id=0)
    assert figures(found) == (4, 1, 3, 3)  # one token from the prefill, three accepted, of which the last ends the row
    assert found.mean_acceptance_length == 3.0
    assert found.draft_acceptance_rate == 3 / 4  # one more was drafted past the end
    assert found.acceptance_histogram == [0, 0, 0, 1, 0] and found.drafted_histogram == [0, 0, 0, 0, 1]
    # Nothing was decided about the token after the end.
    assert found.tried_histogram == [1, 1, 1, 0] and found.conditional_acceptance_by_position == [1, 1, 1, 0]


def test_an_end_of_sequence_as_the_bonus_token_counts():
    found = statistics(eos_token_id=TEXT[5], pad_token_id=0)
    assert figures(found) == (6, 1, 5, 4) and found.mean_acceptance_length == 5.0


def test_an_end_of_sequence_in_place_of_a_rejected_token_decided_about_it():
    found = statistics(Knows(wrong=2), eos_token_id=TEXT[3], pad_token_id=0)
    assert figures(found) == (4, 1, 3, 2) and found.mean_acceptance_length == 3.0
    assert found.tried_histogram == [1, 1, 1, 0] and found.conditional_acceptance_by_position == [1, 1, 0, 0]


def test_the_length_limit_of_one_row_inside_a_longer_draft():
    run = generate_many(TARGET, [PROMPT, PROMPT], **MANY, max_new_tokens=[3, 12], in_order=True)
    done = list(run)
    assert [one.token_ids for one in done] == [TEXT[:3], TEXT[:12]] and [one.num_steps for one in done] == [1, 3]
    # 1 and 2 tokens; 1, 5 and 5 tokens, and a step for the last alone, which has room for no draft.
    assert figures(run.speculation) == (15, 4, 13, 1 + 8)
    assert run.speculation.mean_acceptance_length == pytest.approx(13 / 4)


def test_an_aborted_row_keeps_the_steps_that_it_took():
    with specdec.Engine(TARGET, Knows(), num_speculative_tokens=K, policy="fixed") as engine:
        gone = engine.add_request(specdec.Request(PROMPT, max_new_tokens=24, eos_token_id=None))
        engine.step()
        engine.step()
        engine.abort(gone)
        while not engine.is_finished:
            engine.step()
        assert figures(engine.statistics) == (6, 1, 5, 4) and engine.statistics.mean_acceptance_length == 5.0


def test_preempted_rows_count_no_token_twice():
    prompts = [PROMPT, PROMPT, PROMPT]
    run = generate_many(TARGET, prompts, **MANY, max_new_tokens=120, max_rows=3, kv_tokens=300)
    done = list(run)
    assert run.num_preemptions and all(one.token_ids == TEXT for one in done)
    found = run.speculation
    assert found.num_new_tokens == 3 * 120 and found.num_step_tokens == 3 * 119
    assert found.num_spec_steps == sum(one.num_steps for one in done) == 3 * 24  # of 5 tokens, the last of 4
    assert found.mean_acceptance_length == pytest.approx(119 / 24)


def test_a_row_that_fails_keeps_what_came_before():
    def raises(input_ids, scores):
        if input_ids.shape[1] >= len(PROMPT) + 3:
            raise ValueError("no more")
        return scores

    with specdec.Engine(TARGET, Knows(), num_speculative_tokens=K, policy="fixed") as engine:
        engine.add_request(specdec.Request(
            PROMPT, max_new_tokens=24, eos_token_id=None, processors=[raises]
        ))  # fmt: skip
        while not engine.is_finished:
            events = engine.step()
        assert events[0].finish_reason == "error"
        assert figures(engine.statistics) == (3, 1, 2, 2) and engine.statistics.mean_acceptance_length == 2.0


@pytest.mark.parametrize(("count", "steps", "of_steps", "accepted"), [(1, 0, 0, 0), (3, 1, 2, 2), (6, 1, 5, 4)])
def test_stopping_criteria_take_back_what_follows(count, steps, of_steps, accepted):
    found = statistics(stopping_criteria=StoppingCriteriaList([EndsAfter(count)]))
    assert figures(found) == (count, steps, of_steps, accepted)
    assert found.mean_acceptance_length == (of_steps if steps else 1.0)
    assert sum(found.tried_histogram) == accepted, "what was taken back was not decided"


def test_several_rows_are_weighted_by_their_steps():
    reports = []
    specdec.generate(
        TARGET, PROMPT[None].repeat(2, 1), drafter=Knows(), num_speculative_tokens=K, length_policy="fixed",
        max_new_tokens=8, eos_token_id=None, on_commit=reports.append,
    )  # fmt: skip
    total = specdec.Speculation()
    for report in reports:
        total.add(report)
    assert figures(total) == (16, 4, 14, 10) and total.mean_acceptance_length == 3.5
