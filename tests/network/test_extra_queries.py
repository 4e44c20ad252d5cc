"""Queries beside the text: they see what they would see in its place, and nothing of them is ever seen by the text."""

from __future__ import annotations

import pytest
import torch
from families import REFUSED, SERVED, is_known
from families import tiny as tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama, tiny_mistral

from specdec import batch_invariant
from specdec.batch.columns import Columns
from specdec.batch.layout import Ragged, Repad
from specdec.batch.rows import Rows
from specdec.draft import ExtraQueries
from specdec.errors import UnsupportedModelError
from specdec.network.base import NetworkOutput
from specdec.network.captured.graphs import MAX_STEP_WIDTH, row_bucket, slot_bucket, width_bucket
from specdec.network.choose import build_network
from specdec.network.extra_queries import check_extra_queries, probe
from specdec.network.fused import FusedNetwork
from specdec.network.invariant import network as invariant_network
from specdec.network.invariant.network import InvariantNetwork
from specdec.network.native.network import NativeNetwork
from specdec.network.stock import StockNetwork

# Per-layer inputs looked up by token id, and ALiBi biases by slot: there is no such query.
NO_EXTRA_QUERIES = ("gemma3n_text", "gemma4_text", "bloom", "mpt", "falcon_alibi")


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
        with pytest.raises(UnsupportedModelError, match=r"next to its text.*another drafter"):
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
@pytest.mark.parametrize("network_type", [FusedNetwork, NativeNetwork, StockNetwork])
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


@pytest.mark.parametrize("network_type", [FusedNetwork, NativeNetwork, StockNetwork])
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


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_gemma(family):
    model = tiny_family(family, vocab_size=64, intermediate_size=64, tie_word_embeddings=True)
    model.set_attn_implementation("eager")  # before transformers 5.18 the default leaves Gemma 2's soft-caps out
    return model


INVARIANT_MODELS = {
    "llama": lambda: tiny_llama(4),
    "mistral": tiny_mistral,
    "gemma2": lambda: tiny_gemma("gemma2"),
    "gemma3": lambda: tiny_gemma("gemma3_text"),
}


@pytest.mark.parametrize("name", INVARIANT_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tree_slots", [64, 14])
@torch.no_grad()
def test_under_batch_invariance_the_text_keeps_its_bits(name, dtype, tree_slots, one_thread, monkeypatch):
    """Windows that end within text and branches; a step of 15 columns, in one forward and too wide for one."""
    model = INVARIANT_MODELS[name]().to(dtype)
    extra, ahead = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).to(dtype), torch.tensor([1, 2, 2, 3])
    with batch_invariant(model):
        network, stock = build_network(model, 2, 40), StockNetwork(model, 2, 40)
        assert isinstance(network, InvariantNetwork)
        monkeypatch.setattr(invariant_network, "TREE_SLOTS", tree_slots)
        text, queries = step(network, model, extra, ahead=ahead)
        alone, _ = step(build_network(model, 2, 40), model, None)
        stock_text, expected = step(stock, model, extra, ahead=ahead)
    assert torch.equal(text, alone) and torch.equal(text, stock_text)
    assert queries.shape == expected.shape and queries.isfinite().all()
    if dtype == torch.float32:  # the stock forward's guesses take another attention
        torch.testing.assert_close(queries, expected, rtol=1e-4, atol=1e-4)


class PaddedSteps:
    """Steps padded as `StepGraphs` pads them, and not captured."""

    def __init__(self, cache):
        self.cache = cache

    def replay(self, forward, token_ids, starts, used_slots, layers):
        rows, width = token_ids.shape
        padded = torch.zeros(row_bucket(rows), width_bucket(width), dtype=torch.long)
        padded[:rows, :width] = token_ids
        padded_starts = torch.full((len(padded),), self.cache.num_slots - MAX_STEP_WIDTH)
        padded_starts[:rows] = starts
        logits, states, _ = forward(padded, padded_starts, min(slot_bucket(used_slots), self.cache.num_slots), layers)
        return NetworkOutput(logits[:rows, :width], tuple(state[:rows, :width] for state in states))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("width", [2, 10, 14])
