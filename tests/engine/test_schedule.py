"""Continuous scheduling: whatever the order, the places and the budget, every prompt gets what it would get alone."""

from __future__ import annotations

import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, left_pad, plain_greedy

import specdec
from specdec import generate_many
from specdec.batch.cache import RaggedCache
from specdec.batch.layout import LAYOUTS, Grouped
from specdec.batch.rows import Rows
from specdec.draft import Draft
from specdec.drafter import Drafter
from specdec.drafters.draft_model import DraftModel
from tests.api.test_generate import OTHER, PAD, TARGET, some_prompts
from tests.policies.test_length import Later

token = st.integers(0, VOCAB - 1)


def results(prompts, **options):
    """Token ids by index; each index exactly once."""
    found = {}
    for completion in generate_many(TARGET, prompts, pad_token_id=PAD, **options):
        assert completion.index not in found
        assert completion.prompt_ids == list(map(int, prompts[completion.index]))
        found[completion.index] = completion
    assert sorted(found) == list(range(len(prompts)))
    return [found[index] for index in range(len(prompts))]


@given(
    prompts=st.lists(st.lists(token, min_size=1, max_size=30), min_size=1, max_size=9),
    new_tokens=st.data(),
    drafter=st.sampled_from([None, "prompt_lookup", OTHER]),
    layout=st.sampled_from([*sorted(LAYOUTS), Grouped(2)]),
    max_rows=st.integers(1, 5),
    spare_budget=st.none() | st.integers(0, 120),
    prefill_tokens=st.integers(1, 40),
    order=st.sampled_from(["arrival", "longest_first"]),
    eos=st.lists(token, max_size=4, unique=True),
)
@settings(max_examples=30, deadline=None)
def test_every_prompt_gets_its_own_greedy_text(
    prompts, new_tokens, drafter, layout, max_rows, spare_budget, prefill_tokens, order, eos
):
    limits = [new_tokens.draw(st.integers(1, 40)) for _ in prompts]
    largest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) + 6
    budget = None if spare_budget is None else largest + spare_budget
    found = results(
        prompts, drafter=drafter, layout=layout, max_rows=max_rows, kv_tokens=budget, prefill_tokens=prefill_tokens,
        order=order, eos_token_id=eos or None, max_new_tokens=limits,
    )  # fmt: skip
    for prompt, limit, completion in zip(prompts, limits, found, strict=True):
        expected = plain_greedy(
            TARGET, torch.tensor(prompt), max_new_tokens=limit, eos_token_id=eos or None, pad_token_id=PAD
        )
        assert completion.token_ids == expected
        assert completion.finish_reason == ("eos" if expected[-1] in eos else "length")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_preempted_rows_lose_nothing_and_memory_stays_within_the_budget(layout):
    prompts = some_prompts(*range(3, 19))
    limits = [100 - 2 * row for row in range(len(prompts))]
    options = dict(drafter=OTHER, eos_token_id=None, max_new_tokens=limits, layout=layout)
    run = generate_many(TARGET, prompts, max_rows=8, kv_tokens=400, **options)
    found = {completion.index: completion for completion in run}
    assert run.num_preemptions > 0 and run.peak_kv_tokens <= 400
    assert sum(completion.num_preemptions for completion in found.values()) == run.num_preemptions
    for row, prompt in enumerate(prompts):
        assert found[row].token_ids == plain_greedy(TARGET, prompt, max_new_tokens=limits[row], eos_token_id=None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_do_not_depend_on_the_schedule(layout):
    prompts = some_prompts(5, 11, 3, 8, 8, 14, 2)
    options = dict(do_sample=True, seed=5, drafter=OTHER, eos_token_id=None, pad_token_id=PAD)
    ids, mask = left_pad(prompts, PAD)
    batch = specdec.generate(TARGET, ids, mask, max_new_tokens=70, **options)[:, ids.shape[1] :].tolist()
    for schedule in (dict(max_rows=2), dict(max_rows=7), dict(max_rows=4, kv_tokens=252, order="longest_first")):
        run = generate_many(TARGET, prompts, layout=layout, max_new_tokens=70, in_order=True, **schedule, **options)
        assert [completion.token_ids for completion in run] == batch


def test_a_reused_slot_shows_nothing_of_the_row_before(monkeypatch):
    """What a row leaves behind is poisoned, finitely: masks are added. A newcomer that saw any of it would say so."""
    keep_rows = RaggedCache.keep_rows

    def poisoned(self, index):
        keep_rows(self, index)
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[len(index) :] = 1e3
                layer.values[len(index) :] = 1e6

    monkeypatch.setattr(RaggedCache, "keep_rows", poisoned)
    prompts = some_prompts(9, 4, 17, 3, 12, 6, 5)
    found = results(prompts, max_rows=2, drafter=OTHER, max_new_tokens=15, eos_token_id=None)
    for prompt, completion in zip(prompts, found, strict=True):
        assert completion.token_ids == plain_greedy(TARGET, prompt, max_new_tokens=15, eos_token_id=None)


def test_places_are_taken_at_once_and_nobody_waits_for_a_long_prompt():
    """While the long prompt is cached, 8 tokens at a time, the others go on; then it joins the two that are left."""
    prompts, batches = some_prompts(4, 5, 60, 6), []
    results(
        prompts, max_rows=2, prefill_tokens=8, max_new_tokens=[3, 20, 10, 10], eos_token_id=None,
        on_commit=lambda report: batches.append((report.is_prefill, sorted(report.row_ids.tolist()))),
    )  # fmt: skip
    alone = batches.index((False, [1]))
    joins = batches.index((True, [2]))
    assert joins - alone == 7, "a step of the others between all pieces of the prompt: 8 pieces"
    assert batches[joins + 1] == (False, [1, 2])


def test_prompts_are_read_as_places_become_free():
    read = []

    def source():
        for index, prompt in enumerate(some_prompts(*[5] * 20)):
            read.append(index)
            yield prompt

    run = generate_many(TARGET, source(), max_rows=3, max_new_tokens=6, eos_token_id=None)
    next(run)
    assert len(read) <= 8
    run.close()
    assert TARGET.config._attn_implementation == "sdpa"
    assert list(generate_many(TARGET, [], max_new_tokens=3)) == []


def test_in_order_and_as_finished():
    prompts, options = some_prompts(5, 5, 5, 5), dict(max_rows=4, max_new_tokens=[30, 4, 20, 2], eos_token_id=None)
    assert [done.index for done in generate_many(TARGET, prompts, **options)] == [3, 1, 2, 0]
    assert [done.index for done in generate_many(TARGET, prompts, in_order=True, **options)] == [0, 1, 2, 3]


def test_statistics_are_those_of_the_rows():
    prompts = some_prompts(6, 9, 4, 7, 5)
    run = generate_many(TARGET, prompts, drafter=OTHER, num_speculative_tokens=3, max_rows=2, max_new_tokens=12)
    found = list(run)
    total = run.speculation
    assert total.num_new_tokens == sum(len(one.token_ids) for one in found)
    assert total.num_spec_steps == sum(one.num_steps for one in found)
    assert total.num_draft_tokens == sum(one.num_draft_tokens for one in found)
    assert total.num_accepted_draft_tokens == sum(one.num_accepted_draft_tokens for one in found)
    assert total.num_draft_calls > 0


def test_models_that_know_one_length_per_batch():
    model = tiny("gpt_neo")
    prompts = some_prompts(4, 9, 6, 12, 3)
    found = generate_many(model, prompts, drafter="prompt_lookup", layout="repad", max_rows=2, max_new_tokens=14)
    for done in found:
        assert done.token_ids == plain_greedy(model, prompts[done.index], max_new_tokens=14)


def test_stopping_criteria_and_processors():
    prompts = some_prompts(5, 8, 2, 11)
    stop = torch.tensor([plain_greedy(TARGET, prompt, max_new_tokens=6, eos_token_id=None)[5] for prompt in prompts])
    options = dict(
        max_new_tokens=18, eos_token_id=None, repetition_penalty=1.3, no_repeat_ngram_size=2, pad_token_id=PAD,
        stopping_criteria=[lambda ids, scores, **_: torch.isin(ids[:, -1], stop)],
    )  # fmt: skip
    found = list(generate_many(TARGET, prompts, drafter=OTHER, max_rows=2, in_order=True, **options))
    assert [done.token_ids for done in found] == [plain_greedy(TARGET, prompt, **options) for prompt in prompts]
    assert {done.finish_reason for done in found} == {"stop"}


class Fixed(Drafter):
    name = "fixed"

    def propose(self, rows, max_tokens):
        return Draft(rows.last_tokens(1).expand(-1, max_tokens))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(max_rows=0), "max_rows=0 must be a whole number of at least 1"),
        (dict(kv_tokens=27), "prompt 1 with its new tokens and drafts may need 28 tokens, but kv_tokens=27"),
        (dict(order="shortest"), "order='shortest'; choose 'arrival' or 'longest_first'"),
        (dict(max_new_tokens=[4]), "max_new_tokens has 1 entries, too few for prompt 1"),
        (dict(max_new_tokens=4.0), "max_new_tokens=4.0 leaves no whole number"),
        (dict(do_sample=True, seed=[4]), "seed has 1 entries, too few for prompt 1"),
        (dict(max_new_tokens=[4, 4, 4]), "max_new_tokens has 3 entries for 2 prompts"),
        (dict(do_sample=True, seed=[4, 5, 6]), "seed has 3 entries for 2 prompts"),
        (dict(min_length=600), "min_new_tokens="),
        (dict(max_new_tokens=600), "has 512 positions"),
        (dict(drafter=Fixed()), "'fixed' serves fixed batches only, not rows that"),
        (dict(drafter=Fixed()), "generate() on batches, with layout='ragged' or 'repad'"),
        (dict(typo=1), "unknown keyword 'typo'"),
    ],
)
def test_refusals_come_before_the_first_token(options, words):
    with pytest.raises(specdec.SpecDecError) as refusal:
        generate_many(TARGET, some_prompts(3, 6), **options)
    assert words in str(refusal.value)


