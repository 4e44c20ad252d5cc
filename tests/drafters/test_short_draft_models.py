"""Draft models that have fewer positions than the text: they draft as far as they can read, and rows go on without."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tiny as build
from running_ahead import running_ahead
from tiny import VOCAB, left_pad, plain_greedy, tiny_llama

import specdec
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.either import Either
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.network.refusals import max_text_length

TARGET = tiny_llama(0)
POSITIONS = 24
K = 4


def short_sighted(model=TARGET, positions=POSITIONS, **config):
    """The same weights, which can read `positions` tokens."""
    draft = copy.deepcopy(model)
    for name, value in {"max_position_embeddings": positions, **config}.items():
        setattr(draft.config, name, value)
    return draft


def some_prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def watched(prompts, drafter, new_tokens=30, **options):
    """What every row committed, equal to transformers' own, and (length before, drafted, accepted) of its steps."""
    ids, mask = left_pad(prompts)
    steps, lengths = {row: [] for row in range(len(prompts))}, {}

    def on_commit(report):
        for slot, row in enumerate(report.row_ids.tolist()):
            if not report.is_prefill:
                steps[row].append((lengths[row], int(report.num_drafted[slot]), int(report.num_accepted[slot])))
            lengths[row] = lengths.get(row, len(prompts[row])) + int(report.num_committed[slot])

    out = specdec.generate(
        TARGET, ids, mask, drafter=drafter, num_speculative_tokens=K, length_policy="fixed", eos_token_id=None,
        max_new_tokens=new_tokens, on_commit=on_commit, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out, steps


def check_greedy(out, prompts, new_tokens=30):
    longest = max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        assert out.sequences[row, longest:].tolist() == plain_greedy(
            TARGET, prompt, max_new_tokens=new_tokens, eos_token_id=None
        )


def test_every_position_is_used_and_none_beyond():
    prompts = some_prompts(5, 17, 21, 23, 25, 40)
    out, steps = watched(prompts, short_sighted())
    check_greedy(out, prompts)
    for length, num_drafted, num_accepted in [step for row in steps.values() for step in row]:
        # A text of 24 tokens is read whole, and one more token follows from it; of one of 25 nothing can be drafted.
        assert num_drafted == min(K, max(POSITIONS + 1 - length, 0))
        assert num_accepted == num_drafted, "the draft is the target itself, so that only wrong keys are rejected"
    assert steps[3][0] == (24, 1, 1) and steps[5][0] == (41, 0, 0)


@pytest.mark.parametrize("layout", ["ragged", "repad", "grouped"])
@pytest.mark.parametrize("draft", [tiny_llama(1, max_position_embeddings=POSITIONS), short_sighted()])
def test_rows_of_both_kinds_in_every_layout(layout, draft):
    prompts = some_prompts(4, 11, 19, 23, 26, 30)
    out, _ = watched(prompts, draft, layout=layout)
    check_greedy(out, prompts)


def test_learned_positions_are_never_passed():
    """A table of positions has no entry for what is beyond it: a forward there raises."""
    target, draft = build("gpt2"), build("gpt2", max_position_embeddings=POSITIONS)
    assert max_text_length(draft) == POSITIONS < max_text_length(target)
    for prompts in (some_prompts(5, 22, 31), some_prompts(33)):
        ids, mask = left_pad(prompts)
        out = specdec.generate(target, ids, mask, drafter=draft, num_speculative_tokens=K, max_new_tokens=28)
        for row, prompt in enumerate(prompts):
            expected = plain_greedy(target, prompt, max_new_tokens=28)
            assert out[row, ids.shape[1] :].tolist() == expected


def test_newcomers_and_preempted_rows_of_both_kinds():
    prompts = some_prompts(4, 30, 11, 19, 24, 40, 25, 7)
    for draft in (short_sighted(), tiny_llama(1, max_position_embeddings=POSITIONS)):
        run = specdec.generate_many(
            TARGET, prompts, drafter=draft, num_speculative_tokens=K, length_policy="fixed", max_rows=3, kv_tokens=330,
            prefill_tokens=8, max_new_tokens=90, eos_token_id=None, in_order=True,
        )  # fmt: skip
        done = list(run)
        assert run.num_preemptions
        for one, prompt in zip(done, prompts, strict=True):
            assert one.token_ids == plain_greedy(TARGET, prompt, max_new_tokens=90, eos_token_id=None)
        assert done[0].num_draft_tokens > 0 and done[5].num_draft_tokens == done[6].num_draft_tokens == 0


def test_a_sampled_row_is_the_same_beside_rows_that_cannot_be_drafted():
    prompts = some_prompts(6, 22, 28)
    options = dict(do_sample=True, temperature=0.8, seed=[3, 4, 5])
    together, _ = watched(prompts, tiny_llama(1, max_position_embeddings=POSITIONS), **options)
    for row, prompt in enumerate(prompts):
        alone, _ = watched([prompt], tiny_llama(1, max_position_embeddings=POSITIONS), **options | {"seed": [3 + row]})
        assert together.sequences[row, 28:].tolist() == alone.sequences[0, len(prompt) :].tolist()


def test_the_draft_stops_where_its_rotation_would_mix_rows():
    rotation = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    draft = tiny_llama(1, max_position_embeddings=POSITIONS, rope_parameters=rotation)
    prompts = some_prompts(6, 30)
    out, steps = watched(prompts, draft)
    check_greedy(out, prompts)
    assert all(num_drafted == 0 for _, num_drafted, _ in steps[1])


@pytest.mark.parametrize("combine", [list, Either])
def test_within_a_list_and_beside_prompt_lookup(combine):
    prompts = some_prompts(6, 30)
    parts = [PromptLookup(), DraftModel(tiny_llama(1, max_position_embeddings=POSITIONS))]
    ids, mask = left_pad(prompts)
    policy = "fixed" if combine is Either else "cost_model"
    out = specdec.generate(
        TARGET, ids, mask, drafter=combine(parts) if combine is list else Either(*parts), num_speculative_tokens=K,
        length_policy=policy, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    check_greedy(out, prompts)


def test_nothing_is_launched_ahead_past_the_end():
    """`begin` sees upper bounds of the lengths; the launched forward stays within the draft model's positions."""
    draft, seen = DraftModel(short_sighted(tiny_llama(0))), []
    forward = draft._forward

    def watching(tokens, starts, used_slots, host_starts):
        seen.append((int(starts.max()) + tokens.shape[1], int(host_starts.max()) + tokens.shape[1], used_slots))
        return forward(tokens, starts, used_slots, host_starts)

    draft._forward = watching
    prompts = some_prompts(6, 20, 30)
    with specdec.batch_invariant(TARGET), specdec.batch_invariant(draft.model), running_ahead() as counts:
        out, _ = watched(prompts, draft)
    check_greedy(out, prompts)
    assert counts["drafts"] and max(map(max, seen)) == POSITIONS
