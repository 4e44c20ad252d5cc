"""What each column of a forward sees: against the definition, and in every network against the plain chain."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama, tiny_mistral
from transformers.masking_utils import sliding_window_causal_mask_function

from specdec import batch_invariant
from specdec.batch.columns import Columns, ancestors
from specdec.batch.layout import Ragged, Repad
from specdec.batch.rows import Rows
from specdec.kernels.attention.ragged_attention import is_shown
from specdec.network.choose import build_network
from specdec.network.fused import FusedNetwork
from specdec.network.invariant.network import InvariantNetwork
from specdec.network.native.network import NativeNetwork
from specdec.network.stock import StockNetwork


@dataclass
class Case:
    """Columns, and of each row what they are by definition, in slots counted from `begins`.

    committed: slots before it are seen by all. parents: of each column. places: of each column.
    """

    columns: Columns
    committed: list[int]
    begins: list[int]
    parents: list[list[int]]
    places: list[list[int]]

    def path(self, row, column):
        """The column and all above it."""
        found = [column]
        while self.parents[row][found[-1]] >= 0:
            found.append(self.parents[row][found[-1]])
        return found

    def sees(self, row, column, window):
        """The slots that a column sees, ascending."""
        place = self.places[row][column]
        places = {slot: slot for slot in range(self.committed[row])}
        places |= {self.begins[row] + other: self.places[row][other] for other in self.path(row, column)}
        return sorted(slot for slot, at in places.items() if window is None or at > place - window)

    @property
    def num_slots(self):
        return max(self.begins) + len(self.places[0])


STARTS = st.lists(st.integers(0, 9), min_size=1, max_size=3)


@st.composite
def chains(draw):
    starts, width = draw(STARTS), draw(st.integers(1, 6))
    columns = Columns.chain(torch.tensor(starts), width)
    assert columns.is_chain and columns.places is columns.slots
    places = [list(range(start, start + width)) for start in starts]
    return Case(columns, starts, starts, [list(range(-1, width - 1))] * len(starts), places)


@st.composite
def trees(draw):
    """Any parents before their children: several roots, chains, stars."""
    starts, width = draw(STARTS), draw(st.integers(1, 8))
    parents = [[draw(st.integers(-1, column - 1)) for column in range(width)] for _ in starts]
    places = []
    for start, above in zip(starts, parents, strict=True):
        depths = []
        for parent in above:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        places.append([start + depth for depth in depths])
    return Case(Columns.tree(torch.tensor(starts), torch.tensor(parents)), starts, starts, parents, places)


@st.composite
def queries_ahead(draw):
    """Some of them in one place, as `ExtraQueries` allows."""
    length = draw(st.integers(1, 3))
    return list(accumulate((draw(st.integers(1, rank)) for rank in range(1, length + 1)), max))


@st.composite
def branch_layouts(draw):
    starts, num_tokens, ahead = draw(STARTS), draw(st.integers(1, 5)), draw(queries_ahead())
    num_branches = draw(st.integers(1, 4))
    token = st.integers(0, num_tokens - 1)
    after = [[draw(token) for _ in range(num_branches)] for _ in range(draw(st.sampled_from([1, len(starts)])))]
    columns = Columns.branches(torch.tensor(starts), num_tokens, torch.tensor(after), torch.tensor(ahead))
    after = after if len(after) == len(starts) else after * len(starts)
    parents, places = [], []
    for start, row in zip(starts, after, strict=True):
        above, at = list(range(-1, num_tokens - 1)), list(range(start, start + num_tokens))
        for token in row:
            begin = len(above)
            above += [token, *range(begin, begin + len(ahead) - 1)]
            at += [start + token + distance for distance in ahead]
        parents.append(above), places.append(at)
    return Case(columns, starts, starts, parents, places)


@st.composite
def branches_alone(draw):
    starts, num_tokens, ahead = draw(STARTS), draw(st.integers(1, 5)), draw(queries_ahead())
    after = [draw(st.integers(0, num_tokens - 1)) for _ in starts]
    columns = Columns.branch_alone(torch.tensor(starts), num_tokens, torch.tensor(after), torch.tensor(ahead))
    committed = [start + column + 1 for start, column in zip(starts, after, strict=True)]
    places = [[end - 1 + distance for distance in ahead] for end in committed]
    begins = [start + num_tokens for start in starts]
    return Case(columns, committed, begins, [list(range(-1, len(ahead) - 1))] * len(starts), places)


CASES = st.one_of(chains(), trees(), branch_layouts(), branches_alone())
WINDOWS = st.one_of(st.none(), st.integers(1, 9))


@given(CASES, WINDOWS, st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_mask_spans_and_bits_follow_the_definition(case, window, spare):
    columns, num_slots = case.columns, case.num_slots + spare
    mask, spans, bits = columns.mask(num_slots, window), columns.spans(num_slots, window), columns.bits(window)
    assert mask.dtype == torch.bool and spans.dtype == torch.int32 and bits.dtype == torch.int64
    assert spans.is_contiguous() and bits.is_contiguous() and bits.shape == columns.slots.shape
    slots = torch.arange(num_slots)
    for row, begin in enumerate(case.begins):
        assert columns.slots[row].tolist() == [begin + column for column in range(len(case.places[row]))]
        assert columns.places[row].tolist() == case.places[row]
        for column in range(len(case.places[row])):
            expected = case.sees(row, column, window)
            assert mask[row, column].nonzero()[:, 0].tolist() == expected
            first, end, origin = spans[row, column].tolist()
            shown = is_shown(bits[row, column], slots - columns.committed[row])
            looked_at = (slots >= first) & (slots < end) & shown
            assert looked_at.nonzero()[:, 0].tolist() == expected and origin == 0
            if columns.is_chain:
                assert list(range(first, end)) == expected, "no bits are needed"


@given(CASES, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_models_own_rule_counts_places(case, size):
    """Sliding as a rule is sliding as a window; chunks begin at multiples of their size."""
    columns, num_slots = case.columns, case.num_slots
    sliding = columns.mask_by(sliding_window_causal_mask_function(size), num_slots)
    assert torch.equal(sliding[:, 0], columns.mask(num_slots, size))
    chunked = columns.mask_by(lambda row, head, query, key: (key // size == query // size) & (key <= query), num_slots)
    for row, places in enumerate(case.places):
        for column, place in enumerate(places):
            of_slot = dict(zip(columns.slots[row].tolist(), places, strict=True))
            expected = [s for s in case.sees(row, column, None) if of_slot.get(s, s) // size == place // size]
            assert chunked[row, 0, column].nonzero()[:, 0].tolist() == expected


@given(CASES, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_rows_after_padding_see_the_same(case, num_pads):
    """What is seen moves with the padding; the padding itself is the caller's to hide."""
    pads = torch.full((len(case.begins),), num_pads)
    moved = case.columns.after_pads(pads).mask(case.num_slots + num_pads, 4)
    expected = case.columns.mask(case.num_slots, 4)
    own = (
        torch.arange(case.num_slots) >= case.columns.places[..., None] - 3
    )  # of later rows the window ends in the pads
    assert torch.equal(moved[:, :, num_pads:] & own, expected & own)


