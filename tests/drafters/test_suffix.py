"""The suffix drafter and its memory: proposals against a search by hand, and the same tokens whatever it remembers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import context_of, plain_greedy, tiny_llama

import specdec
from specdec import Suffix, SuffixMemory
from specdec.batch.rows import Rows
from specdec.draft import NO_TOKEN, Draft, Verified
from specdec.drafters.memory import native
from specdec.drafters.registry import resolve
from specdec.drafters.suffix import RowText
from specdec.errors import ConfigError, DrafterError, InputError
from tests.drafters.suffix_oracle import draft_by_hand

TARGET = tiny_llama(0)
CPU = torch.device("cpu")


def rows_of(*prompts):
    return Rows([torch.tensor(prompt) for prompt in prompts], 8, 4, CPU)


def drafts_of(drafter, prompts, max_tokens, target=TARGET):
    """The drafts of rows that have just been prefilled, by prompt."""
    rows = rows_of(*prompts)
    drafter.check(target, 100)
    drafter.start(context_of(target, 5), rows)
    draft = drafter.propose(rows, max_tokens)
    drafter.finish()
    found = dict(zip(rows.row_ids.tolist(), draft.token_ids.tolist(), strict=True))
    for ids in found.values():
        assert NO_TOKEN not in ids[: sum(token != NO_TOKEN for token in ids)], "a prefix"
    return [[token for token in found[row] if token != NO_TOKEN] for row in range(len(prompts))]


def texts(least, most, alphabet=4, longest=24):
    text = st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=longest)
    return st.lists(text, min_size=least, max_size=most)


rules = dict(
    max_tokens=st.integers(1, 9),
    max_match=st.integers(1, 12),
    max_factor=st.sampled_from([0.5, 1.0, 2.0, 8.0]),
    min_probability=st.sampled_from([0.01, 0.1, 0.3, 0.5, 1.0]),
)


@given(prompts=texts(1, 3), remembered=texts(0, 12), room=st.sampled_from([60, 200, 10**6]), **rules)
@settings(max_examples=400, deadline=None)
def test_proposals_are_those_of_a_search_by_hand(prompts, remembered, room, max_tokens, **rule):
    memory = SuffixMemory(room)
    for text in remembered:
        memory.add(torch.tensor(text, dtype=torch.long))
    kept = texts_in(memory)
    for prompt, found in zip(prompts, drafts_of(Suffix(memory, **rule), prompts, max_tokens), strict=True):
        assert found == draft_by_hand(prompt, kept, max_tokens, vocab_size=61, **rule)


def texts_in(memory):
    """What a memory holds, from the codes themselves."""
    found = []
    for segment in memory.segments:
        assert sorted(segment.suffixes.tolist()) == list(range(len(segment)))
        ends = np.flatnonzero(segment.codes == 0) + 1
        found += [(part[:-1] - 1).tolist() for part in np.split(segment.codes, ends)[:-1]]
    return found


@given(prompts=texts(1, 2, 40, 30), remembered=texts(0, 6, 40, 40), **rules)
@settings(max_examples=100, deadline=None)
def test_proposals_from_large_alphabets(prompts, remembered, max_tokens, **rule):
    """Texts that share few tokens; some of them are pieces of the prompts, so that long suffixes are found."""
    remembered = [*remembered, *(prompt[len(prompt) // 3 :] for prompt in prompts), prompts[0][::-1]]
    memory = SuffixMemory()
    memory.extend(remembered)
    kept = [text for text in remembered if len(text) > 1]
    for prompt, found in zip(prompts, drafts_of(Suffix(memory, **rule), prompts, max_tokens), strict=True):
        assert found == draft_by_hand(prompt, kept, max_tokens, vocab_size=61, **rule)


def test_proposals_on_real_text():
    """The words of this repository's own sources, cut at many places."""
    files = sorted((Path(__file__).parents[2] / "drafters").glob("*.py"))
    words: dict[str, int] = {}
    coded = [
        [words.setdefault(word, len(words)) for word in re.findall(r"\w+|\s+|[^\w\s]", file.read_text())][:1500]
        for file in files
    ]
    target = tiny_llama(0, vocab_size=len(words))
    memory = SuffixMemory(6000)
    memory.extend(coded[1:])
    kept = texts_in(memory)
    assert len(memory.segments) > 2 and len(kept) < len(coded) - 1, "some have left"
    cuts = [coded[0][:length] for length in range(40, 1500, 97)] + [coded[1][:length] for length in (90, 400, 1000)]
    drafts = drafts_of(Suffix(memory, learn=False), cuts, 8, target)
    rule = dict(max_tokens=8, max_match=64, max_factor=4.0, min_probability=0.1, vocab_size=len(words))
    assert drafts == [draft_by_hand(cut, kept, **rule) for cut in cuts]
    assert max(map(len, drafts)) == 8 and min(map(len, drafts)) < 3


