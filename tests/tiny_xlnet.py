"""Tiny random XLNets, and their conditionals token by token."""

from __future__ import annotations

import torch
from transformers import XLNetConfig, XLNetLMHeadModel


def tiny_xlnet(seed: int = 0, vocab_size: int = 11, spread: float = 0.5, **options) -> XLNetLMHeadModel:
    """The last token of the vocabulary is the mask."""
    torch.manual_seed(seed)
    defaults = dict(
        vocab_size=vocab_size, d_model=16, n_layer=2, n_head=2, d_inner=32, mask_token_id=vocab_size - 1,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = XLNetLMHeadModel(XLNetConfig(**{**defaults, **options})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 or parameter.shape[0] == vocab_size:
            torch.nn.init.normal_(parameter, std=spread)
    return model
