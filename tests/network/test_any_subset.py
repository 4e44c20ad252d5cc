"""Any-subset models: the density of one call is that of one call per token, by every way of computing it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from tiny_xlnet import tiny_xlnet

from specdec.draft import NO_TOKEN
from specdec.errors import UnsupportedModelError
from specdec.network.any_subset.model import Order, XLNet, relative_positions_in
from specdec.network.any_subset.two_stream import TwoStreamCache, TwoStreamText, shifted

VOCAB = 11
MODEL = tiny_xlnet()
DOUBLE = tiny_xlnet().double()
# transformers makes the sinusoids in float32 whatever the model's dtype, and sines differ in their last bit.
CLOSE = {"atol": 1e-5, "rtol": 0}


def ragged(seed=0):
    """Token ids, lattice order and targets of rows with padding on either side: [3, 9]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB - 1, (3, 9), generator=generator)
    present = torch.ones(3, 9, dtype=torch.bool)
    present[1, 6:], present[2, :2] = False, False
    mask = (torch.rand(3, 9, generator=generator) < 0.6) & present
    mask[:, 3], mask[:, 4] = False, True
    order = Order.lattice(mask, present)
    rank = torch.arange(9).expand(3, -1)
    asked = (rank >= order.num_visible[:, None]) & (rank < order.lengths[:, None])
    return ids, mask, present, order, rank.masked_fill(~asked, NO_TOKEN)


def by_rank(ids, order):
    return ids.gather(1, order.positions)


def assert_same_where(asked, got, wanted):
    torch.testing.assert_close(got[asked], wanted[asked], **CLOSE)


def test_lattice_orders():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 0, 0]]).bool()
    present = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    order = Order.lattice(mask, present)
    assert order.positions.tolist() == [[0, 3, 1, 2, 4], [1, 0, 2, 3, 4]]
    assert order.num_visible.tolist() == [2, 1] and order.lengths.tolist() == [5, 3]
    assert order[torch.tensor([1])].positions.tolist() == [[1, 0, 2, 3, 4]]


@given(st.integers(0, 100))
@settings(max_examples=15)
def test_the_density_of_one_call_is_that_of_sequential_calls(seed):
    """Each rank asked for alone, with noise in place of all later tokens: nothing but earlier ranks is seen."""
    ids, _, _, order, targets = ragged(seed)
    model, tokens = XLNet(DOUBLE), by_rank(ids, order)
    density = model.conditional_logits(tokens, order, order.lengths, targets)
    for row in range(3):
        one = order[torch.tensor([row])]
        for rank in range(int(one.num_visible), int(one.lengths)):
            noisy = tokens[[row]].clone()
            noisy[0, rank:] = torch.randint(0, VOCAB, (9 - rank,))
            alone = model.conditional_logits(noisy, one, torch.tensor([rank]), torch.tensor([[rank]]))
            torch.testing.assert_close(alone[0, 0], density[row, rank], atol=1e-9, rtol=0)


def test_marginals_see_the_known_ranks_alone():
    ids, _, _, order, targets = ragged()
    model, tokens = XLNet(DOUBLE), by_rank(ids, order)
    known = order.num_visible + 1
    marginals = model.conditional_logits(tokens, order, known, targets)
    noisy = tokens.clone()
    for row in range(3):
        noisy[row, known[row] :] = 0
    again = model.conditional_logits(noisy, order, known, targets)
    asked = targets != NO_TOKEN
    torch.testing.assert_close(again[asked], marginals[asked])
    density = model.conditional_logits(tokens, order, order.lengths, targets)
    first = targets <= known[:, None]  # both ask for the same there
    assert_same_where(asked & first, marginals, density)
    assert (marginals - density)[asked & ~first].abs().max() > 0.1


def test_padding_and_batching_change_nothing():
    ids, mask, present, order, targets = ragged()
    model = XLNet(MODEL)
    together = model.conditional_logits(by_rank(ids, order), order, order.lengths, targets)
    for row in range(3):
        there = present[row]
        alone = Order.lattice(mask[[row]][:, there], present[[row]][:, there])
        count = int(there.sum())
        rank = torch.arange(count)[None]
        logits = model.conditional_logits(by_rank(ids[[row]][:, there], alone), alone, alone.lengths, rank)
        asked = targets[row, :count] != NO_TOKEN
        assert_same_where(asked, logits[0], together[row, :count])


