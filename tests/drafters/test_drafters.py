"""The drafters alone: what they propose, whatever becomes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, context_of, left_pad, tiny_llama

import specdec
from specdec.batch.rows import Rows
from specdec.draft import NO_TOKEN, Draft
from specdec.drafter import Drafter
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.registry import DRAFTERS, drafter_class
from specdec.drafters.synthetic import Synthetic
from specdec.engine.proposal import usable
from specdec.errors import DrafterError

CPU = torch.device("cpu")


def rows_of(*prompts):
    return Rows([torch.tensor(prompt) for prompt in prompts], 8, 4, CPU)


def lookup_by_hand(tokens, max_tokens, longest, shortest):
    """The longest n-gram that ends the text and occurs before; its latest occurrence; the copy may run into itself."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 2, size - 2, -1):
            if tokens[end - size + 1 : end + 1] == tokens[-size:]:
                copy = list(tokens)
                for place in range(max_tokens):
                    copy.append(copy[end + 1 + place])
                return copy[len(tokens) :]
    return [NO_TOKEN] * max_tokens


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=5),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_prompt_lookup_equals_a_search_by_hand(prompts, max_tokens, longest, shortest):
    shortest = min(shortest, longest)
    rows = rows_of(*prompts)
    draft = PromptLookup(longest, shortest).propose(rows, max_tokens)
    assert draft.probs is None
    for slot, row in enumerate(rows.row_ids):
        assert draft.token_ids[slot].tolist() == lookup_by_hand(prompts[row], max_tokens, longest, shortest)


def test_prompt_lookup_does_not_read_behind_a_row():
    """What lies behind a shorter row's length is left over from rejected drafts."""
    rows = rows_of([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 9, 1])
    rows.token_ids[1, 4:] = torch.tensor([1, 7, 7, 1] + [1] * (rows.capacity - 8))
    assert PromptLookup().propose(rows, 3).token_ids[1].tolist() == [2, 9, 1]


def test_draft_model_caches_every_token_once():
    """Calls: one per drafted token; after a fully accepted draft the last token is caught up within the next one."""
    target = tiny_llama(0)
    drafter = DraftModel(target)
    widths = []
    network_forward = specdec.network.base.Network.forward

    def forward(self, token_ids, *args, **kwargs):
        if len(token_ids) == 1:  # the probe of a new model has two rows
            widths.append((self is drafter._network, token_ids.shape[1]))
        return network_forward(self, token_ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdec.network.base.Network.forward", forward)
        specdec.generate(
            target, torch.tensor([[5, 6, 7]]), drafter=drafter, num_speculative_tokens=3, max_new_tokens=13,
            eos_token_id=None,
        )  # fmt: skip
    draft_widths = [width for mine, width in widths if mine]
    assert draft_widths == [1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert [width for mine, width in widths if not mine] == [4, 4, 4]


def test_draft_model_proposes_its_own_greedy_text():
    draft = tiny_llama(1)
    prompts = [[5, 6, 7, 8], [9, 4], [11, 12, 13]]
    rows = rows_of(*prompts)
    drafter = DraftModel(draft)
    drafter.start(context_of(tiny_llama(0), 5), rows)
    rows.token_ids[torch.arange(3), rows.lengths] = 17  # each row's first token, from the target's prefill
    rows.lengths += 1
    rows.host_lengths += 1
    proposed = drafter.propose(rows, 5).token_ids
    drafter.finish()
    for slot, row in enumerate(rows.row_ids):
        ids = torch.tensor([[*prompts[row], 17]])
        own = draft.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, eos_token_id=None)
        assert proposed[slot].tolist() == own[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.8, 1.0])
def test_synthetic_acceptance_is_the_one_asked_for(rate):
    target = tiny_llama(0)
    ids, mask = left_pad([torch.randint(3, 60, (5,)) for _ in range(16)])
    options = {"max_new_tokens": 60, "eos_token_id": None}
    plain = specdec.generate(target, ids, mask, **options)[:, 5:]
    out = specdec.generate(
        target, ids, mask, drafter=Synthetic(rate, list(plain), seed=3), num_speculative_tokens=4,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, 5:], plain)
    tried, accepted = sum(out.speculation.tried_histogram), out.speculation.num_accepted_draft_tokens
    # four standard deviations of a binomial; the seed is fixed
    assert accepted / tried == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / tried) + 1e-9)


def test_finish_is_called_after_an_error():
    drafter = DraftModel(tiny_llama(1))

    def fail(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        specdec.generate(tiny_llama(0), torch.tensor([[5, 6]]), drafter=drafter, max_new_tokens=4, on_commit=fail)
    assert drafter._network is None


@pytest.mark.parametrize("name", sorted(DRAFTERS))
def test_registry_names_are_the_drafters_own(name):
    assert drafter_class(name).name == name


def test_only_a_draft_as_it_was_made_passes_unlooked_at():
    """What a wrapper has changed is a new tensor, and is cut at what no target writes."""
    rows = rows_of([1, 2, 1, 2, 1])
    drafter, widths = PromptLookup(), np.array([4])
    drafter.start(context_of(tiny_llama(0), 4), rows)
    draft = drafter.propose(rows, 4)
    assert usable(rows, draft, widths, 4, VOCAB, "x") is draft
    changed = replace(draft, token_ids=draft.token_ids.index_fill(1, torch.tensor([2]), VOCAB))
    assert usable(rows, changed, widths, 4, VOCAB, "x").token_ids.tolist() == [[2, 1, NO_TOKEN, NO_TOKEN]]
    assert usable(rows, draft, np.array([1]), 4, VOCAB, "x").token_ids.tolist() == [[2] + 3 * [NO_TOKEN]]
    rows.host_limits[:] = rows.host_lengths + 3
    rows.limits[:] = rows.lengths + 3
    assert usable(rows, draft, widths, 4, VOCAB, "x").token_ids.tolist() == [[2, 1] + 2 * [NO_TOKEN]]


def test_a_draft_model_of_fewer_tokens_is_fed_none_that_it_does_not_know():
    """The target writes tokens that the draft model has no embedding for."""
    small = tiny_llama(1, vocab_size=VOCAB - 2)
    drafter = DraftModel(small, vocab_size=VOCAB // 2)
    ids = torch.tensor([[VOCAB - 1, VOCAB - 2, 5]])
    expected = specdec.generate(tiny_llama(0), ids, max_new_tokens=30, eos_token_id=None)
    found = specdec.generate(
        tiny_llama(0), ids, drafter=drafter, num_speculative_tokens=3, max_new_tokens=30, eos_token_id=None
    )
    assert found.tolist() == expected.tolist()


def test_a_draft_of_no_tensor_is_named():
    class Own(Drafter):
        name = "own"

        def propose(self, rows, max_tokens):
            return Draft([[1] * max_tokens] * len(rows))

    with pytest.raises(DrafterError, match="'own' proposed token_ids as a list"):
        specdec.generate(tiny_llama(0), torch.tensor([[5, 6]]), drafter=Own(), max_new_tokens=4)


def test_a_drafter_of_the_old_contract_is_told_which_line_to_change():
    class Old(Drafter):
        name = "old"

        def start(self, target, rows, max_draft_tokens):
            pass

        def propose(self, rows, max_tokens):
            return Draft.empty(len(rows), rows.device)

    with pytest.raises(DrafterError, match=r"def start\(self, context, rows\):"):
        specdec.generate(tiny_llama(0), torch.tensor([[5, 6]]), drafter=Old(), max_new_tokens=4)
