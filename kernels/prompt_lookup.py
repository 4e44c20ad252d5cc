"""Prompt lookup in one launch: the tokens after the latest of the longest earlier matches of the newest tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.dispatch import kernel, triton, uses_triton

if triton is not None:
    import triton.language as tl

NO_TOKEN = -1
BLOCK = 1024


def prompt_lookup(
    token_ids: Tensor,
    lengths: Tensor,
    max_length: int,
    num_tokens: int,
    max_ngram_size: int,
    min_ngram_size: int,
    implementation: str = "auto",
) -> Tensor:
    """Copy the tokens after an earlier occurrence of the newest n-gram, [rows, num_tokens] int64; NO_TOKEN without one.

    The longest n-gram of min_ngram_size to max_ngram_size tokens that occurs earlier wins, and of its occurrences the
    latest. When the copy reaches the newest token it continues with itself, so a loop is drafted to any length.

    token_ids: [rows, >= max_length] int64, the last dimension contiguous. lengths: [rows] int64, 1 to max_length each;
    tokens past them are not read.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the reference on the host elsewhere.
    """
    if token_ids.dim() != 2 or token_ids.stride(1) != 1 or not 1 <= max_length <= token_ids.shape[1]:
        raise ValueError(
            f"token_ids {list(token_ids.shape)} with strides {token_ids.stride()} do not hold {max_length} tokens"
        )
    serve = _prompt_lookup_triton if uses_triton(implementation, token_ids) else prompt_lookup_reference
    return serve(token_ids, lengths, max_length, num_tokens, max_ngram_size, min_ngram_size)


def prompt_lookup_reference(
    token_ids: Tensor, lengths: Tensor, max_length: int, num_tokens: int, max_ngram_size: int, min_ngram_size: int
) -> Tensor:
    """The same on the host, in numpy: for tensors this small, calls into torch take several times as long."""
    tokens, last = token_ids[:, :max_length].cpu().numpy(), lengths.cpu().numpy()[:, None] - 1
    place = np.arange(max_length)
    # score[b, i]: how many tokens ending at place i equal the row's newest ones, times max_length, and i.
    score, agrees = np.repeat(place[None], len(tokens), 0), place < last  # an occurrence must have a successor
    for offset in range(min(max_ngram_size, max_length)):
        newest = np.take_along_axis(tokens, np.maximum(last - offset, 0), 1)  # at 0 nothing agrees
        # agrees[b, j]: whether the tokens from place j to j + offset agree.
        agrees = agrees[:, min(offset, 1) :] & (tokens[:, : max_length - offset] == newest)
        score[:, offset:] += max_length * agrees
    end = score.argmax(1)[:, None]
    source = end + 1 + np.arange(num_tokens) % np.maximum(last - end, 1)
    draft = np.take_along_axis(tokens, np.minimum(source, max_length - 1), 1)
    draft[score.max(1) < min_ngram_size * max_length] = NO_TOKEN
    return torch.from_numpy(draft).to(token_ids.device)


def _prompt_lookup_triton(
    token_ids: Tensor, lengths: Tensor, max_length: int, num_tokens: int, max_ngram_size: int, min_ngram_size: int
) -> Tensor:
    draft = torch.empty(len(token_ids), num_tokens, dtype=torch.long, device=token_ids.device)
    if draft.numel():
        _prompt_lookup_kernel[(len(token_ids),)](
            token_ids, lengths, draft, token_ids.stride(0), max_length, num_tokens, max_ngram_size, min_ngram_size,
            BLOCK=BLOCK, DRAFT_BLOCK=triton.next_power_of_2(num_tokens),
        )  # fmt: skip
    return draft


if triton is not None:

    @kernel(do_not_specialize=["max_length", "num_tokens", "max_ngram_size", "min_ngram_size"])
    def _prompt_lookup_kernel(
        tokens_ptr, lengths_ptr, draft_ptr, row_stride, max_length, num_tokens, max_ngram_size, min_ngram_size,
        BLOCK: tl.constexpr, DRAFT_BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        tokens_ptr += row * row_stride
        last = tl.load(lengths_ptr + row) - 1
        # The best match of each lane: n-gram size first, then the place of its end.
        best = tl.zeros([BLOCK], dtype=tl.int64)
        for begin in range(0, max_length, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            agrees = place < last
            matched = tl.zeros([BLOCK], dtype=tl.int64)
            for offset in range(max_ngram_size):
                newest = tl.load(tokens_ptr + tl.maximum(last - offset, 0))
                agrees = agrees & (place >= offset)
                agrees = agrees & (tl.load(tokens_ptr + place - offset, mask=agrees, other=-1) == newest)
                matched += agrees.to(tl.int64)
            best = tl.maximum(best, tl.where(place < last, matched * max_length + place, 0))
        top = tl.max(best, 0)
        end = top % max_length
        column = tl.arange(0, DRAFT_BLOCK)
        source = tl.minimum(end + 1 + column % tl.maximum(last - end, 1), max_length - 1)
        draft = tl.where(top >= min_ngram_size * max_length, tl.load(tokens_ptr + source), -1)
        tl.store(draft_ptr + row * num_tokens + column, draft, mask=column < num_tokens)
