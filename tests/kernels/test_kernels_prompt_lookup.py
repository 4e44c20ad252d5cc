"""Prompt lookup: the torch reference and the kernel against a search by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels import prompt_lookup as module
from specdec.kernels.prompt_lookup import NO_TOKEN, prompt_lookup


def lookup_by_hand(tokens, num_tokens, longest, shortest):
    """The longest n-gram that ends the text and occurs before; its latest occurrence; the copy may run into itself."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 2, size - 2, -1):
            if tokens[end - size + 1 : end + 1] == tokens[-size:]:
                copy = list(tokens)
                for place in range(num_tokens):
                    copy.append(copy[end + 1 + place])
                return copy[len(tokens) :]
    return [NO_TOKEN] * num_tokens


def check(texts, num_tokens, longest, shortest, implementation, device="cpu"):
    """Behind a text stands what would match everywhere: its own newest token."""
    shortest, longest_text = min(shortest, longest), max(map(len, texts))
    rows = [text + text[-1:] * (longest_text + 2 - len(text)) for text in texts]
    lengths = torch.tensor([len(text) for text in texts], device=device)
    found = prompt_lookup(
        torch.tensor(rows, device=device), lengths, longest_text, num_tokens, longest, shortest, implementation
    )
    assert found.tolist() == [lookup_by_hand(text, num_tokens, longest, shortest) for text in texts]


texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=5)
sizes = st.integers(1, 4)


@given(texts, st.integers(1, 6), sizes, sizes)
@settings(max_examples=200, deadline=None)
def test_reference_equals_a_search_by_hand(texts, num_tokens, longest, shortest):
    check(texts, num_tokens, longest, shortest, "torch")


@pytest.mark.interpreter
@pytest.mark.parametrize("block", [4, 1024])
def test_kernel_in_the_interpreter_equals_a_search_by_hand(monkeypatch, block):
    """Texts of several blocks among them."""
    monkeypatch.setattr(module, "BLOCK", block)

    @given(texts, st.integers(1, 6), sizes, sizes)
    @settings(max_examples=40, deadline=None)
    def on_any(texts, num_tokens, longest, shortest):
        check(texts, num_tokens, longest, shortest, "triton")

    on_any()


@pytest.mark.gpu
def test_kernel_on_a_gpu_equals_a_search_by_hand():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 5, 100, 1023, 1025, 3000):
        for vocab in (2, 40, 900):
            texts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in (length, 1, length // 2 + 1)]
            for num_tokens, longest, shortest in ((1, 1, 1), (5, 3, 1), (20, 4, 3)):
                check(texts, num_tokens, longest, shortest, "triton", "cuda")


def test_more_tokens_than_there_are_are_refused():
    with pytest.raises(ValueError, match="do not hold 4 tokens"):
        prompt_lookup(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, dtype=torch.long), 4, 2, 3, 1)
