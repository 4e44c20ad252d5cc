"""Queries beside the text: they see what they would see in its place, and nothing of them is ever seen by the text."""

from __future__ import annotations

import pytest
import torch
from families import REFUSED, SERVED, is_known
from families import tiny as tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from specdec import batch_invariant, branches
from specdec.branches import Branches, ExtraQueries
from specdec.compatibility import build_network
from specdec.errors import UnsupportedModelError
from specdec.extra_queries import check_extra_queries, probe
from specdec.fused import FusedNetwork
from specdec.layout import Ragged, Repad
from specdec.rows import Rows
from specdec.stock import StockNetwork

# Per-layer inputs looked up by token id, and ALiBi biases by slot: there is no such query.
NO_EXTRA_QUERIES = ("gemma3n_text", "gemma4_text", "bloom", "mpt", "falcon_alibi")


def tiny_mistral(window: int = 5) -> MistralForCausalLM:
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=window, initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 5), st.data())
def test_what_a_column_sees(starts, num_tokens, data):
    """By the definition, column by column."""
    columns = data.draw(st.lists(st.integers(0, num_tokens - 1), min_size=1, max_size=4))
    length = data.draw(st.integers(1, 3))
    ahead = torch.arange(1, length + 1)
    found = Branches.behind(torch.tensor(starts), num_tokens, torch.tensor(columns)[None], ahead)
    num_slots = max(starts) + num_tokens + len(columns) * length
    visible, places = found.visible(num_slots), found.key_places(num_slots)
    for row, start in enumerate(starts):
        assert found.slots[row].tolist() == list(range(start, start + num_tokens + len(columns) * length))
        for column in range(num_tokens):
            assert visible[row, column].nonzero()[:, 0].tolist() == list(range(start + column + 1))
            assert found.places[row, column] == start + column
        for branch, end in enumerate(columns):
            begin = start + num_tokens + branch * length
            for ahead in range(length):
                column = num_tokens + branch * length + ahead
                seen = [*range(start + end + 1), *range(begin, begin + ahead + 1)]
                assert visible[row, column].nonzero()[:, 0].tolist() == seen
                assert places[row, seen].tolist() == list(range(start + end + ahead + 2))


@pytest.mark.parametrize("family", sorted(SERVED))
def test_every_family_is_served_or_refused(family):
    """The probe compares with the model's own forward; with windows of 7 and chunks, which it crosses."""
    check_family(family, Ragged())


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(SERVED))
def test_every_family_is_served_or_refused_in_repad(family):
    check_family(family, Repad())


def check_family(family, layout):
    if not is_known(family):
        pytest.skip("not in this transformers")
    model = tiny_family(family)
    try:
        build_network(model, 1, 8, layout=layout)
    except UnsupportedModelError:
        pytest.skip("not served at all by this transformers; test_families.py says so")
    if family in NO_EXTRA_QUERIES:
        with pytest.raises(UnsupportedModelError, match=r"beside its text.*another drafter"):
            check_extra_queries(model, layout)
    else:
        check_extra_queries(model, layout)


def test_the_known_refusals_are_families():
    assert set(NO_EXTRA_QUERIES) <= set(SERVED) and not set(NO_EXTRA_QUERIES) & set(REFUSED)


def step(network, model, extra, starts=(7, 4), width=3, slots=None, poison=None, seed=0, ahead=None):
    """Logits of the text, and of the extra queries behind every column, [rows, width, extra, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, 60, (len(starts), max(starts) + width), generator=generator)
    rows = Rows([ids[:n] for ids, n in zip(texts, starts, strict=True)], width, 0, model.device)
    tokens = torch.stack([ids[n : n + width] for ids, n in zip(texts, starts, strict=True)])
    num_extra = 0 if extra is None else len(extra)
    if extra is not None:
        extra = ExtraQueries(extra, torch.arange(1, num_extra + 1) if ahead is None else ahead)
    with network.running():
        network.prefill(rows)
        if poison is not None:
            for layer in network.cache.layers:
                for row, start in enumerate(starts):
                    layer.keys[row, start:], layer.values[row, start:] = poison, -poison
        used = slots or max(starts) + width * (1 + num_extra)
        output = network.forward(tokens, rows.lengths, used, extra_queries=extra)
        if extra is None:
            return output.logits, None
        columns = [output.extra_logits(torch.full_like(rows.lengths, column)) for column in range(width)]
    return output.logits, torch.stack(columns, 1)


def uncached(model, extra, starts, width, seed, ahead):
    """The same by the model's own forward over the text up to each place and the queries behind it."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, 60, (len(starts), max(starts) + width), generator=generator)
    embed = model.get_input_embeddings()
    text, queries = [], []
    for ids, start in zip(texts, starts, strict=True):
        for column in range(width):
            inputs = torch.cat([embed(ids[: start + column + 1]), extra])[None]
            places = torch.cat([torch.arange(start + column + 1), start + column + ahead])[None]
            seen = torch.ones(1, 1, places.shape[1], places.shape[1], dtype=torch.bool).tril()
            window = getattr(model.config, "sliding_window", None) or 999
            seen &= places[..., None] - places[:, None] < window
            logits = model(inputs_embeds=inputs, position_ids=places, attention_mask=seen, use_cache=False).logits[0]
            text.append(logits[start + column])
            queries.append(logits[start + column + 1 :])
    shape = (len(starts), width)
    return torch.stack(text).view(*shape, -1), torch.stack(queries).view(*shape, len(extra), -1)


