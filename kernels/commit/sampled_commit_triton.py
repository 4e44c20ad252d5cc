"""`sampled_commit` on a GPU, in two launches: how much is left to recover in every block of the vocabulary, then one
program per row that decides, finds the token in its block and commits.

For "token" the place after the accepted drafts is known from the drafts' own probabilities, and only its blocks are
read. For "block" the R_i of every place are needed and are taken side by side; the last one is the bonus.

A greedy row takes the same way as the others. At its end the greedy decision replaces the sampled one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.kernels.commit.block_statistics import kernel_scores, tiles_of
from specdec.kernels.commit.greedy_commit import Committed, empty_report, eos_shape
from specdec.kernels.dispatch import kernel, triton

if TYPE_CHECKING:
    from specdec.kernels.commit.distribution import Distribution

if triton is not None:
    import triton.language as tl

    from specdec.kernels.commit.block_statistics import chosen_block, first_above, prob_of, scores_at, temperature_at
    from specdec.kernels.commit.greedy_commit import commit_row


def sampled_commit_triton(
    target: Distribution,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    uniforms: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    verification: str,
    lenience: float,
    passes: Tensor | None = None,
) -> Committed:
    num_rows, k = draft_ids.shape
    scores = kernel_scores(target.scores)
    tiles = tiles_of(scores.shape[2])
    by_block = verification == "block" and draft_probs is not None
    num_sums = k + 1 if by_block else 1
    sums = torch.empty(num_rows, num_sums, 2, tiles.num_blocks, dtype=torch.float64, device=scores.device)
    report = empty_report(num_rows, k + 1, lengths.device)
    q = scores if draft_probs is None else draft_probs
    if q.stride(2) != 1:
        q = q.contiguous()
    statistics = target.cutoff.float().contiguous(), target.top.float().contiguous(), target.mass.contiguous()
    temperature, best = target.temperature.contiguous(), target.best
    if best is None:
        passes = None
    given = (
        scores, *statistics, draft_ids.contiguous(), q, uniforms, k, scores.shape[2], scores.stride(0),
        scores.stride(1), q.stride(0), q.stride(1), uniforms.stride(0), temperature, 1.0 / lenience, sums,
    )  # fmt: skip
    options = {
        "BY_BLOCK": by_block, "SAMPLED": draft_probs is not None, "BLOCK": triton.next_power_of_2(k + 1),
        "VOCAB_BLOCK": tiles.size, "num_warps": tiles.num_warps,
    }  # fmt: skip
    _sums_kernel[(num_rows, tiles.num_blocks, num_sums)](*given, **options)
    _commit_kernel[(num_rows,)](
        *given, tiles.num_blocks, None if best is None else best.contiguous(),
        None if passes is None else passes.contiguous(), eos_ids, token_ids, lengths, limits, report,
        *eos_shape(eos_ids),
        token_ids.stride(0), HAS_GREEDY=best is not None, HAS_PASSES=passes is not None, NUM_BLOCKS=tiles.padded,
        **options,
    )  # fmt: skip
    return Committed(report)


if triton is not None:

    @triton.jit
    def _at(values, column, i):
        """values[i] of a vector in registers."""
        return tl.sum(tl.where(column == i, values, 0), 0)

    @triton.jit
    def _ratio(p, q):
        """min(1, p / q), where p / 0 is 1 and 0 / 0 is 0."""
        return tl.where(p < q, p / q, tl.where(p > 0.0, 1.0, 0.0).to(tl.float64))

    @triton.jit
    def _drafts(draft_ptr, uniforms_ptr, row, k, uniforms_stride, column):
        """(draft, how many there are, their uniforms) of a row; -1 and 1 after the last draft."""
        draft = tl.load(draft_ptr + row * k + column, mask=column < k, other=-1)
        uniforms = tl.load(uniforms_ptr + row * uniforms_stride + 1 + column, mask=draft != -1, other=1.0)
        return draft, tl.sum((draft != -1).to(tl.int32), 0), uniforms

    @triton.jit
    def _probs_of_drafts(
        p_ptr, q_ptr, draft, column, p_stride, q_stride, temperature, cutoff_ptr, top_ptr, mass_ptr,
        SAMPLED: tl.constexpr,
    ):  # fmt: skip
        drafted = draft != -1
        score = tl.load(p_ptr + column * p_stride + draft, mask=drafted, other=-float("inf")).to(tl.float32)
        cutoff = tl.load(cutoff_ptr + column, mask=drafted, other=0.0)
        top = tl.load(top_ptr + column, mask=drafted, other=0.0)
        mass = tl.load(mass_ptr + column, mask=drafted, other=1.0)
        p = prob_of(score, temperature, cutoff, top, mass)
        q = tl.full(draft.shape, 1.0, tl.float64)
        if SAMPLED:
            q = tl.load(q_ptr + column * q_stride + draft, mask=drafted, other=1.0).to(tl.float64)
        return p, q

    @triton.jit
    def _scales(p, q, column, num_drafted):
        """r_i in entry i of a vector like p, of block verification."""
        scale = tl.full((), 1.0, tl.float64)
        scales = tl.where(column == 0, 1.0, 0.0).to(tl.float64)
        for i in range(num_drafted):
            scale = _ratio(scale * _at(p, column, i), _at(q, column, i))
            scales = tl.where(column == i + 1, scale, scales)
        return scales

    @triton.jit
    def _accepted_by_token(p, q, uniforms, scale, column, num_drafted):
        return tl.min(tl.where(uniforms < _ratio(p * scale, q), num_drafted, column), 0)

    @triton.jit
    def _masses(
        p_ptr, q_ptr, b, vocab, temperature, cutoff, top, total, scale, drafted,
        SAMPLED: tl.constexpr, VOCAB_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """((s p - q)+, p) in block b, one-hot q at `drafted` unless SAMPLED; no q where `drafted` is -1."""
        index = b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
        p = prob_of(scores_at(p_ptr, index, vocab), temperature, cutoff, top, total)
        if SAMPLED:
            num_read = tl.where(drafted == -1, 0, vocab)
            q = tl.load(q_ptr + index, mask=index < num_read, other=0.0).to(tl.float64)
            return tl.maximum(p * scale - q, 0.0), p
        else:
            return tl.where(index == drafted, 0.0, p * scale), p

    @kernel()
    def _sums_kernel(
        target_ptr, cutoff_ptr, top_ptr, mass_ptr, draft_ptr, draft_probs_ptr, uniforms_ptr, k, vocab,
        p_row_stride, p_stride, q_row_stride, q_stride, uniforms_stride, temperature_ptr, token_scale, sums_ptr,
        BY_BLOCK: tl.constexpr, SAMPLED: tl.constexpr, BLOCK: tl.constexpr, VOCAB_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The sums of (s p - q)+ and of p over one block, at the place after the accepted drafts or at every place."""
        row, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
        temperature = temperature_at(temperature_ptr, row)
        p_ptr, q_ptr = target_ptr + row * p_row_stride, draft_probs_ptr + row * q_row_stride
        cutoff_ptr, top_ptr, mass_ptr = cutoff_ptr + row * (k + 1), top_ptr + row * (k + 1), mass_ptr + row * (k + 1)
        column = tl.arange(0, BLOCK)
        draft, num_drafted, uniforms = _drafts(draft_ptr, uniforms_ptr, row, k, uniforms_stride, column)
        p, q = _probs_of_drafts(
            p_ptr, q_ptr, draft, column, p_stride, q_stride, temperature, cutoff_ptr, top_ptr, mass_ptr, SAMPLED
        )
        if BY_BLOCK:
            place = tl.program_id(2)
            scale = _at(_scales(p, q, column, num_drafted), column, place)
        else:
            scale = tl.full((), 1.0, tl.float64) * token_scale
            place = _accepted_by_token(p, q, uniforms, scale, column, num_drafted)
        if place <= num_drafted:  # places after the draft may not be read
            residual, whole = _masses(
                p_ptr + place * p_stride, q_ptr + place * q_stride, b, vocab, temperature, tl.load(cutoff_ptr + place),
                tl.load(top_ptr + place), tl.load(mass_ptr + place), scale, _at(draft, column, place), SAMPLED,
                VOCAB_BLOCK,
            )  # fmt: skip
            sums_ptr += (row * tl.num_programs(2) + tl.program_id(2)) * 2 * tl.num_programs(1) + b
            tl.store(sums_ptr, tl.sum(residual, 0))
            tl.store(sums_ptr + tl.num_programs(1), tl.sum(whole, 0))

    @triton.jit
    def _longest_prefix(scales, uniforms, column, num_drafted, sums_ptr, num_blocks, NUM_BLOCKS: tl.constexpr):
        """Block verification, the longest prefix first. sums_ptr: of a row, [k + 1, 2, num_blocks]."""
        block = tl.arange(0, NUM_BLOCKS)
        place = num_drafted
        accepted = _at(uniforms, column, place - 1) < _at(scales, column, place)
        while (place > 0) & (accepted == 0):
            place -= 1
            sums = tl.load(sums_ptr + place * 2 * num_blocks + block, mask=block < num_blocks, other=0.0)
            residual = tl.sum(sums, 0)
            # u < R / (R + 1 - r), and never where both are 0
            chance = _at(uniforms, column, place - 1) * (residual + (1.0 - _at(scales, column, place)))
            accepted = chance < residual
        return place

    @triton.jit
    def _greedy_decision(best_ptr, passes_ptr, draft, column, row, k, HAS_PASSES: tl.constexpr):
        """(how many drafts are accepted, the token after them) of a greedy row."""
        best = tl.load(best_ptr + row * (k + 1) + column, mask=column <= k, other=-1)
        agrees = draft == best
        if HAS_PASSES:
            agrees = agrees | (tl.load(passes_ptr + row * k + column, mask=column < k, other=0) != 0)
        num_agreed = tl.min(tl.where(agrees & (column < k), k, column), 0)
        return num_agreed, _at(best, column, num_agreed)

    @kernel()
    def _commit_kernel(
        target_ptr, cutoff_ptr, top_ptr, mass_ptr, draft_ptr, draft_probs_ptr, uniforms_ptr, k, vocab,
        p_row_stride, p_stride, q_row_stride, q_stride, uniforms_stride, temperature_ptr, token_scale, sums_ptr,
        num_blocks, best_ptr, passes_ptr,
        eos_ptr, tokens_ptr, lengths_ptr, limits_ptr, report_ptr,
        num_eos, eos_stride, tokens_stride,
        HAS_GREEDY: tl.constexpr, HAS_PASSES: tl.constexpr, NUM_BLOCKS: tl.constexpr,
        BY_BLOCK: tl.constexpr, SAMPLED: tl.constexpr, BLOCK: tl.constexpr, VOCAB_BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        temperature = temperature_at(temperature_ptr, row)
        p_ptr, q_ptr = target_ptr + row * p_row_stride, draft_probs_ptr + row * q_row_stride
        cutoff_ptr, top_ptr, mass_ptr = cutoff_ptr + row * (k + 1), top_ptr + row * (k + 1), mass_ptr + row * (k + 1)
        column, block, inner = tl.arange(0, BLOCK), tl.arange(0, NUM_BLOCKS), tl.arange(0, VOCAB_BLOCK)
        draft, num_drafted, uniforms = _drafts(draft_ptr, uniforms_ptr, row, k, uniforms_stride, column)
        p, q = _probs_of_drafts(
            p_ptr, q_ptr, draft, column, p_stride, q_stride, temperature, cutoff_ptr, top_ptr, mass_ptr, SAMPLED
        )
        if BY_BLOCK:
            sums_ptr += row * (k + 1) * 2 * num_blocks
            scales = _scales(p, q, column, num_drafted)
            place = _longest_prefix(scales, uniforms, column, num_drafted, sums_ptr, num_blocks, NUM_BLOCKS)
            scale = _at(scales, column, place)
            sums_ptr += place * 2 * num_blocks
        else:
            sums_ptr += row * 2 * num_blocks
            scale = tl.full((), 1.0, tl.float64) * token_scale
            place = _accepted_by_token(p, q, uniforms, scale, column, num_drafted)
        drafted = _at(draft, column, place)  # -1 after the last draft, where column num_drafted is, since BLOCK > k
        sums = tl.load(sums_ptr + block, mask=block < num_blocks, other=0.0)
        if tl.sum(sums, 0) == 0.0:  # nothing has to be recovered
            sums = tl.load(sums_ptr + num_blocks + block, mask=block < num_blocks, other=0.0)
            drafted = drafted * 0 - 1
            scale = scale * 0.0 + 1.0
        threshold = tl.load(uniforms_ptr + row * uniforms_stride) * tl.sum(sums, 0)
        chosen, before = chosen_block(sums, threshold, NUM_BLOCKS)
        mass, _ = _masses(
            p_ptr + place * p_stride, q_ptr + place * q_stride, chosen, vocab, temperature, tl.load(cutoff_ptr + place),
            tl.load(top_ptr + place), tl.load(mass_ptr + place), scale, drafted, SAMPLED, VOCAB_BLOCK,
        )  # fmt: skip
        final = chosen * VOCAB_BLOCK + first_above(mass, before + tl.cumsum(mass, 0), threshold, inner, VOCAB_BLOCK)
        final = final.to(tl.int64)
        if HAS_GREEDY:
            is_greedy = tl.load(temperature_ptr + row) == 0.0
            agreed, best = _greedy_decision(best_ptr, passes_ptr, draft, column, row, k, HAS_PASSES)
            place = tl.where(is_greedy, agreed, place)
            final = tl.where(is_greedy, best, final)
        masses = tl.load(mass_ptr + column, mask=column <= place, other=1.0)
        mass_is_nan = masses != masses
        commit_row(
            tl.where(column < place, draft, final), place, num_drafted, mass_is_nan, column, row, eos_ptr,
            tokens_ptr, lengths_ptr, limits_ptr, report_ptr, k + 1, num_eos, eos_stride, tokens_stride,
        )  # fmt: skip