def test_rows_that_pad_a_graph_see_nothing():
    columns = Columns.chain(torch.tensor([3, 10]), 2)
    assert columns.spans(20, None, num_text_slots=10).tolist() == [[[0, 4, 0], [0, 5, 0]], [[11, 11, 0], [12, 12, 0]]]


def test_a_chain_written_as_a_tree_is_the_chain():
    starts, width = torch.tensor([4, 0]), 33
    chain, tree = Columns.chain(starts, width), Columns.tree(starts, torch.arange(-1, width - 1)[None])
    assert torch.equal(chain.places, tree.places) and torch.equal(chain.bits(), tree.bits())
    assert torch.equal(chain.mask(40, 7), tree.mask(40, 7)) and torch.equal(chain.bits(7), tree.bits(7))


def test_the_deepest_and_the_widest_tree_fill_the_bits():
    deep = ancestors(torch.arange(-1, 63)[None])
    assert torch.equal(deep[0], torch.ones(64, 64).tril().bool())
    star = Columns.tree(torch.tensor([9]), torch.tensor([[-1] + 63 * [0]]))
    assert star.bits()[0].tolist() == [1] + [1 | 1 << column for column in range(1, 63)] + [1 - (1 << 63)]
    with pytest.raises(AssertionError, match="65 columns exceed the 64 bits"):
        Columns.chain(torch.tensor([0]), 65).bits()


def tree_logits(network, prompts, tokens, starts, parents):
    """Logits of every node, [rows, nodes, vocab], with junk in the slots that no node may see."""
    rows = Rows(prompts, tokens.shape[1], 0, torch.device("cpu"))
    with network.running():
        network.prefill(rows)
        for layer in network.cache.layers if network.cache.pads is None else ():
            for row, start in enumerate(starts):
                layer.keys[row, start:], layer.values[row, start:] = 1e3, -1e3
        return network.forward(tokens, rows.lengths, max(starts) + tokens.shape[1], (), None, parents=parents).logits


def chain_logits(model, prompts, tokens, parents):
    """The same by the model's own uncached forward over the text that ends in each node."""
    rows = []
    for prompt, row, above in zip(prompts, tokens.tolist(), parents.tolist(), strict=True):
        found = []
        for column in range(len(row)):
            path, at = [], column
            while at >= 0:
                path, at = [row[at], *path], above[at]
            ids = torch.cat([prompt, torch.tensor(path)])[None]
            found.append(model(input_ids=ids, use_cache=False).logits[0, -1])
        rows.append(torch.stack(found))
    return torch.stack(rows)


NETWORKS = {
    "fused": lambda model, *size: FusedNetwork(model, *size),
    "fused, repadded": lambda model, *size: FusedNetwork(model, *size, layout=Repad()),
    "native": lambda model, *size: NativeNetwork(model, *size),
    "native, repadded": lambda model, *size: NativeNetwork(model, *size, layout=Repad()),
    "stock": lambda model, *size: StockNetwork(model, *size),
    "stock, repadded": lambda model, *size: StockNetwork(model, *size, layout=Repad()),
    "invariant": lambda model, *size: build_network(model, *size),
    "stock, invariant": lambda model, *size: StockNetwork(model, *size, layout=Ragged()),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral])
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_nodes_logits_are_those_of_the_text_that_ends_in_it(kind, build, data):
    model, width, starts = build(), data.draw(st.integers(1, 9)), [9, 6, 2]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    prompts = [torch.randint(3, 60, (start,), generator=generator) for start in starts]
    tokens = torch.randint(3, 60, (len(starts), width), generator=generator)
    parents = torch.tensor([[data.draw(st.integers(-1, c - 1)) for c in range(width)] for _ in starts])
    with torch.no_grad():
        expected = chain_logits(model, prompts, tokens, parents)
        if "invariant" in kind:
            with batch_invariant(model):
                network = NETWORKS[kind](model, len(starts), max(starts) + width)
                assert isinstance(network, InvariantNetwork) == (kind == "invariant")
                logits = tree_logits(network, prompts, tokens, starts, parents)
        else:
            network = NETWORKS[kind](model, len(starts), max(starts) + width)
            logits = tree_logits(network, prompts, tokens, starts, parents)
    torch.testing.assert_close(logits, expected, rtol=3e-4, atol=3e-4)