@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral])
@pytest.mark.parametrize("network_type", [FusedNetwork, StockNetwork])
@pytest.mark.parametrize("layout", [Ragged(), Repad()])
@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 4),
    st.lists(st.integers(1, 3), min_size=1, max_size=4).map(sorted),
    st.integers(0, 99),
)
@torch.no_grad()
def test_logits_are_those_of_the_queries_in_the_texts_place(build, network_type, layout, starts, width, ahead, seed):
    """Some of them in one place."""
    model, count = MODELS[build], len(ahead)
    ahead = torch.minimum(torch.tensor(ahead), torch.arange(1, count + 1))
    starts = sorted(starts, reverse=True)
    extra = torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)) * 0.4
    network = network_type(model, len(starts), max(starts) + width * (1 + count), layout=layout)
    text, queries = step(network, model, extra, starts, width, seed=seed, ahead=ahead)
    expected_text, expected_queries = uncached(model, extra, starts, width, seed, ahead)
    torch.testing.assert_close(text, expected_text, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(queries, expected_queries, rtol=2e-4, atol=2e-4)


MODELS = {build: build() for build in (tiny_llama, tiny_mistral)}


@pytest.mark.parametrize("network_type", [FusedNetwork, StockNetwork])
@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral])
@torch.no_grad()
def test_the_text_sees_no_query(build, network_type):
    """Other queries change no bit of the text's logits; without any only the shape, and so the rounding, differs."""
    model = MODELS[build]
    network = network_type(model, 2, 40)
    one, other = torch.randn(2, 4, 32), torch.randn(2, 4, 32) * 9
    text, queries = step(network, model, one[0])
    again, others = step(network, model, other[0])
    assert torch.equal(text, again) and not torch.allclose(queries, others)
    alone, _ = step(network, model, None)
    torch.testing.assert_close(text, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_under_batch_invariance_the_text_keeps_its_bits():
    model = tiny_llama(4)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with batch_invariant(model):
            network = build_network(model, 2, 40, extra_queries=True)
            assert isinstance(network, StockNetwork)
            with_queries, queries = step(network, model, torch.randn(4, 32))
            alone, _ = step(network, model, None)
            shortened, _ = step(build_network(model, 2, 40), model, None)
        _, expected = step(StockNetwork(model, 2, 40), model, torch.randn(4, 32, generator=None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(with_queries, alone) and torch.equal(with_queries, shortened)
    assert queries.shape == expected.shape and queries.isfinite().all()


@pytest.mark.parametrize("network_type", [FusedNetwork, StockNetwork])
@torch.no_grad()
def test_what_lies_behind_the_text_never_matters(network_type):
    """Whatever is in the slots from the next token on, as earlier queries leave it there."""
    model, extra = MODELS[tiny_mistral], torch.randn(3, 32)
    network = network_type(model, 2, 40)
    results = [step(network, model, extra, poison=poison, slots=35) for poison in (None, 1e4, -77.0)]
    for text, queries in results[1:]:
        assert torch.equal(text, results[0][0]) and torch.equal(queries, results[0][1])


def planted_end(self, num_slots):
    """Queries see one token too many."""
    return ORIGINAL(self, num_slots) | (torch.arange(num_slots) == self.ends[..., None] + 1)


def planted_own(self, num_slots):
    """Queries do not see those before them."""
    slot = torch.arange(num_slots)
    before = (slot >= self.begins[..., None]) & (slot < self.slots[..., None])
    return ORIGINAL(self, num_slots) & ~before


ORIGINAL = branches.Branches.visible


@pytest.mark.parametrize("bug", [planted_end, planted_own])
@pytest.mark.parametrize("network_type", [FusedNetwork, StockNetwork])
def test_the_probe_finds_wrong_masks(monkeypatch, network_type, bug):
    model = MODELS[tiny_llama]
    assert probe(model, network_type(model, 2, 13), 0) < 1e-3
    monkeypatch.setattr(branches.Branches, "visible", bug)
    assert probe(model, network_type(model, 2, 13), 0) > 1e-2


@pytest.mark.parametrize("network_type", [FusedNetwork, StockNetwork])
def test_the_probe_finds_wrong_positions(monkeypatch, network_type):
    model, original = MODELS[tiny_llama], branches.Branches.behind

    def behind(*args):
        found = original(*args)
        places = found.places.clone()
        places[:, found.num_tokens :] += 1
        return Branches(found.num_tokens, found.slots, places, found.ends, found.begins)

    monkeypatch.setattr(branches.Branches, "behind", staticmethod(behind))
    assert probe(model, network_type(model, 2, 13), 0) > 1e-2
