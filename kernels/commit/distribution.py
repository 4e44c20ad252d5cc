"""The distribution that scores stand for under temperature, top-k, top-p and min-p, as a few numbers per position.

Each of these keeps the tokens whose score reaches some cutoff, so a distribution is its scores, the cutoff and a
normaliser: p(x) = exp((scores[x] - top) / temperature) / mass where scores[x] >= cutoff, else 0. Probabilities are
computed where they are read and never stored for a whole vocabulary at all positions; the scores keep their precision.

The cutoffs are those of transformers' warpers in their order (temperature, top-k, top-p, min-p). Of tokens that tie at
a cutoff all are kept; transformers' top-p keeps those that an unstable sort happens to favour.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.commit.block_statistics import block_statistics, kernel_scores, tiles_of
from specdec.kernels.dispatch import triton, uses_triton

if triton is not None:
    import triton.language as tl

    from specdec.kernels.commit.block_statistics import combined

FEW = 128  # scores of which the reference ranks the largest whatever the vocabulary
REFERENCE_ELEMENTS = 2**21  # scores that the reference holds in its own precision at a time


class Truncation(NamedTuple):
    """temperature: > 0. top_k: 0 for no limit. top_p: 1 for no limit. min_p: 0 for no limit."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


NO_TRUNCATION = Truncation()


class Distribution(NamedTuple):
    """scores: [rows, places, vocab] float. cutoff, top: [rows, places] float32 (float64 for float64 scores).
    mass: [rows, places] float64, NaN where the scores hold a NaN or nothing but -inf."""

    scores: Tensor
    temperature: float
    cutoff: Tensor
    top: Tensor
    mass: Tensor

    def of_tokens(self, token_ids: Tensor) -> Tensor:
        """The probability of token_ids[:, j] at place j, [rows, n] float64. token_ids: [rows, n <= places] int64."""
        n = token_ids.shape[1]
        scores = self.scores[:, :n].gather(2, token_ids[..., None]).squeeze(2).to(self.top.dtype)
        weights = scores.sub(self.top[:, :n]).div_(self.temperature).exp_().mul_(scores.ge(self.cutoff[:, :n]))
        # Rounded as the draft probabilities are, so that equal scores give equal p and q.
        return weights.div_(self.mass[:, :n].to(self.top.dtype)).double()

    def at(self, place: Tensor) -> Tensor:
        """The probabilities at one place of every row, [rows, vocab] in the dtype of `top`. place: [rows] int64."""
        row = torch.arange(len(place), device=place.device)
        top, cutoff = self.top[row, place, None], self.cutoff[row, place, None]
        return probs_of(self.scores[row, place].to(top.dtype), top, cutoff, self.temperature)

    def rows(self, part: slice) -> Distribution:
        """The same of some rows."""
        scores, temperature, *statistics = self
        return Distribution(scores[part], temperature, *(values[part] for values in statistics))