@torch.no_grad()
def test_padding_of_steps_with_extra_queries(name, width, one_thread, monkeypatch):
    """Rows and columns that fill a bucket, at the very end of the cache too; 14 is too wide for one forward."""
    model = INVARIANT_MODELS[name]()
    ids = torch.randint(3, 60, (3, 256), generator=torch.Generator().manual_seed(1))
    extra = ExtraQueries(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2, 2, 3]))
    starts, columns = torch.tensor([256 - 5 * width, 7, 2]), torch.tensor([0, width - 1, 1])
    results = []
    monkeypatch.setattr(invariant_network, "StepGraphs", PaddedSteps)
    with batch_invariant(model):
        for is_padded in (False, True):
            network = build_network(model, 3, 256)
            with network.running():
                network.kept.graphs = PaddedSteps(network.cache) if is_padded else None
                network.prefill(Rows(list(ids[:, : 256 - width]), width, 0, model.device))
                tokens = torch.stack([row[n : n + width] for row, n in zip(ids, starts, strict=True)])
                out = network.forward(tokens, starts, 256, (1, -1), extra_queries=extra)
                results.append((out.logits, *out.hidden_states, out.extra_logits(columns)))
                text = network.forward(tokens, starts, 256, (1, -1))
                results.append((text.logits, *text.hidden_states, results[0][-1]))
                fewer = ExtraQueries(extra.embeddings[:2], extra.ahead[:2])  # a graph of more serves them
                out = network.forward(tokens, starts, 256, (1, -1), extra_queries=fewer)
                behind = torch.cat([out.extra_logits(columns), results[0][-1][:, 2:]], 1)
                results.append((out.logits, *out.hidden_states, behind))
    assert set(network.kept.graphs_with_extra) == {2: {4}, 10: {4}, 14: {2}}[width]
    assert network.kept.num_slots == 256, "the first row ends where the texts do"
    for result in results[1:]:
        assert all(torch.equal(found, expected) for found, expected in zip(result, results[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", INVARIANT_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 10, 14])
@torch.no_grad()
def test_captured_steps_with_extra_queries(name, dtype, width):
    """Captured and replayed, with columns that fill a bucket (10), and too wide for one forward (14)."""
    model = INVARIANT_MODELS[name]().to("cuda", dtype)
    generator = torch.Generator().manual_seed(1)
    with batch_invariant(model):
        network, stock = build_network(model, 3, 100), StockNetwork(model, 3, 100)
        ids = torch.randint(3, 60, (3, 9 + width), generator=generator)
        lengths = torch.tensor([9, 7, 2])
        rows = Rows([row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)], 60, 0, model.device)
        used, results = 9 + width * 5, []
        with network.running(), stock.running():
            network.prefill(rows), stock.prefill(rows)
            for _ in range(2):
                extra = ExtraQueries(
                    torch.randn(4, 32, generator=generator).to("cuda", dtype), torch.tensor([1, 2, 2, 3]).cuda()
                )
                tokens, starts = ids[:, 9:].cuda(), lengths.cuda()
                outputs = [x.forward(tokens, starts, used, extra_queries=extra) for x in (network, stock)]
                columns = torch.tensor([0, width - 1, 1]).cuda()
                results.append([(x.logits.clone(), x.extra_logits(columns).clone()) for x in outputs])
            alone = network.forward(tokens, starts, 9 + width).logits
    for (text, queries), (stock_text, expected) in results:
        assert torch.equal(text, alone) and torch.equal(text, stock_text)
        if dtype == torch.float32:
            torch.testing.assert_close(queries, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("network_type", [FusedNetwork, NativeNetwork, StockNetwork])
@torch.no_grad()
def test_what_lies_behind_the_text_never_matters(network_type):
    """Whatever is in the slots from the next token on, as earlier queries leave it there."""
    model, extra = MODELS[tiny_mistral], torch.randn(3, 32)
    network = network_type(model, 2, 40)
    results = [step(network, model, extra, poison=poison, slots=35) for poison in (None, 1e4, -77.0)]
    for text, queries in results[1:]:
        assert torch.equal(text, results[0][0]) and torch.equal(queries, results[0][1])


def planted_end(found):
    """Queries see one token too many."""
    queries = found.seen[:, found.num_text :]
    num_seen = queries[..., : found.num_text].sum(-1, keepdim=True)
    queries.scatter_(2, num_seen, True)


def planted_own(found):
    """Queries do not see those before them."""
    queries = found.seen[:, found.num_text :, found.num_text :]
    queries &= torch.eye(queries.shape[-1], dtype=torch.bool)


def planted_places(found):
    """Queries stand one place too late."""
    found.places[:, found.num_text :] += 1


@pytest.mark.parametrize("bug", [planted_end, planted_own, planted_places])
@pytest.mark.parametrize("network_type", [FusedNetwork, NativeNetwork, StockNetwork])
def test_the_probe_finds_wrong_columns(monkeypatch, network_type, bug):
    model, original = MODELS[tiny_llama], Columns.branches
    assert probe(model, network_type(model, 2, 13), 0) < 1e-3

    def planted(*args):
        found = original(*args)
        bug(found)
        return found

    monkeypatch.setattr(Columns, "branches", staticmethod(planted))
    assert probe(model, network_type(model, 2, 13), 0) > 1e-2
