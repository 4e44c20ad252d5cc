"""KV compaction: against a copy row by row, and the kernel against the torch reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.batch.cache import RaggedCache
from specdec.batch.slots import Slots, moves_of
from specdec.kernels.move_rows import is_sequential, move_rows


@st.composite
def departures(draw):
    """(order after rows have left, number of rows), as slots make it: residents fill holes, newcomers close up."""
    residents, newcomers = draw(st.integers(1, 9)), draw(st.integers(0, 4))
    slots = Slots(residents + newcomers, 3, torch.device("cpu"))
    slots.num_residents, slots.num_newcomers = residents, newcomers
    rows = st.lists(st.integers(0, residents + newcomers - 1), unique=True)
    return slots.remove(np.array(draw(rows), dtype=np.int64)).numpy(), residents + newcomers


def check(order, num_rows, num_filled, implementation, device="cpu", dtype=torch.float32, width=7):
    buffers = torch.arange(3 * num_rows * 5 * width, device=device).to(dtype).view(3, num_rows, 5, width)
    expected = buffers.clone()
    for slot, source in enumerate(order):
        expected[:, slot, :num_filled] = buffers[:, source, :num_filled]
    moves = torch.from_numpy(moves_of(order))
    assert is_sequential(moves)
    move_rows(buffers, moves.to(device), num_filled, implementation)
    assert torch.equal(buffers, expected), "a row went astray, or more moved than is filled"


@given(departures(), st.integers(0, 5))
@settings(deadline=None)
def test_reference_equals_row_by_row(departure, num_filled):
    check(*departure, num_filled, "torch")


@pytest.mark.interpreter
@given(departures(), st.integers(0, 5), st.sampled_from([1, 7, 1000]))
@settings(max_examples=30, deadline=None)
def test_kernel_in_the_interpreter_equals_row_by_row(departure, num_filled, width):
    check(*departure, num_filled, "triton", width=width)


@pytest.mark.gpu
@given(departures(), st.integers(0, 5), st.sampled_from([1, 7, 1000]))
@settings(max_examples=50, deadline=None)
def test_kernel_on_a_gpu_equals_row_by_row(departure, num_filled, width):
    check(*departure, num_filled, "triton", "cuda", torch.int16, width)


def test_a_swap_is_not_sequential_and_still_served():
    """A kernel that moves one row after the other would lose one of them."""
    swap = moves_of(np.array([1, 0]))
    assert not is_sequential(torch.from_numpy(swap))
    cache = RaggedCache(2, 2, 4, torch.device("cpu"))
    cache.allocate(1, 3, torch.float32)
    cache.num_filled = 4
    before = torch.randn(2, 4, 1, 3)
    for layer in cache.layers:
        layer.keys.copy_(before)
    cache.keep_rows(torch.tensor([1, 0]))
    assert all(torch.equal(layer.keys, before.flip(0)) for layer in cache.layers)


def test_layers_allocated_in_one_piece_are_apart():
    cache = RaggedCache(2, 3, 4, torch.device("cpu"))
    cache.allocate(2, 5, torch.float32)
    cache.num_filled = 2
    for i, layer in enumerate(cache.layers):
        layer.keys.fill_(i), layer.values.fill_(10 + i)
        layer.keys[2], layer.values[2] = 20 + i, 30 + i
    cache.keep_rows(torch.tensor([0, 2]))
    for i, layer in enumerate(cache.layers):
        assert layer.keys.shape == (3, 4, 2, 5) and layer.keys.is_contiguous()
        assert layer.keys.data_ptr() % 16 == layer.values.data_ptr() % 16 == 0
        assert layer.keys[1, :2].eq(20 + i).all() and layer.values[1, :2].eq(30 + i).all()
        assert layer.keys[1, 2:].eq(i).all() and layer.values[0].eq(10 + i).all()
    assert cache.nbytes == 2 * 2 * 3 * 4 * 2 * 5 * 4


def test_buffers_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="do not hold 6 slots"):
        move_rows(torch.zeros(1, 2, 5, 3), torch.zeros(2, 0, dtype=torch.long), 6)
