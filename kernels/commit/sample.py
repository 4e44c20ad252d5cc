"""One sample per row of what scores stand for, and the probabilities that it came from.

A sample is the token at which the cumulative sum of its distribution exceeds a uniform number (inverse transform), so
that a row's token depends on nothing but its own scores, its own truncation and its own number. A greedy row takes the
first of its largest scores, whatever its number.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.commit.block_statistics import block_statistics, kernel_scores, tiles_of
from specdec.kernels.commit.distribution import cutoffs, probs_of
from specdec.kernels.commit.greedy_commit import NO_TOKEN, best_of_blocks
from specdec.kernels.commit.truncation import Truncation, Truncations
from specdec.kernels.dispatch import kernel, triton, uses_triton

BLOCK = 128  # entries of the vocabulary that the reference sums first

if triton is not None:
    import triton.language as tl

    from specdec.kernels.commit.block_statistics import (
        chosen_block,
        combined,
        first_above,
        prob_of,
        scores_at,
        temperature_at,
    )
    from specdec.kernels.commit.greedy_commit import best_of_partials


def sample(
    scores: Tensor, truncations: Truncations, uniforms: Tensor, probs: Tensor, implementation: str = "auto"
) -> Tensor:
    """A token per row, [rows] int64; NO_TOKEN, and probabilities of zero, where the scores hold a NaN or only -inf.

    A greedy row gets the first of its largest scores and one-hot probabilities; only a NaN gives it NO_TOKEN.

    scores: [rows, at most vocab] float. truncations: of the same rows. uniforms: [rows] float64 in [0, 1).
    probs: [rows, vocab] float32, overwritten with the distribution of the token; 0 for what has no score.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.
    """
    if scores.shape[0] != probs.shape[0] or scores.shape[1] > probs.shape[1] or probs.dtype != torch.float32:
        raise ValueError(
            f"probs of {list(probs.shape)} {probs.dtype} cannot hold the distributions of scores of "
            f"{list(scores.shape)}; float32 and as many rows and at least as many columns are needed"
        )
    truncations.check_rows(scores)
    serve = _sample_triton if uses_triton(implementation, scores) else sample_reference
    return serve(scores, truncations, uniforms, probs)


def sample_reference(scores: Tensor, truncations: Truncations, uniforms: Tensor, probs: Tensor) -> Tensor:
    """The same in plain torch."""
    vocab = scores.shape[1]
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    cutoff, top, best = truncations.apply(_cutoffs, wide)
    probs[:, vocab:] = 0
    temperature = truncations.temperature if truncations.has_temperature else None
    probs[:, :vocab] = probs_of(wide, top, cutoff, temperature, best if truncations.has_greedy else None)

    tokens = sample_tokens(probs, uniforms)
    nothing = probs[:, 0].isnan()  # one NaN, or -inf everywhere, leaves no number among them
    if nothing.any():
        probs[nothing] = 0
        tokens[nothing] = NO_TOKEN
    return tokens


def _cutoffs(scores: Tensor, truncation: Truncation) -> tuple[Tensor, ...]:
    """(cutoff, top, best), [rows] each."""
    cutoff, top, _, best = cutoffs(scores, truncation)
    return cutoff, top, best


def sample_tokens(mass: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row with probability mass / mass.sum(), by inverse transform, [rows] int64.

    mass: [rows, vocab], not negative; a token without mass is never chosen. uniforms: [rows] float64 in [0, 1).
    """
    if mass.device.type == "cpu":
        return torch.from_numpy(_sample_on_cpu(mass.numpy(), uniforms.numpy()))
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


