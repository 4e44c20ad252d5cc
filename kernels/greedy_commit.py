"""Greedy verification and commit in one kernel: how far the draft agrees, what is appended, which rows end.

A draft token is accepted while it equals the target's argmax at its place; the first disagreement is replaced by the
target's token (recovered), and behind a fully accepted draft the target's next token is the bonus. The commit is cut
behind the first end-of-sequence token and at the row's length limit. Nothing is read back to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.dispatch import triton, uses_triton

if triton is not None:
    import triton.language as tl

NO_TOKEN = -1


class Committed(NamedTuple):
    """token_ids: [rows, k + 1] int64, NO_TOKEN behind the committed ones. num_committed (1 .. k + 1) and
    num_accepted (0 .. k): [rows] int64. finished: [rows] bool."""

    token_ids: Tensor
    num_committed: Tensor
    num_accepted: Tensor
    finished: Tensor


def greedy_commit(
    target_ids: Tensor,
    draft_ids: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    implementation: str = "auto",
) -> Committed:
    """Verify greedy drafts and append the result to every row.

    target_ids: [rows, k + 1] int64, the target's argmax behind each input token.
    draft_ids: [rows, k] int64, NO_TOKEN where nothing was drafted.
    eos_ids: [num_eos] int64, may be empty.
    token_ids: [rows, >= max(lengths) + k + 1] int64, written in place behind each row's length.
    lengths: [rows] int64, advanced in place. limits: [rows] int64, each at least lengths + 1.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.
    """
    if target_ids.shape[1] != draft_ids.shape[1] + 1:
        raise ValueError(f"target_ids has {target_ids.shape[1]} columns; {draft_ids.shape[1]} drafts need one more")
    if not uses_triton(implementation, target_ids):
        return greedy_commit_reference(target_ids, draft_ids, eos_ids, token_ids, lengths, limits)
    return _greedy_commit_triton(target_ids, draft_ids, eos_ids, token_ids, lengths, limits)


def greedy_commit_reference(
    target_ids: Tensor, draft_ids: Tensor, eos_ids: Tensor, token_ids: Tensor, lengths: Tensor, limits: Tensor
) -> Committed:
    """The same in plain torch."""
    num_agreed = (draft_ids == target_ids[:, :-1]).long().cumprod(1).sum(1)
    return commit(target_ids, num_agreed, eos_ids, token_ids, lengths, limits)


def commit(
    candidates: Tensor, num_agreed: Tensor, eos_ids: Tensor, token_ids: Tensor, lengths: Tensor, limits: Tensor
) -> Committed:
    """Append to every row its accepted drafts and the token behind them, cut at the end of sequence and the limit.

    candidates: [rows, k + 1] int64; the first num_agreed + 1 of a row count, the others must be valid token ids.
    num_agreed: [rows] int64, 0 .. k. The others are those of `greedy_commit`; token_ids and lengths change in place.
    """
    width = candidates.shape[1]
    column = torch.arange(width, device=candidates.device)
    num_committed = torch.minimum(num_agreed + 1, limits - lengths)
    is_eos = torch.isin(candidates, eos_ids) & (column < num_committed[:, None])
    through_eos = torch.where(is_eos, column + 1, width + 1).amin(1)
    num_committed = torch.minimum(num_committed, through_eos)
    token_ids.scatter_(1, lengths[:, None] + column, candidates)
    lengths += num_committed
    committed = candidates.masked_fill(column >= num_committed[:, None], NO_TOKEN)
    finished = (through_eos <= width) | (lengths >= limits)
    return Committed(committed, num_committed, torch.minimum(num_agreed, num_committed), finished)


def _greedy_commit_triton(
    target_ids: Tensor, draft_ids: Tensor, eos_ids: Tensor, token_ids: Tensor, lengths: Tensor, limits: Tensor
) -> Committed:
    num_rows, width = target_ids.shape
    out = empty_committed(num_rows, width, lengths.device)
    _greedy_commit_kernel[(num_rows,)](
        target_ids.contiguous(),
        draft_ids.contiguous(),
        eos_ids,
        token_ids,
        lengths,
        limits,
        *out,
        width,
        eos_ids.numel(),
        token_ids.stride(0),
        BLOCK=triton.next_power_of_2(width),
    )
    return out


def empty_committed(num_rows: int, width: int, device: torch.device) -> Committed:
    """Uninitialised tensors for a kernel to fill; width is k + 1."""
    shapes = ((num_rows, width), (num_rows,), (num_rows,), (num_rows,))
    dtypes = (torch.long, torch.long, torch.long, torch.bool)
    return Committed(*(torch.empty(s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True)))


if triton is not None:

    @triton.jit
    def commit_row(
        candidates,  # [BLOCK], of which the first num_agreed + 1 count
        num_agreed,
        column,  # arange(BLOCK)
        row,
        eos_ptr,
        tokens_ptr,
        lengths_ptr,
        limits_ptr,
        out_ptr,
        num_committed_ptr,
        num_accepted_ptr,
        finished_ptr,
        width,
        num_eos,
        tokens_stride,
    ):
        """`commit` for one row, inside a kernel."""
        length = tl.load(lengths_ptr + row)
        limit = tl.load(limits_ptr + row)
        num_committed = tl.minimum(num_agreed + 1, (limit - length).to(tl.int32))
        is_eos = column < 0
        for i in range(num_eos):
            is_eos = is_eos | (candidates == tl.load(eos_ptr + i))
        through_eos = tl.min(tl.where(is_eos & (column < num_committed), column + 1, width + 1), 0)
        num_committed = tl.minimum(num_committed, through_eos)
        kept = column < num_committed
        tl.store(tokens_ptr + row * tokens_stride + length + column, candidates, mask=kept)
        tl.store(out_ptr + row * width + column, tl.where(kept, candidates, -1), mask=column < width)
        tl.store(num_committed_ptr + row, num_committed.to(tl.int64))
        tl.store(num_accepted_ptr + row, tl.minimum(num_agreed, num_committed).to(tl.int64))
        tl.store(finished_ptr + row, (through_eos <= width) | (length + num_committed >= limit))
        tl.store(lengths_ptr + row, length + num_committed)

    @triton.jit
    def _greedy_commit_kernel(
        target_ptr,
        draft_ptr,
        eos_ptr,
        tokens_ptr,
        lengths_ptr,
        limits_ptr,
        out_ptr,
        num_committed_ptr,
        num_accepted_ptr,
        finished_ptr,
        width,
        num_eos,
        tokens_stride,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        target = tl.load(target_ptr + row * width + column, mask=inside, other=-1)
        draft = tl.load(draft_ptr + row * (width - 1) + column, mask=column < width - 1, other=-2)
        num_agreed = tl.min(tl.where((target != draft) & inside, column, width - 1), 0)
        commit_row(
            target, num_agreed, column, row, eos_ptr, tokens_ptr, lengths_ptr, limits_ptr, out_ptr,
            num_committed_ptr, num_accepted_ptr, finished_ptr, width, num_eos, tokens_stride,
        )  # fmt: skip
