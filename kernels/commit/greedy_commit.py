"""Greedy verification and commit: how far the draft agrees, what is appended, which rows end.

A draft token is accepted while it equals the target's argmax at its place; the first disagreement is replaced by the
target's token (recovered), and after a fully accepted draft the target's next token is the bonus. The commit is cut
after the first end-of-sequence token and at the row's length limit. Nothing is read back to the host.

On a GPU two launches: the best of every block of the vocabulary, then one program a row that decides and commits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.commit.block_statistics import tiles_of
from specdec.kernels.dispatch import kernel, triton, uses_triton

if triton is not None:
    import triton.language as tl

NO_TOKEN = -1
BAD_SCORES = 1  # a fault: the scores hold a NaN at a place that counts
# Columns of a report; the committed tokens follow them.
NUM_COMMITTED, NUM_ACCEPTED, NUM_DRAFTED, FINISHED, FAULT, FIRST_TOKEN = range(6)


@dataclass(frozen=True)
class Committed:
    """What a step did to each row.

    report: [rows, 5 + k + 1] int64, for the host to read in one copy: num_committed (1 .. k + 1), num_accepted (0 ..
        k), num_drafted, finished, fault (0 = none; what the row committed means nothing otherwise), and the committed
        tokens, NO_TOKEN after them.
    """

    report: Tensor

    @property
    def token_ids(self) -> Tensor:
        return self.report[:, FIRST_TOKEN:]

    @property
    def num_committed(self) -> Tensor:
        return self.report[:, NUM_COMMITTED]

    @property
    def num_accepted(self) -> Tensor:
        return self.report[:, NUM_ACCEPTED]

    @property
    def finished(self) -> Tensor:
        return self.report[:, FINISHED].bool()

    @property
    def fault(self) -> Tensor:
        """May be added to."""
        return self.report[:, FAULT]


def greedy_commit(
    scores: Tensor,
    draft_ids: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    passes: Tensor | None = None,
    implementation: str = "auto",
) -> Committed:
    """Verify greedy drafts and append the result to every row.

    scores: [rows, k + 1, vocab] float, the target's after each input token. Of equal ones the lowest index wins; a
        NaN is a fault, and wins over all others.
    draft_ids: [rows, k] int64, NO_TOKEN where nothing was drafted.
    eos_ids: [num_eos] int64 of all rows, or [rows, num_eos] of each, filled up with -1; may be empty.
    token_ids: [rows, >= max(lengths) + k + 1] int64, written in place after each row's length.
    lengths: [rows] int64, advanced in place. limits: [rows] int64, each at least lengths + 1.
    passes: [rows, k] bool, drafts to accept that are not the argmax, of a lossy rule.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.
    """
    if scores.dim() != 3 or scores.shape[1] != draft_ids.shape[1] + 1:
        raise ValueError(f"scores {list(scores.shape)} need {draft_ids.shape[1] + 1} places for as many drafts and one")
    serve = _greedy_commit_triton if uses_triton(implementation, scores) else greedy_commit_reference
    return serve(scores, draft_ids, eos_ids, token_ids, lengths, limits, passes)


def greedy_commit_reference(
    scores: Tensor,
    draft_ids: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    passes: Tensor | None = None,
) -> Committed:
    """The same in plain torch."""
    best, target_ids = scores.max(-1)  # a NaN anywhere is the maximum
    if passes is not None:
        target_ids[:, :-1] = torch.where(passes, draft_ids, target_ids[:, :-1])
    num_agreed = (draft_ids == target_ids[:, :-1]).long().cumprod(1).sum(1)
    done = commit(target_ids, num_agreed, draft_ids, eos_ids, token_ids, lengths, limits)
    done.fault.copy_(nan_within(best.isnan(), done.num_accepted) * BAD_SCORES)
    return done


def nan_within(is_nan: Tensor, num_accepted: Tensor) -> Tensor:
    """[rows] bool: a NaN at a place that counts. After a rejected draft anything may stand. is_nan: [rows, k + 1]."""
    column = torch.arange(is_nan.shape[1], device=is_nan.device)
    return (is_nan & (column <= num_accepted[:, None])).any(1)


def is_end(candidates: Tensor, eos_ids: Tensor) -> Tensor:
    """Which tokens end their row, [rows, width] bool. eos_ids: [num_eos] or [rows, num_eos]."""
    if eos_ids.dim() == 1:
        return torch.isin(candidates, eos_ids)
    return (candidates[:, :, None] == eos_ids[:, None]).any(2)


def eos_shape(eos_ids: Tensor) -> tuple[int, int]:
    """How many ends of sequence a row has, and how far apart those of two rows lie."""
    return eos_ids.shape[-1], 0 if eos_ids.dim() == 1 else eos_ids.stride(0)


def commit(
    candidates: Tensor,
    num_agreed: Tensor,
    draft_ids: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
) -> Committed:
    """Append to every row its accepted drafts and the token after them, cut at the end of sequence and the limit.

    candidates: [rows, k + 1] int64; the first num_agreed + 1 of a row count, the others must be valid token ids.
    num_agreed: [rows] int64, 0 .. k. The others are those of `greedy_commit`; token_ids and lengths change in place.
    The report knows of no fault.
    """
    width = candidates.shape[1]
    column = torch.arange(width, device=candidates.device)
    num_committed = torch.minimum(num_agreed + 1, limits - lengths)
    is_eos = is_end(candidates, eos_ids) & (column < num_committed[:, None])
    through_eos = torch.where(is_eos, column + 1, width + 1).amin(1)
    num_committed = torch.minimum(num_committed, through_eos)
    token_ids.scatter_(1, lengths[:, None] + column, candidates)
    lengths += num_committed
    committed = candidates.masked_fill(column >= num_committed[:, None], NO_TOKEN)
    finished = (through_eos <= width) | (lengths >= limits)
    num_accepted, num_drafted = torch.minimum(num_agreed, num_committed), (draft_ids != NO_TOKEN).sum(1)
    columns = torch.stack([num_committed, num_accepted, num_drafted, finished.long(), torch.zeros_like(lengths)], 1)
    return Committed(torch.cat([columns, committed], 1))


def _greedy_commit_triton(
    scores: Tensor,
    draft_ids: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    passes: Tensor | None,
) -> Committed:
    num_rows, width, vocab = scores.shape
    tiles = tiles_of(vocab)
    best, best_ids = best_of_blocks(scores)
    report = empty_report(num_rows, width, scores.device)
    _greedy_commit_kernel[(num_rows,)](
        best, best_ids, tiles.num_blocks, draft_ids.contiguous(), None if passes is None else passes.contiguous(),
        eos_ids, token_ids, lengths, limits, report, width, *eos_shape(eos_ids), token_ids.stride(0),
        HAS_PASSES=passes is not None, BLOCK=triton.next_power_of_2(width), NUM_BLOCKS=tiles.padded,
    )  # fmt: skip
    return Committed(report)


def best_of_blocks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score of every block of the vocabulary and its lowest index, for `best_of_partials`.

    scores: [rows, places, vocab] float; a NaN is the largest.
    Returns [rows, places, num_blocks] float32 (float64 for float64 scores) and int32.
    """
    scores = scores if scores.stride(2) == 1 else scores.contiguous()
    num_rows, width, vocab = scores.shape
    tiles, device = tiles_of(vocab), scores.device
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    best = torch.empty(num_rows, width, tiles.num_blocks, dtype=dtype, device=device)
    best_ids = torch.empty(num_rows, width, tiles.num_blocks, dtype=torch.int32, device=device)

    _best_kernel[(num_rows * width, tiles.num_blocks)](
        scores, vocab, width, scores.stride(0), scores.stride(1), best, best_ids,
        VOCAB_BLOCK=tiles.size, num_warps=tiles.num_warps,
    )  # fmt: skip
    return best, best_ids