def test_a_token_that_the_target_cannot_write_ends_a_draft():
    """An embedding may have more rows than the output has tokens; copies of the others are not drafted."""
    rows = rows_of([5, 6, 60, 7, 5])
    drafter = Suffix(max_factor=8)
    drafter.start(context_of(TARGET, 4), rows)
    drafter._vocab_size = 60
    assert drafter.propose(rows, 4).token_ids.tolist() == [[6]]


def test_a_draft_is_made_without_asking_the_device_twice():
    """What a step commits comes with `observe`; the row's tokens on the device are read once."""
    rows, drafter = rows_of([5, 6, 7, 5]), Suffix()
    drafter.start(context_of(TARGET, 4), rows)
    assert drafter.propose(rows, 2).token_ids.tolist() == [[6, 7]]
    rows.host_lengths += 2
    rows.lengths += 2
    rows.token_ids[:] = 0  # what nobody may look at
    committed = np.array([[9, 6, NO_TOKEN]])
    counts = torch.tensor([2])
    lengths = rows.host_lengths.copy()
    drafter.observe(
        Verified(Draft.empty(1, CPU), counts, counts, lengths, row_ids=rows.row_ids, committed_ids=committed)
    )
    assert drafter.propose(rows, 2).token_ids.tolist() == [[7, 5]]


NEW = dict(max_new_tokens=24, eos_token_id=None)
LOOPS = dict(num_speculative_tokens=4, **NEW)


def test_a_finished_row_helps_the_next_ones():
    """Within `generate_many`, across calls, and in another process; the tokens are those of plain decoding."""
    prompts = [torch.tensor([5, 6, 7 + row]) for row in range(3)]
    plain = [plain_greedy(TARGET, prompt, max_new_tokens=24, eos_token_id=None) for prompt in prompts]
    memory = SuffixMemory()
    many = specdec.generate_many(TARGET, prompts * 2, drafter=Suffix(memory), max_rows=1, in_order=True, **LOOPS)
    steps = []
    for done, expected in zip(many, plain * 2, strict=True):
        assert done.token_ids == expected
        steps.append(done.num_steps)
    assert len(memory) == 6 and max(steps[3:]) <= 6 < min(steps[:3]), "23 tokens, five in each step"

    again = specdec.generate(TARGET, prompts[0][None], drafter=Suffix(memory), return_dict_in_generate=True, **LOOPS)
    assert again.sequences[0, 3:].tolist() == plain[0] and again.speculation.num_target_calls <= 6
    assert len(memory) == 7

    fixed = Suffix(memory, learn=False)
    specdec.generate(TARGET, prompts[1][None], drafter=fixed, **LOOPS)
    assert len(memory) == 7 and fixed._texts == {}