def probs_of(scores: Tensor, top: Tensor, cutoff: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """The probabilities that scores stand for, [rows, vocab]; NaN where they stand for none.

    top, cutoff: [rows, 1]. One softmax, which on a CPU is a fraction of the same in single operations.
    """
    shifted = scores - top  # before the division, so that large scores lose nothing to it
    if temperature != 1:
        shifted /= temperature
    if not cutoff.isneginf().all():
        shifted.masked_fill_(scores < cutoff, -math.inf)
    return torch.softmax(shifted, -1, out=out)


def distribution_of(scores: Tensor, truncation: Truncation, implementation: str = "auto") -> Distribution:
    """The numbers that make a distribution of scores at every position.

    scores: [rows, places, vocab] float, -inf for what is forbidden.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.
    """
    serve = _distribution_triton if uses_triton(implementation, scores) else distribution_reference
    return Distribution(scores, truncation.temperature, *serve(scores, truncation))


def distribution_reference(scores: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    """(cutoff, top, mass), [rows, places] each, a few positions at a time."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    shape, vocab = scores.shape[:-1], scores.shape[-1]
    size = max(REFERENCE_ELEMENTS // vocab, 1)
    parts = [_statistics(part.to(dtype), truncation) for part in scores.reshape(-1, vocab).split(size)]
    if not parts:
        empty = scores.new_empty(shape, dtype=dtype)
        return empty, empty, empty.double()
    cutoff, top, mass = (torch.cat(values).view(shape) for values in zip(*parts, strict=True))
    return cutoff, top, mass


def _statistics(scores: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    cutoff, top, mass = cutoffs(scores, truncation)
    return cutoff, top, _mass(scores, top, cutoff, truncation.temperature) if mass is None else mass


def cutoffs(scores: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor | None]:
    """(cutoff, top, mass), [positions] each; no mass where nothing has to be searched.

    scores: [positions, vocab] float32 or float64.
    """
    vocab = scores.shape[1]
    temperature, top_k, top_p, min_p = truncation
    top = scores.amax(1)
    cutoff = torch.full_like(top, -math.inf)
    if top_k == 0 and top_p >= 1:
        return (top + temperature * math.log(min_p) if min_p > 0 else cutoff), top, None
    if top_k == 0:
        cutoff, mass = _nucleus(scores, top, _mass(scores, top, cutoff, temperature), truncation)
        return cutoff, top, mass
    mass = torch.empty_like(top, dtype=torch.float64)
    rest, count = torch.arange(len(scores), device=scores.device), top_k + 1
    while len(rest):  # of the few largest scores first, and of more of them where ties leave that open
        some = scores if len(rest) == len(scores) else scores[rest]
        ranked = some.topk(count).values if count <= max(vocab // 16, min(vocab, FEW)) else falling(some)
        cutoff[rest], mass[rest], is_sure = _cut(ranked, truncation, vocab)
        rest, count = rest[~is_sure], 8 * count
    return cutoff, top, mass


def falling(scores: Tensor) -> Tensor:
    """Sorted along the last dimension, the largest first."""
    if scores.device.type == "cpu":  # numpy sorts values without their places, five times faster
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)
    return scores.sort(descending=True).values


def _cut(ranked: Tensor, truncation: Truncation, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """By top-k and what follows it: (cutoff, mass, whether the largest scores were enough to tell), [positions] each.

    ranked: [positions, count] the largest scores, falling.
    """
    temperature, top_k, top_p, min_p = truncation
    count = ranked.shape[1]
    top, last = ranked[:, :1], ranked[:, -1]
    weights = ranked.sub(top).div_(temperature).exp_().double()
    cutoff = torch.full_like(last, -math.inf)
    is_sure = torch.ones_like(last, dtype=torch.bool)
    if top_k < vocab:
        cutoff = ranked[:, top_k - 1]
        is_sure = (last < cutoff) | cutoff.isneginf()  # nothing beyond them ties with the k-th
    weights *= ranked >= cutoff[:, None]
    if top_p < 1:
        reached = weights.cumsum(1) >= top_p * weights.sum(1, keepdim=True)
        place = torch.where(reached.any(1), reached.long().argmax(1), count - 1)
        cutoff = ranked.gather(1, place[:, None]).squeeze(1)
    if min_p > 0:
        cutoff = torch.maximum(cutoff, top[:, 0] + temperature * math.log(min_p))
    mass = (weights * (ranked >= cutoff[:, None])).sum(1)
    return cutoff, mass, is_sure | (count == vocab) | ranked[:, 0].isnan()


def _nucleus(scores: Tensor, top: Tensor, total: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor]:
    """By top-p of the whole vocabulary and min-p: (cutoff, mass), [positions] each.

    total: [positions] float64, the mass of all scores.
    """
    temperature, _, top_p, min_p = truncation
    vocab = scores.shape[1]
    # Tokens less probable than (1 - top_p) / vocab hold less than 1 - top_p together, so the others hold the nucleus:
    # a few of the vocabulary, which are all that has to be sorted. Half of that leaves room for rounding.
    floor = top + temperature * (total * ((1 - top_p) / (2 * vocab))).log().to(top.dtype)
    cutoffs, masses = np.full(len(scores), -np.inf), np.full(len(scores), np.nan)
    numbers = zip(*(values.cpu().numpy() for values in (scores, top, total, floor)), strict=True)
    for place, (row, highest, whole, least) in enumerate(numbers):
        ranked = np.sort(row[row >= least])[::-1]
        if not len(ranked):  # NaN
            continue
        weights = np.exp((ranked - highest) / temperature).astype(np.float64)
        cutoff = ranked[np.argmax(weights.cumsum() >= top_p * whole)]
        if min_p > 0:
            cutoff = max(cutoff, highest + temperature * math.log(min_p))
        cutoffs[place], masses[place] = cutoff, weights[ranked >= cutoff].sum()
    return torch.from_numpy(cutoffs).to(top), torch.from_numpy(masses).to(total)


def _mass(scores: Tensor, top: Tensor, cutoff: Tensor, temperature: float) -> Tensor:
    """The sum of exp((scores - top) / temperature): the largest of these is 1, and its probability 1 / sum."""
    return probs_of(scores, top[:, None], cutoff[:, None], temperature).amax(1).double().reciprocal_()


def _distribution_triton(scores: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    scores = kernel_scores(scores)
    partials, cutoff = block_statistics(scores, truncation)
    top, mass = torch.empty_like(cutoff), torch.empty_like(cutoff, dtype=torch.float64)
    tiles = tiles_of(scores.shape[2])
    _combine_kernel[(cutoff.numel(),)](
        partials, top, mass, tiles.num_blocks, float(truncation.temperature), NUM_BLOCKS=tiles.padded, num_warps=1
    )
    return cutoff, top, mass


if triton is not None:

    @triton.jit
    def _combine_kernel(partials_ptr, top_ptr, mass_ptr, num_blocks, temperature, NUM_BLOCKS: tl.constexpr):
        position = tl.program_id(0).to(tl.int64)
        top, mass = combined(partials_ptr, position, num_blocks, temperature, NUM_BLOCKS)
        tl.store(top_ptr + position, top)
        tl.store(mass_ptr + position, mass)