@pytest.mark.parametrize("prompt", [torch.empty(0, dtype=torch.long), torch.tensor([[5]]), [VOCAB], [5.7], "text"])
def test_bad_prompts_are_named(prompt):
    with pytest.raises(specdec.InputError, match="prompt 1"):
        generate_many(TARGET, [torch.tensor([5]), prompt], max_new_tokens=3)


@pytest.mark.parametrize("prompts", [5, None, torch.tensor(5)])
def test_what_is_no_list_of_prompts(prompts):
    with pytest.raises(specdec.InputError, match=r"prompts is .*pass an iterable"):
        generate_many(TARGET, prompts)


def test_entries_without_a_prompt_are_refused_where_an_iterator_ends():
    with pytest.raises(specdec.ConfigError, match="max_new_tokens has 3 entries for 2 prompts"):
        list(generate_many(TARGET, iter([[5], [6]]), max_new_tokens=[3, 3, 3]))


def test_grouped_rows_take_turns_and_keep_their_order():
    """Of twelve rows, four at a time; equally long prompts without drafts never need a realignment."""
    prompts = some_prompts(*[6] * 12)
    ids, mask = left_pad(prompts)
    widths = []
    out = specdec.generate(
        TARGET, ids, mask, layout=Grouped(4), max_new_tokens=9, eos_token_id=None, return_dict_in_generate=True,
        on_commit=lambda report: widths.append(len(report.row_ids)),
    )  # fmt: skip
    expected = [plain_greedy(TARGET, prompt, max_new_tokens=9, eos_token_id=None) for prompt in prompts]
    assert out.sequences[:, 6:].tolist() == expected
    assert set(widths[1:]) == {4} and out.speculation.grouping_rate == 1.0
    ragged, mask = left_pad(some_prompts(*range(3, 15)))
    mixed = specdec.generate(
        TARGET, ragged, mask, layout=Grouped(4), drafter=OTHER, max_new_tokens=20, eos_token_id=None,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert 0 < mixed.speculation.grouping_rate < 1


def test_batch_invariant_models_join_and_grow():
    """Their forward keeps a cache of its own, which a budget makes grow and shrink."""
    prompts = some_prompts(5, 40, 3, 70, 12, 6)
    with specdec.batch_invariant(TARGET):
        expected = [plain_greedy(TARGET, prompt, max_new_tokens=36, eos_token_id=None) for prompt in prompts]
        for options in (dict(), dict(kv_tokens=250), dict(layout="repad")):
            run = generate_many(
                TARGET,
                prompts,
                max_rows=3,
                drafter=OTHER,
                max_new_tokens=36,
                eos_token_id=None,
                in_order=True,
                **options,
            )
            assert [done.token_ids for done in run] == expected


@pytest.mark.parametrize("layout", [*sorted(LAYOUTS), Grouped(2)])
def test_a_step_starts_at_what_its_rows_hold(monkeypatch, layout):
    """Whoever was preempted, joined, moved or was stopped since the newest tokens were computed."""
    newest, num_asked = Rows.newest, 0

    def checked(self):
        nonlocal num_asked
        num_asked += 1
        places, tokens = newest(self)
        assert torch.equal(places, self.lengths - 1) and torch.equal(tokens, self.last_tokens(1))
        return places, tokens

    monkeypatch.setattr(Rows, "newest", checked)
    prompts = some_prompts(12, 3)
    for drafter in (None, OTHER):
        results(prompts, drafter=drafter, layout=layout, max_rows=4, kv_tokens=300, max_new_tokens=40)
        results(
            prompts, drafter=drafter, layout=layout, max_rows=3, max_new_tokens=12,
            stopping_criteria=[lambda ids, scores: torch.tensor([ids.shape[1] % 11 == 0])],
        )  # fmt: skip
    assert num_asked > 100


@pytest.mark.parametrize("num_plain", [0, 1, 3])
def test_a_short_newcomer_among_long_ones_is_drafted_from_its_own_text(num_plain):
    """What is cached behind it, of the columns that only the longer ones fill, is not its text."""
    prompts, limits = some_prompts(20, 4, 3), [1, 30, 30]
    run = generate_many(
        TARGET, prompts, drafter=DraftModel(TARGET), num_speculative_tokens=3, max_new_tokens=limits, max_rows=3,
        length_policy=Later(num_plain), eos_token_id=None, pad_token_id=PAD, in_order=True,
    )  # fmt: skip
    for done, prompt, limit in zip(run, prompts, limits, strict=True):
        assert done.token_ids == plain_greedy(TARGET, prompt, max_new_tokens=limit, eos_token_id=None)
    assert run.speculation.draft_acceptance_rate == 1.0 and run.speculation.num_draft_tokens > 20


def test_options_that_count_from_each_prompt_are_served():
    """As if each prompt were alone: its length is the one that min_length and max_length count from."""
    prompts = [torch.tensor(ids) for ids in ([5, 6, 7], [8, 9], [3, 4, 5, 6, 7, 8])]
    for options in ({"min_length": 8, "eos_token_id": [23, 20, 48]}, {"forced_eos_token_id": 7, "eos_token_id": 7}):
        options = {"max_new_tokens": 6, "pad_token_id": 0, **options}
        found = list(specdec.generate_many(TARGET, prompts, drafter="prompt_lookup", in_order=True, **options))
        assert [one.token_ids for one in found] == [plain_greedy(TARGET, prompt, **options) for prompt in prompts]


def test_scores_logits_and_several_samples_are_those_of_generate():
    prompts = [torch.tensor(ids) for ids in ([5, 6, 7], [8, 9])]
    options = dict(
        max_new_tokens=6, eos_token_id=None, do_sample=True, seed=4, num_return_sequences=2, output_scores=True,
        output_logits=True,
    )  # fmt: skip
    found = list(specdec.generate_many(TARGET, prompts, max_rows=3, in_order=True, **options))
    assert [one.index for one in found] == [0, 1, 2, 3]
    ids, mask = left_pad(prompts)
    whole = specdec.generate(TARGET, ids, mask, return_dict_in_generate=True, **options)
    for row, one in enumerate(found):
        assert one.token_ids == whole.sequences[row, 3:].tolist()
        for name in ("scores", "logits"):
            theirs = torch.stack([step[row] for step in getattr(whole, name)])
            assert torch.equal(getattr(one, name), theirs)