@pytest.mark.parametrize("options", [{}, {"clamp_len": 3}, {"n_head": 4}, {"ff_activation": "relu"}])
def test_the_cache_gives_transformers_logits(options):
    ids, _, _, order, targets = ragged()
    model = tiny_xlnet(**options)
    expected = XLNet(model).conditional_logits(by_rank(ids, order), order, order.lengths, targets)
    rank = torch.arange(9).expand(3, -1)
    cache = TwoStreamCache(model, order.positions, order.num_visible, 9)
    at_once = cache.forward(by_rank(ids, order), torch.zeros(3, dtype=torch.long), rank, rank.clamp(min=1))
    assert_same_where(targets != NO_TOKEN, at_once, expected)


@given(st.lists(st.integers(1, 3), min_size=8, max_size=8), st.integers(0, 50))
@settings(max_examples=15)
def test_the_cache_grows_by_any_steps(steps, seed):
    """Content added in pieces, some of it rewritten by other tokens first, as rejected drafts are."""
    ids, _, _, order, targets = ragged(seed)
    tokens = by_rank(ids, order)
    expected = XLNet(MODEL).conditional_logits(tokens, order, order.lengths, targets)
    cache = TwoStreamCache(MODEL, order.positions, order.num_visible, 9)
    known = int(order.num_visible.max())
    nothing = torch.zeros(3, 0, dtype=torch.long)
    cache.forward(tokens[:, :known], torch.zeros(3, dtype=torch.long), nothing, nothing)
    for step in steps:
        count = min(step, 9 - known)
        if count == 0:
            break
        starts = torch.full((3,), known)
        wrong = (tokens[:, known : known + count] + 1) % (VOCAB - 1)
        cache.forward(wrong, starts, nothing, nothing)
        asked = known + torch.arange(count).expand(3, -1)
        logits = cache.forward(tokens[:, known : known + count], starts, asked, asked)
        counts = targets[:, known : known + count] != NO_TOKEN
        assert_same_where(counts, logits, expected[:, known : known + count])
        known += count


def test_a_query_never_changes_what_others_see():
    ids, _, _, order, _ = ragged()
    tokens, zero = by_rank(ids, order), torch.zeros(3, dtype=torch.long)
    asked = torch.full((3, 4), 8)
    some, none = (TwoStreamCache(MODEL, order.positions, order.num_visible, 9) for _ in range(2))
    some.forward(tokens, zero, asked, asked - 3)
    none.forward(tokens, zero, asked[:, :0], asked[:, :0])
    torch.testing.assert_close(some.keys, none.keys, atol=1e-6, rtol=0)


def test_whole_texts_give_transformers_logits():
    ids, _, present, order, targets = ragged()
    expected = XLNet(MODEL).conditional_logits(by_rank(ids, order), order, order.lengths, targets)
    rank = torch.empty_like(order.positions).scatter_(1, order.positions, torch.arange(9).expand(3, -1))
    shown = torch.where(rank < order.num_visible[:, None], -1, rank)
    content = (shown[:, None] <= shown[..., None]) & present[:, None] | torch.eye(9, dtype=torch.bool)
    queries = (shown[:, None] < rank[..., None]) & present[:, None]
    with torch.no_grad():
        hidden = TwoStreamText(MODEL)(ids, content, queries[:, None].expand(-1, 2, -1, -1))
        logits = MODEL.lm_loss(hidden)
    for copy in range(2):
        got = logits[:, copy].gather(1, order.positions[..., None].expand(-1, -1, VOCAB))
        assert_same_where(targets != NO_TOKEN, got, expected)


def test_shift_by_distance():
    length = 4
    distance = torch.arange(length, -length, -1.0).expand(length, -1)
    place = torch.arange(float(length))
    assert torch.equal(shifted(distance), place[:, None] - place)


def test_the_sinusoids_follow_the_models_dtype():
    """transformers' two streams fail in every dtype but float32; ours do not, and leave the model as it was."""
    hooks = [len(layer._forward_pre_hooks) for layer in DOUBLE.transformer.layer]
    ids, _, _, order, targets = ragged()
    XLNet(DOUBLE).conditional_logits(by_rank(ids, order), order, order.lengths, targets)
    with pytest.raises(ZeroDivisionError), relative_positions_in(DOUBLE, torch.float64):
        _ = 1 / 0
    assert [len(layer._forward_pre_hooks) for layer in DOUBLE.transformer.layer] == hooks


def test_models_that_are_none():
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no second stream.*XLNetLMHeadModel"):
        XLNet(tiny_llama())
    with pytest.raises(UnsupportedModelError, match="attn_type='uni'"):
        XLNet(tiny_xlnet(attn_type="uni"))