def test_rows_enter_the_memory_as_they_ended():
    """Cut by a stopping criterion, withdrawn, or at the end of sequence; waiting ones not at all."""
    ids = [5, 6, 7]
    expected = plain_greedy(TARGET, torch.tensor(ids), max_new_tokens=20, eos_token_id=None)
    memory = SuffixMemory()
    stop = lambda ids, scores: torch.tensor([ids.shape[1] >= 8])  # noqa: E731 - a criterion
    with specdec.Engine(TARGET, Suffix(memory), max_rows=2, num_speculative_tokens=3) as engine:
        engine.add_request(specdec.Request(ids, stopping=[stop], max_new_tokens=20, eos_token_id=None))
        withdrawn = engine.add_request(specdec.Request([9, 8], max_new_tokens=20, eos_token_id=None))
        waiting = engine.add_request(specdec.Request([4, 4], max_new_tokens=20, eos_token_id=None))
        engine.step()
        engine.abort(withdrawn)
        engine.abort(waiting)
        while not engine.is_finished:
            engine.step()
    assert [text[:2] for text in texts_in(memory)] == [[9, 8], [5, 6]]
    assert texts_in(memory)[1] == ids + expected[:5]


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=9), min_size=1, max_size=6),
    poison=st.integers(0, 10**6), max_rows=st.integers(1, 3), layout=st.sampled_from(["ragged", "repad", "grouped"]),
)  # fmt: skip
def test_no_memory_changes_a_token(prompts, poison, max_rows, layout):
    """Random texts, ids beyond the target's, and what was generated before: greedy output is plain greedy output."""
    model = tiny_llama(2, vocab_size=7)
    memory = SuffixMemory(500)
    for text in np.random.default_rng(poison).integers(0, 7, (20, 40)):
        memory.add(text)
    run = specdec.generate_many(
        model, [torch.tensor(prompt) for prompt in prompts], drafter=Suffix(memory), num_speculative_tokens=3,
        max_rows=max_rows, kv_tokens=100, max_new_tokens=14, in_order=True, layout=layout,
    )  # fmt: skip
    for done, prompt in zip(run, prompts, strict=True):
        assert done.token_ids == plain_greedy(model, torch.tensor(prompt), max_new_tokens=14)


def test_text_and_options():
    made = resolve("suffix:max_tokens=500,max_match=8,max_factor=1.5,min_probability=0.3,learn=false")
    assert isinstance(made, Suffix) and made.memory.max_tokens == 500 and not made.learns
    assert (made.max_match, made.max_factor, made.min_probability) == (8, 1.5, 0.3)
    for options, message in (
        ({"max_match": 0}, "max_match=0 is not 1 to 1024"),
        ({"max_factor": 0.0}, "max_factor=0.0 is not a finite number above 0"),
        ({"min_probability": 0.001}, "min_probability=0.001 is not 0.01 to 1"),
        ({"max_tokens": 2}, "max_tokens=2 of a memory is not a whole number from 3"),
        ({"memory": SuffixMemory(), "max_tokens": 9}, "max_tokens=9 with a memory of its own bound"),
    ):
        with pytest.raises(ConfigError, match=message):
            Suffix(**options)
    with pytest.raises(InputError, match=r"memory 'nowhere.npz' cannot be read: No such file.*specdec memory build"):
        resolve("suffix:memory=nowhere.npz")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(native, "find_spec", lambda name: None if name == "numba" else name)
    with pytest.raises(DrafterError, match=r"'suffix' needs numba; pip install 'specdec-toolkit\[memory\]'"):
        Suffix()


@pytest.mark.gpu
@pytest.mark.parametrize("is_continuous", [False, True])
def test_on_a_gpu_the_tokens_are_plain_ones(is_continuous):
    """What steps commit comes to the host with their reports: a row's tokens are read from the device once."""
    target = tiny_llama(0, hidden_size=64).cuda()
    prompts = [torch.tensor(ids) for ids in ([5, 6, 7, 8], [9, 4], [11, 12, 13], [5, 6, 7, 8])]
    plain = list(specdec.generate_many(target, prompts, max_rows=4, in_order=True, **NEW))
    read, drafter = [], Suffix()
    append = RowText.append

    def counted(self, token_ids):
        read.append(len(token_ids))
        append(self, token_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowText, "append", counted)
        for _ in range(2):
            options = dict(drafter=drafter, num_speculative_tokens=4, max_rows=2 if is_continuous else 4, **NEW)
            run = list(specdec.generate_many(target, prompts, in_order=True, **options))
            assert [done.token_ids for done in run] == [done.token_ids for done in plain]
    assert len(drafter.memory) == 8 and max(done.num_steps for done in run) <= 10
    assert sum(read) <= 8 * (4 + NEW["max_new_tokens"])
