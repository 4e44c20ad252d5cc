"""Tiny random models and the plain-greedy oracle of the equality tests."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from specdec.batch.layout import Ragged
from specdec.drafter import Context

VOCAB = 61


def tiny_llama(seed: int = 0, vocab_size: int = VOCAB, **options) -> PreTrainedModel:
    """A random two-layer Llama whose logits are spread enough that no argmax is a near-tie."""
    torch.manual_seed(seed)
    defaults = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **options})).eval()


def context_of(target: PreTrainedModel, max_draft_tokens: int) -> Context:
    """What a drafter that is started by hand gets."""
    return Context(SimpleNamespace(model=target), Ragged(), max_draft_tokens)


def tiny_mistral(window: int = 5) -> PreTrainedModel:
    """A random three-layer Mistral whose window is shorter than the texts."""
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=window, initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def left_pad(prompts: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [rows, longest] each."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def plain_greedy(model: PreTrainedModel, prompt: Tensor, **options) -> list[int]:
    """transformers' own greedy continuation of one prompt, the new tokens alone."""
    ids = prompt[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


def continuations(sequences: Tensor, num_columns: int, expected: Sequence[Sequence[int]], pad: int) -> list[list[int]]:
    """The rows' new tokens without the padding that their expected lengths leave; wrong padding stays visible."""
    rows = sequences[:, num_columns:].tolist()
    return [
        row[: len(want)] + [token for token in row[len(want) :] if token != pad]
        for row, want in zip(rows, expected, strict=True)
    ]
