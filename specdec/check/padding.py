"""Prompts into a padded batch, and its rows out of it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def left_pad(prompts: Sequence[Tensor], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask of prompts that end in the same column, [rows, longest] int64 each."""
    shape = len(prompts), max(map(len, prompts))
    ids, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, shape[1] - len(prompt) :] = prompt
        mask[row, shape[1] - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def until_end(row: list[int], eos_token_ids: Sequence[int], pad_token_id: int) -> list[int]:
    """A batch's row without the padding after its end of sequence. Anything else after the end stays, to be seen."""
    end = next((i + 1 for i, token in enumerate(row) if token in eos_token_ids), len(row))
    return row[:end] if all(token == pad_token_id for token in row[end:]) else row