def empty_report(num_rows: int, width: int, device: torch.device) -> Tensor:
    """For a kernel to fill; width is k + 1."""
    return torch.empty(num_rows, FIRST_TOKEN + width, dtype=torch.long, device=device)


if triton is not None:

    @triton.jit
    def commit_row(
        candidates,  # [BLOCK], of which the first num_agreed + 1 count
        num_agreed,
        num_drafted,
        is_nan,  # [BLOCK], at the places up to num_agreed
        column,  # arange(BLOCK)
        row,
        eos_ptr,
        tokens_ptr,
        lengths_ptr,
        limits_ptr,
        report_ptr,
        width,
        num_eos,
        eos_stride,
        tokens_stride,
    ):
        """`commit` for one row, inside a kernel, and whether a place that counts is NaN."""
        length = tl.load(lengths_ptr + row)
        limit = tl.load(limits_ptr + row)
        num_committed = tl.minimum(num_agreed + 1, (limit - length).to(tl.int32))
        is_eos = column < 0
        for i in range(num_eos):
            is_eos = is_eos | (candidates == tl.load(eos_ptr + row * eos_stride + i))
        through_eos = tl.min(tl.where(is_eos & (column < num_committed), column + 1, width + 1), 0)
        num_committed = tl.minimum(num_committed, through_eos)
        num_accepted = tl.minimum(num_agreed, num_committed)
        finished = (through_eos <= width) | (length + num_committed >= limit)
        fault = tl.max((is_nan & (column <= num_accepted)).to(tl.int32), 0)
        kept = column < num_committed
        tl.store(tokens_ptr + row * tokens_stride + length + column, candidates, mask=kept)
        report_ptr += row * (width + 5)  # FIRST_TOKEN columns before the tokens
        tl.store(report_ptr + 5 + column, tl.where(kept, candidates, -1), mask=column < width)
        tl.store(report_ptr, num_committed.to(tl.int64))
        tl.store(report_ptr + 1, num_accepted.to(tl.int64))
        tl.store(report_ptr + 2, num_drafted.to(tl.int64))
        tl.store(report_ptr + 3, finished.to(tl.int64))
        tl.store(report_ptr + 4, fault.to(tl.int64))
        tl.store(lengths_ptr + row, length + num_committed)

    @kernel()
    def _best_kernel(scores_ptr, vocab, width, row_stride, place_stride, best_ptr, ids_ptr, VOCAB_BLOCK: tl.constexpr):
        """The largest score of one block of one place, and its lowest index; NaN is the largest."""
        position, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
        scores_ptr += (position // width) * row_stride + (position % width) * place_stride
        index = b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
        scores = tl.load(scores_ptr + index, mask=index < vocab, other=-float("inf")).to(best_ptr.dtype.element_ty)
        is_nan = scores != scores
        any_nan = tl.max(is_nan.to(tl.int32), 0) > 0
        top = tl.max(tl.where(is_nan, -float("inf"), scores), 0)
        wins = tl.where(any_nan, is_nan, scores == top)
        partial = position * tl.num_programs(1) + b
        tl.store(best_ptr + partial, tl.where(any_nan, float("nan"), top))
        tl.store(ids_ptr + partial, tl.min(tl.where(wins, index, vocab), 0))

    @triton.jit
    def best_of_partials(best_ptr, ids_ptr, position, num_blocks, NUM_BLOCKS: tl.constexpr):
        """(the largest score of one position, its lowest index as int64) from `best_of_blocks`; NaN is the largest."""
        block = tl.arange(0, NUM_BLOCKS)
        partial = position * num_blocks + block
        best = tl.load(best_ptr + partial, mask=block < num_blocks, other=-float("inf"))
        ids = tl.load(ids_ptr + partial, mask=block < num_blocks, other=2147483647)
        is_nan = best != best
        any_nan = tl.max(is_nan.to(tl.int32), 0) > 0
        top = tl.max(tl.where(is_nan, -float("inf"), best), 0)
        wins = tl.where(any_nan, is_nan, best == top)
        token = tl.min(tl.where(wins, ids, 2147483647), 0)
        return tl.where(any_nan, float("nan"), top), token.to(tl.int64)

    @kernel()
    def _greedy_commit_kernel(
        best_ptr, ids_ptr, num_blocks, draft_ptr, passes_ptr, eos_ptr, tokens_ptr, lengths_ptr, limits_ptr, report_ptr,
        width, num_eos, eos_stride, tokens_stride,
        HAS_PASSES: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column, block = tl.arange(0, BLOCK), tl.arange(0, NUM_BLOCKS)[None, :]
        inside = column < width
        partial = (row * width + column[:, None]) * num_blocks + block
        is_partial = inside[:, None] & (block < num_blocks)
        best = tl.load(best_ptr + partial, mask=is_partial, other=-float("inf"))
        ids = tl.load(ids_ptr + partial, mask=is_partial, other=2147483647)
        nan = best != best
        is_nan = tl.max(nan.to(tl.int32), 1) > 0
        top = tl.max(tl.where(nan, -float("inf"), best), 1)
        wins = tl.where(is_nan[:, None], nan, best == top[:, None])
        target = tl.min(tl.where(wins, ids, 2147483647), 1).to(tl.int64)
        is_draft = column < width - 1
        draft = tl.load(draft_ptr + row * (width - 1) + column, mask=is_draft, other=-1)
        if HAS_PASSES:
            passes = tl.load(passes_ptr + row * (width - 1) + column, mask=is_draft, other=0) != 0
            target = tl.where(passes, draft, target)
        # Nothing drafted is -1, which no target is: the first place after the draft disagrees.
        num_agreed = tl.min(tl.where((target != draft) & inside, column, width - 1), 0)
        num_drafted = tl.sum((draft != -1).to(tl.int32), 0)
        commit_row(
            target, num_agreed, num_drafted, is_nan, column, row, eos_ptr, tokens_ptr, lengths_ptr, limits_ptr,
            report_ptr, width, num_eos, eos_stride, tokens_stride,
        )  # fmt: skip
