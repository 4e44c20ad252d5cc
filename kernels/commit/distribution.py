"""The distribution that scores stand for under temperature, top-k, top-p and min-p, as a few numbers per position.

Each of these keeps the tokens whose score reaches some cutoff, so a distribution is its scores, the cutoff and a
normaliser: p(x) = exp((scores[x] - top) / temperature) / mass where scores[x] >= cutoff, else 0. Probabilities are
computed where they are read and never stored for a whole vocabulary at all positions; the scores keep their precision.
A greedy row's distribution is one-hot at the first of its largest scores.

The cutoffs are those of transformers' warpers in their order (temperature, top-k, top-p, min-p). Of tokens that tie at
a cutoff all are kept; transformers' top-p keeps those that an unstable sort happens to favour.

Every row has values of its own, and its numbers are the same to the last bit in any batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.commit.block_statistics import block_statistics, kernel_scores, tiles_of
from specdec.kernels.commit.greedy_commit import NO_TOKEN, best_of_blocks
from specdec.kernels.commit.truncation import Truncation, Truncations
from specdec.kernels.dispatch import kernel, triton, uses_triton

if triton is not None:
    import triton.language as tl

    from specdec.kernels.commit.block_statistics import combined, temperature_at
    from specdec.kernels.commit.greedy_commit import best_of_partials

FEW = 128  # the reference ranks at least this many of the largest scores, whatever the vocabulary
REFERENCE_ELEMENTS = 2**21  # scores that the reference holds in its own precision at a time


class Distribution(NamedTuple):
    """scores: [rows, places, vocab] float. temperature: [rows] float64, 0 in greedy rows.
    cutoff, top: [rows, places] float32 (float64 for float64 scores).
    mass: [rows, places] float64, NaN where the scores hold a NaN, and in rows that sample also where they hold nothing
        but -inf.
    best: [rows, places] int64, the first of the largest scores in greedy rows and NO_TOKEN in the others; None if no
        row is greedy. A NaN counts as the largest score."""

    scores: Tensor
    temperature: Tensor
    cutoff: Tensor
    top: Tensor
    mass: Tensor
    best: Tensor | None = None

    def of_tokens(self, token_ids: Tensor) -> Tensor:
        """The probability of token_ids[:, j] at place j, [rows, n] float64. token_ids: [rows, n <= places] int64."""
        n, dtype = token_ids.shape[1], self.top.dtype
        scores = self.scores[:, :n].gather(2, token_ids[..., None]).squeeze(2).to(dtype)
        weights = scores.sub(self.top[:, :n]).div_(self.temperature[:, None].to(dtype))
        weights = weights.exp_().mul_(scores.ge(self.cutoff[:, :n]))

        # Rounded as the draft probabilities are, so that equal scores give equal p and q.
        probs = weights.div_(self.mass[:, :n].to(dtype)).double()
        if self.best is None:
            return probs
        best = self.best[:, :n]
        return torch.where(best != NO_TOKEN, (token_ids == best).double(), probs)

    def at(self, place: Tensor) -> Tensor:
        """The probabilities at one place of every row, [rows, vocab] in the dtype of `top`. place: [rows] int64."""
        row = torch.arange(len(place), device=place.device)
        top, cutoff = self.top[row, place], self.cutoff[row, place]
        scores = self.scores[row, place].to(top.dtype)
        best = None if self.best is None else self.best[row, place]
        # A pass saved on a CPU; on a GPU the host would have to wait for the answer.
        is_plain = not scores.is_cuda and bool(self.temperature.eq(1).all())

        return probs_of(scores, top, cutoff, None if is_plain else self.temperature, best)

    def rows(self, part: slice) -> Distribution:
        """The same of some rows."""
        return Distribution(*(None if values is None else values[part] for values in self))  # type: ignore[arg-type]


def probs_of(
    scores: Tensor, top: Tensor, cutoff: Tensor, temperature: Tensor | None, best: Tensor | None = None
) -> Tensor:
    """The probabilities that scores stand for, [rows, vocab]; NaN where they stand for none.

    top, cutoff: [rows]. temperature: [rows], [1] for all, or None for 1. best: [rows], see `Distribution`.
    One softmax, which on a CPU is a fraction of the same in single operations.
    """
    shifted = scores - top[:, None]  # before the division, so that large scores lose nothing to it
    if temperature is not None:
        shifted /= temperature[:, None].to(shifted.dtype)
    if scores.is_cuda or not cutoff.isneginf().all():
        shifted.masked_fill_(scores < cutoff[:, None], -math.inf)

    probs = torch.softmax(shifted, -1)
    if best is None:
        return probs
    is_best = torch.arange(scores.shape[1], device=scores.device) == best[:, None]
    is_one_hot = (best != NO_TOKEN) & ~top.isnan()
    return torch.where(is_one_hot[:, None], is_best.to(probs.dtype), probs)


def distribution_of(scores: Tensor, truncations: Truncations, implementation: str = "auto") -> Distribution:
    """The numbers that make a distribution of scores at every position.

    scores: [rows, places, vocab] float, -inf for what is forbidden. truncations: of the same rows.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.
    """
    truncations.check_rows(scores)
    serve = _distribution_triton if uses_triton(implementation, scores) else distribution_reference
    return serve(scores, truncations)


def distribution_reference(scores: Tensor, truncations: Truncations) -> Distribution:
    """The same in plain torch."""
    cutoff, top, mass, best = truncations.apply(_statistics_in_parts, scores)
    return Distribution(scores, truncations.temperature, cutoff, top, mass, best if truncations.has_greedy else None)


def _statistics_in_parts(scores: Tensor, truncation: Truncation) -> tuple[Tensor, ...]:
    """(cutoff, top, mass, best) of rows that share a truncation, [rows, places] each, a few positions at a time."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    shape, vocab = scores.shape[:-1], scores.shape[-1]
    size = max(REFERENCE_ELEMENTS // vocab, 1)
    parts = [_statistics(part.to(dtype), truncation) for part in scores.reshape(-1, vocab).split(size)]
    if not parts:
        empty = scores.new_empty(shape, dtype=dtype)
        return empty, empty, empty.double(), empty.long()
    return tuple(torch.cat(values).view(shape) for values in zip(*parts, strict=True))


def _statistics(scores: Tensor, truncation: Truncation) -> tuple[Tensor, ...]:
    cutoff, top, mass, best = cutoffs(scores, truncation)
    if mass is None:
        mass = _mass(scores, top, cutoff, truncation.temperature)
    return cutoff, top, mass, best


def cutoffs(scores: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(cutoff, top, mass, best), [positions] each; no mass where nothing has to be searched.

    scores: [positions, vocab] float32 or float64.
    """
    if truncation.is_greedy:
        top, best = scores.max(1)  # a NaN anywhere is the maximum
        return top, top, torch.ones_like(top, dtype=torch.float64).masked_fill_(top.isnan(), math.nan), best

    none = torch.full((len(scores),), NO_TOKEN, device=scores.device)
    return *_sampling_cutoffs(scores, truncation), none


def _sampling_cutoffs(scores: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor | None]:
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
        reached = weights.cumsum(1) >= top_p * row_sums(weights)[:, None]
        place = torch.where(reached.any(1), reached.long().argmax(1), count - 1)
        cutoff = ranked.gather(1, place[:, None]).squeeze(1)
    if min_p > 0:
        cutoff = torch.maximum(cutoff, top[:, 0] + temperature * math.log(min_p))
    mass = row_sums(weights * (ranked >= cutoff[:, None]))
    return cutoff, mass, is_sure | (count == vocab) | ranked[:, 0].isnan()


def row_sums(values: Tensor) -> Tensor:
    """The sum of every row, [rows], with the bits it has in any batch. values: [rows, n] float."""
    if len(values) == 1 and not values.is_cuda:
        # torch splits the sum of a single row among its threads, and so rounds it differently than in a batch.
        return values.expand(2, -1).contiguous().sum(1)[:1]
    return values.sum(1)


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
    divisor = None if temperature == 1 else top.new_full((1,), temperature)
    return probs_of(scores, top, cutoff, divisor).amax(1).double().reciprocal_()


def _distribution_triton(scores: Tensor, truncations: Truncations) -> Distribution:
    wide = kernel_scores(scores)
    rows, places, vocab = scores.shape
    tiles = tiles_of(vocab)
    partials, cutoff = block_statistics(wide, truncations)
    top, mass = torch.empty_like(cutoff), torch.empty_like(cutoff, dtype=torch.float64)

    # Of the scores as they came, since float64 ones may tie in float32.
    greedy = best_of_blocks(scores) if truncations.has_greedy else (None, None)
    best = torch.empty(rows, places, dtype=torch.long, device=scores.device) if truncations.has_greedy else None
    _combine_kernel[(cutoff.numel(),)](
        partials, cutoff, top, mass, *greedy, best, places, tiles.num_blocks, truncations.temperature,
        HAS_GREEDY=truncations.has_greedy, NUM_BLOCKS=tiles.padded, num_warps=1,
    )  # fmt: skip
    return Distribution(scores, truncations.temperature, cutoff, top, mass, best)


if triton is not None:

    @kernel()
    def _combine_kernel(
        partials_ptr, cutoff_ptr, top_ptr, mass_ptr, block_best_ptr, block_ids_ptr, best_ptr, places, num_blocks,
        temperature_ptr, HAS_GREEDY: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        position = tl.program_id(0).to(tl.int64)
        row = position // places
        top, mass = combined(partials_ptr, position, num_blocks, temperature_at(temperature_ptr, row), NUM_BLOCKS)
        if HAS_GREEDY:
            is_greedy = tl.load(temperature_ptr + row) == 0.0
            largest, best = best_of_partials(block_best_ptr, block_ids_ptr, position, num_blocks, NUM_BLOCKS)
            largest = largest.to(tl.float32)
            top = tl.where(is_greedy, largest, top)
            mass = tl.where(is_greedy, tl.where(largest == largest, 1.0, float("nan")).to(tl.float64), mass)
            tl.store(cutoff_ptr + position, largest, mask=is_greedy)
            tl.store(best_ptr + position, tl.where(is_greedy, best, -1))
        tl.store(top_ptr + position, top)
        tl.store(mass_ptr + position, mass)
