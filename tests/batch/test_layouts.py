"""Layouts move keys and values about, never a token of the output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, continuations, left_pad, plain_greedy

import specdec
from specdec.batch.columns import Columns
from specdec.batch.layout import LAYOUTS
from specdec.batch.layout.repad import RepadCache
from specdec.drafters.draft_model import DraftModel
from tests.api.test_generate import EOS, OTHER, PAD, TARGET, drafters, some_prompts

CPU = torch.device("cpu")
NAMES = ["none", "draft_model", "itself", "prompt_lookup", "hostile", "synthetic", "ragged"]
token = st.integers(0, VOCAB - 1)


def check_equal(layout, prompts, name, k, **options):
    ids, mask = left_pad(prompts, PAD)
    expected = [plain_greedy(TARGET, prompt, **options) for prompt in prompts]
    out = specdec.generate(
        TARGET, ids, mask, drafter=drafters(expected)[name], num_speculative_tokens=None if name == "none" else k,
        layout=layout, return_dict_in_generate=True, **options,
    )  # fmt: skip
    assert continuations(out.sequences, ids.shape[1], expected, PAD) == expected
    return out.speculation


@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    prompts=st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=7),
    name=st.sampled_from(NAMES),
    k=st.integers(1, 8),
    max_new_tokens=st.integers(1, 20),
    eos=st.lists(token, max_size=6, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_equal_in_every_layout(layout, prompts, name, k, max_new_tokens, eos):
    """Prompts of any length with any ids in them (pad and end of sequence included), rows that end anywhere."""
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": eos or None, "pad_token_id": PAD}
    check_equal(layout, [torch.tensor(ids) for ids in prompts], name, k, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("verification", ["token", "block"])
def test_samples_do_not_depend_on_the_layout(layout, verification):
    ids, mask = left_pad(some_prompts(5, 1, 9, 3, 5, 6), PAD)
    options = dict(do_sample=True, seed=7, max_new_tokens=20, verification=verification, drafter=OTHER)
    expected = specdec.generate(TARGET, ids, mask, **options)
    assert torch.equal(specdec.generate(TARGET, ids, mask, layout=layout, **options), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_modules_in_every_layout(layout, monkeypatch):
    monkeypatch.setattr("specdec.network.choose.can_fuse", lambda model: False)
    check_equal(layout, some_prompts(6, 3, 8, 1), "ragged", 4, max_new_tokens=14, eos_token_id=None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_custom_generate_takes_a_layout(layout):
    ids, mask = left_pad(some_prompts(5, 2, 7))
    loop = specdec.speculative(OTHER, layout=layout)
    out = TARGET.generate(ids, attention_mask=mask, max_new_tokens=9, custom_generate=loop, eos_token_id=None)
    assert torch.equal(out, TARGET.generate(ids, attention_mask=mask, max_new_tokens=9, eos_token_id=None))


def test_unknown_layout_is_refused():
    with pytest.raises(specdec.ConfigError, match=r"layout='paged' is unknown; choose 'ragged', 'repad'"):
        specdec.generate(TARGET, torch.tensor([[5]]), layout="paged")
    with pytest.raises(specdec.ConfigError, match="layout='paged'"):
        specdec.speculative(OTHER, layout="paged")


def test_a_draft_model_that_knows_one_length_per_batch():
    target, draft = tiny("llama"), tiny("gpt_neo")
    prompts = some_prompts(4, 9, 6)
    ids, mask = left_pad(prompts)
    with pytest.raises(specdec.UnsupportedModelError, match=r"GPTNeo.* pass layout='repad'"):
        specdec.generate(target, ids, mask, drafter=draft, max_new_tokens=12)
    out = specdec.generate(target, ids, mask, drafter=DraftModel(draft), max_new_tokens=12, layout="repad")
    assert out[:, 9:].tolist() == [plain_greedy(target, prompt, max_new_tokens=12) for prompt in prompts]


def test_masks_that_end_are_refused_before_the_first_token():
    model = tiny("gpt_neo", max_position_embeddings=32)
    ids, steps = torch.tensor([[5, 6, 7, 8]]), []
    options = dict(layout="repad", drafter="prompt_lookup", num_speculative_tokens=5)
    specdec.generate(model, ids, max_new_tokens=22, **options)
    with pytest.raises(specdec.ConfigError, match="33 tokens, but GPTNeoForCausalLM has masks for 32"):
        specdec.generate(model, ids, max_new_tokens=23, on_commit=steps.append, **options)
    assert not steps


@given(rows=st.integers(1, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_repadded_rows_hold_their_tokens_and_end_together(rows, data):
    """Write `width` tokens, keep a different number of them in every row, again and again; rows leave."""
    steps = [
        (
            width := data.draw(st.integers(1, 4)),
            data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)),
        )
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    generator = torch.Generator().manual_seed(0)
    num_slots = sum(width for width, _ in steps) + 4
    cache = RepadCache(1, rows, num_slots, CPU)
    truth = [torch.empty(2, 0, 3) for _ in range(rows)]  # [heads, kept tokens, dim]
    starts = np.zeros(rows, dtype=np.int64)
    for width, kept in steps:
        keys = torch.randn(len(starts), 2, width, 3, generator=generator)
        before = cache.num_realignments
        ended_together = len(set((cache.host_pads[: len(starts)] + starts).tolist())) == 1
        columns = Columns.chain(torch.from_numpy(starts), width)
        positions = cache.begin(columns, int(starts.max()) + width, host_starts=starts)
        assert cache.num_realignments == before + (not ended_together and bool(starts.any()))
        assert torch.equal(positions, torch.from_numpy(starts)[:, None] + torch.arange(width))
        seen, values = cache.layers[0].update(keys, keys + 1)
        pads = torch.zeros(len(starts), dtype=torch.long) if cache.pads is None else cache.pads
        assert (pads + torch.from_numpy(starts) + width == cache.used_slots).all(), "rows end in one column"
        for row in range(len(starts)):
            expected = torch.cat([truth[row], keys[row]], 1)
            assert torch.equal(seen[row, :, pads[row] :], expected)
            assert torch.equal(values[row, :, -width:], keys[row] + 1)
            truth[row] = expected[:, : int(starts[row]) + kept[row]]
        starts = starts + np.array(kept[: len(starts)])
        if len(starts) > 1 and data.draw(st.booleans()):
            keep = np.array([len(starts) - 1, *range(1, len(starts) - 1)])
            cache.keep_rows(torch.from_numpy(keep))
            starts, truth = starts[keep], [truth[i] for i in keep]


def test_repad_moves_nothing_where_rows_advance_alike():
    plain = check_equal("repad", some_prompts(6, 6, 6), "none", 1, max_new_tokens=10, eos_token_id=None)
    assert plain.num_new_tokens == 30
    alone = check_equal("repad", some_prompts(6), "ragged", 4, max_new_tokens=20, eos_token_id=EOS)
    assert alone.num_new_tokens