def _sample_on_cpu(mass: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """The same. Of so few numbers, torch's operations take several times as long to be called as to be computed."""
    num_rows, vocab = mass.shape
    width, row = min(BLOCK, vocab), np.arange(num_rows)
    # Converted before it is summed: numpy would convert in pieces, whose borders depend on the number of rows.
    blocks = np.zeros((num_rows, -(-vocab // width) * width))
    blocks[:, :vocab] = mass
    blocks = blocks.reshape(num_rows, -1, width)
    cumulative = blocks.sum(2).cumsum(1)
    threshold = uniforms * cumulative[:, -1]
    block = np.minimum((cumulative <= threshold[:, None]).sum(1), blocks.shape[1] - 1)
    before = np.where(block > 0, cumulative[row, block - 1], 0.0)
    within = blocks[row, block].cumsum(1)
    inner = np.minimum((within <= (threshold - before)[:, None]).sum(1), width - 1)
    token = np.minimum(block * width + inner, vocab - 1)
    without = mass[row, token] <= 0
    if without.any():
        token[without] = mass[without].argmax(1)
    return token


def _sample_triton(scores: Tensor, truncations: Truncations, uniforms: Tensor, probs: Tensor) -> Tensor:
    num_rows, num_columns = probs.shape
    vocab = scores.shape[1]
    # Of the scores as they came, since float64 ones may tie in float32.
    greedy = best_of_blocks(scores[:, None]) if truncations.has_greedy else (None, None)
    scores = kernel_scores(scores)
    partials, cutoff = block_statistics(scores[:, None], truncations)
    parts, tiles = tiles_of(vocab), tiles_of(num_columns)
    sums = torch.empty(num_rows, tiles.num_blocks, dtype=torch.float64, device=scores.device)
    tokens = torch.empty(num_rows, dtype=torch.long, device=scores.device)
    _probs_kernel[(num_rows, tiles.num_blocks)](
        scores, vocab, scores.stride(0), partials, cutoff, *greedy, parts.num_blocks, truncations.temperature,
        probs, num_columns, probs.stride(0), sums,
        HAS_GREEDY=truncations.has_greedy, NUM_PARTS=parts.padded, VOCAB_BLOCK=tiles.size, num_warps=tiles.num_warps,
    )  # fmt: skip
    _choose_kernel[(num_rows,)](
        probs, num_columns, probs.stride(0), sums, tiles.num_blocks, uniforms, uniforms.stride(0), tokens,
        NUM_BLOCKS=tiles.padded, VOCAB_BLOCK=tiles.size, num_warps=tiles.num_warps,
    )  # fmt: skip
    return tokens


if triton is not None:

    @kernel()
    def _probs_kernel(
        scores_ptr, vocab, stride, partials_ptr, cutoff_ptr, part_best_ptr, part_ids_ptr, num_parts, temperature_ptr,
        probs_ptr, num_columns, probs_stride, sums_ptr,
        HAS_GREEDY: tl.constexpr, NUM_PARTS: tl.constexpr, VOCAB_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The probabilities of one block of a row, and their sum."""
        row, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
        temperature = temperature_at(temperature_ptr, row)
        top, mass = combined(partials_ptr, row, num_parts, temperature, NUM_PARTS)
        index = b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
        score = scores_at(scores_ptr + row * stride, index, vocab)
        probs = prob_of(score, temperature, tl.load(cutoff_ptr + row), top, mass)
        probs = tl.where(mass == mass, probs, 0.0)
        if HAS_GREEDY:
            is_greedy = tl.load(temperature_ptr + row) == 0.0
            largest, best = best_of_partials(part_best_ptr, part_ids_ptr, row, num_parts, NUM_PARTS)
            one_hot = tl.where(index == best, 1.0, 0.0).to(tl.float64)
            one_hot = tl.where(largest == largest, one_hot, 0.0)
            probs = tl.where(is_greedy, one_hot, probs)
        tl.store(probs_ptr + row * probs_stride + index, probs.to(tl.float32), mask=index < num_columns)
        tl.store(sums_ptr + row * tl.num_programs(1) + b, tl.sum(probs, 0))

    @kernel()
    def _choose_kernel(
        probs_ptr, num_columns, probs_stride, sums_ptr, num_blocks, uniforms_ptr, uniforms_stride, tokens_ptr,
        NUM_BLOCKS: tl.constexpr, VOCAB_BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        block, inner = tl.arange(0, NUM_BLOCKS), tl.arange(0, VOCAB_BLOCK)
        sums = tl.load(sums_ptr + row * num_blocks + block, mask=block < num_blocks, other=0.0)
        total = tl.sum(sums, 0)
        threshold = tl.load(uniforms_ptr + row * uniforms_stride) * total
        chosen, before = chosen_block(sums, threshold, NUM_BLOCKS)
        index = chosen * VOCAB_BLOCK + inner
        probs = tl.load(probs_ptr + row * probs_stride + index, mask=index < num_columns, other=0.0).to(tl.float64)
        token = chosen * VOCAB_BLOCK + first_above(probs, before + tl.cumsum(probs, 0), threshold, inner, VOCAB_BLOCK)
        tl.store(tokens_ptr + row, tl.where(total > 0.0, token, -1).to(tl.int64))
