"""One sample per row of what scores stand for, and the probabilities that it came from, in one pass over the row.

A sample is the token at which the cumulative sum of its distribution exceeds a uniform number (inverse transform), so
that a row's token depends on nothing but its own scores and its own number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.dispatch import triton, uses_triton
from specdec.kernels.distribution import (
    NUM_CANDIDATES,
    Truncation,
    blocks_of,
    candidates_for,
    cutoffs,
    kernel_scores,
    numbers_of,
    probs_of,
)
from specdec.kernels.greedy_commit import NO_TOKEN

BLOCK = 128  # entries of the vocabulary that the reference sums first

if triton is not None:
    import triton.language as tl

    from specdec.kernels.distribution import probs_at, statistics


def sample(
    scores: Tensor, truncation: Truncation, uniforms: Tensor, probs: Tensor, implementation: str = "auto"
) -> Tensor:
    """A token per row, [rows] int64; NO_TOKEN, and probabilities of zero, where the scores hold a NaN or only -inf.

    scores: [rows, at most vocab] float. uniforms: [rows] float64 in [0, 1).
    probs: [rows, vocab] float32, overwritten with the distribution of the token; 0 for what has no score.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.
    """
    if scores.shape[0] != probs.shape[0] or scores.shape[1] > probs.shape[1] or probs.dtype != torch.float32:
        raise ValueError(
            f"probs of {list(probs.shape)} {probs.dtype} cannot hold the distributions of scores of "
            f"{list(scores.shape)}; float32 and as many rows and at least as many columns are needed"
        )
    serve = _sample_triton if uses_triton(implementation, scores) else sample_reference
    return serve(scores, truncation, uniforms, probs)


def sample_reference(scores: Tensor, truncation: Truncation, uniforms: Tensor, probs: Tensor) -> Tensor:
    """The same in plain torch."""
    vocab = scores.shape[1]
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    cutoff, top, _ = cutoffs(wide, truncation)
    probs[:, vocab:] = 0
    probs[:, :vocab] = probs_of(wide, top[:, None], cutoff[:, None], truncation.temperature)
    tokens = sample_tokens(probs, uniforms)
    nothing = probs[:, 0].isnan()  # one NaN, or -inf everywhere, leaves no number among them
    if nothing.any():
        probs[nothing] = 0
        tokens[nothing] = NO_TOKEN
    return tokens


def sample_tokens(mass: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row with probability mass / mass.sum(), by inverse transform, [rows] int64.

    mass: [rows, vocab], not negative; a token without mass is never chosen. uniforms: [rows] float64 in [0, 1).
    """
    num_rows, vocab = mass.shape
    width = min(BLOCK, vocab)
    blocks = F.pad(mass, (0, -vocab % width)).view(num_rows, -1, width)  # a block first, then a token of it
    cumulative = blocks.sum(2, dtype=torch.float64).cumsum_(1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0)
    within = blocks[torch.arange(num_rows, device=mass.device), block[:, 0]].cumsum(1, dtype=torch.float64)
    inner = torch.searchsorted(within, threshold - before, right=True).clamp_(max=width - 1)
    token = (block * width + inner).clamp_(max=vocab - 1)
    # Sums in another order differ in the last bit, which may lead to a token without mass.
    without = mass.gather(1, token) <= 0
    if without.any():
        token = torch.where(without, mass.argmax(1, keepdim=True), token)
    return token.squeeze(1)


def _sample_triton(scores: Tensor, truncation: Truncation, uniforms: Tensor, probs: Tensor) -> Tensor:
    num_rows, vocab = scores.shape
    scores = kernel_scores(scores)
    tokens = torch.empty(num_rows, dtype=torch.long, device=scores.device)
    _sample_kernel[(num_rows,)](
        scores,
        candidates_for(scores, truncation),
        uniforms,
        probs,
        tokens,
        vocab,
        probs.shape[1],
        scores.stride(0),
        uniforms.stride(0),
        probs.stride(0),
        NUM_CANDIDATES,
        *numbers_of(truncation),
        **blocks_of(probs.shape[1]),
    )
    return tokens


if triton is not None:

    @triton.jit
    def first_above(mass, cumulative, threshold, index, SIZE: tl.constexpr):
        """The first entry with mass whose cumulative sum exceeds the threshold, or the last with mass."""
        first = tl.min(tl.where((cumulative > threshold) & (mass > 0.0), index, SIZE), 0)
        last = tl.max(tl.where(mass > 0.0, index, 0), 0)
        return tl.minimum(first, last)

    @triton.jit
    def _sample_kernel(
        scores_ptr,
        candidates_ptr,
        uniforms_ptr,
        probs_ptr,
        tokens_ptr,
        vocab,
        num_columns,
        stride,
        uniforms_stride,
        probs_stride,
        room,
        temperature,
        top_k,
        top_p,
        log_min_p,
        VOCAB_BLOCK: tl.constexpr,
        NUM_BLOCKS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        scores_ptr += row * stride
        probs_ptr += row * probs_stride
        cutoff, top, mass = statistics(
            scores_ptr, candidates_ptr + row * room, vocab, room, temperature, top_k, top_p, log_min_p, VOCAB_BLOCK
        )
        block, inner = tl.arange(0, NUM_BLOCKS), tl.arange(0, VOCAB_BLOCK)
        sums = tl.zeros([NUM_BLOCKS], dtype=tl.float64)
        for b in range(tl.cdiv(num_columns, VOCAB_BLOCK)):
            index = b * VOCAB_BLOCK + inner
            probs = probs_at(scores_ptr, index, vocab, temperature, cutoff, top, mass)
            probs = tl.where(mass == mass, probs, 0.0)
            tl.store(probs_ptr + index, probs.to(tl.float32), mask=index < num_columns)
            sums = tl.where(block == b, tl.sum(probs, 0), sums)
        threshold = tl.load(uniforms_ptr + row * uniforms_stride) * tl.sum(sums, 0)
        chosen = first_above(sums, tl.cumsum(sums, 0), threshold, block, NUM_BLOCKS)
        index = chosen * VOCAB_BLOCK + inner
        probs = probs_at(scores_ptr, index, vocab, temperature, cutoff, top, mass)
        before = tl.sum(tl.where(block < chosen, sums, 0.0), 0)
        token = chosen * VOCAB_BLOCK + first_above(probs, before + tl.cumsum(probs, 0), threshold, inner, VOCAB_BLOCK)
        tl.store(tokens_ptr + row, tl.where(mass == mass, token, -1).to(tl.int64))
