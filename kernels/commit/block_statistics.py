"""The numbers of a distribution on a GPU, by passes over blocks of the vocabulary, one program per block.

A row has far fewer entries than a GPU has threads, and a batch far fewer rows than a GPU has processors: a program that
walks a whole row leaves most of the device idle. Here every program takes one block of one row and leaves a few
numbers, the partials. Every reader combines a row's partials in the same order, whatever the batch.

A cutoff is searched digit by digit, the first one first: a pass finds how much of a block lies above each of DIGITS
pivots; the next pass adds the blocks up, takes the largest pivot above which enough is left, and places finer pivots
above it. Scores of 16 bits take 4 passes (bfloat16) or 5, however many tokens tie, and nothing is read back.

Every row brings its own temperature, top-k, top-p and min-p. A pass runs if any row needs it; a row that does not need
it keeps the partials and the cutoff it has, untouched, so that its bits are those it gets alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.commit.truncation import Truncations
from specdec.kernels.dispatch import kernel, triton

if triton is not None:
    import triton.language as tl

VOCAB_BLOCK = 4096  # vocabulary entries of a program
DIGIT_BITS = 4
DIGITS = 2**DIGIT_BITS  # pivots of a pass
# In float32 scores that came from these types, all lower bits are the same.
LOWEST_BIT = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}


class Tiles(NamedTuple):
    """size: entries of a block, a power of two. padded: num_blocks rounded up to a power of two."""

    size: int
    num_blocks: int
    padded: int
    num_warps: int


def tiles_of(vocab: int) -> Tiles:
    size = min(VOCAB_BLOCK, triton.next_power_of_2(vocab))
    num_blocks = triton.cdiv(vocab, size)
    return Tiles(size, num_blocks, triton.next_power_of_2(num_blocks), 8 if size >= 2048 else 4)


def kernel_scores(scores: Tensor) -> Tensor:
    """[..., vocab] as the kernels read them: entries side by side, float32 at most."""
    scores = scores.float() if scores.dtype == torch.float64 else scores
    return scores if scores.stride(-1) == 1 else scores.contiguous()


def block_statistics(scores: Tensor, truncations: Truncations) -> tuple[Tensor, Tensor]:
    """The partials of what each row's truncation keeps, and its cutoff. A greedy row keeps all at temperature 1.

    scores: [rows, places, vocab] of `kernel_scores`.
    Returns [rows, places, 2, num_blocks] float64, for every block a number that no score kept exceeds and the sum of
    exp((score - that) / temperature), to be read by `combined`; and the cutoff, [rows, places] float32.
    """
    rows, places, vocab = scores.shape
    tiles = tiles_of(vocab)
    grid = (rows * places, tiles.num_blocks)
    strides = scores.stride(0), scores.stride(1)
    where = (scores, vocab, places, *strides, tiles.num_blocks, truncations.temperature)
    options = {"VOCAB_BLOCK": tiles.size, "num_warps": tiles.num_warps}
    partials, cutoff = _empty(scores, tiles)
    _mass_kernel[grid](*where, partials, cutoff, **options)

    options |= {"NUM_BLOCKS": tiles.padded}
    searches = [(truncations.top_k, False)] * truncations.has_top_k + [
        (truncations.top_p, True)
    ] * truncations.has_top_p
    for needed, by_mass in searches:
        search = {"BY_MASS": by_mass, "DIGITS": DIGITS, **options}
        lows = torch.empty(2, grid[0], dtype=torch.long, device=scores.device)
        amounts = torch.empty(2, *grid, DIGITS, dtype=torch.float64, device=scores.device)
        steps = [1 << bit for bit in range(32 - DIGIT_BITS, LOWEST_BIT[scores.dtype] - 1, -DIGIT_BITS)]
        for i, step in enumerate(steps):
            old, new = (lows[i % 2 - 1], amounts[i % 2 - 1]), (lows[i % 2], amounts[i % 2])
            _narrow_kernel[grid](*where, partials, needed, *old, step, *new, FIRST=i == 0, **search)
        kept = _empty(scores, tiles)
        _cut_kernel[grid](*where, partials, cutoff, needed, *new, steps[-1], *kept, **search)
        partials, cutoff = kept

    if truncations.has_min_p:
        kept = _empty(scores, tiles)
        _min_p_kernel[grid](*where, partials, cutoff, truncations.log_min_p, *kept, **options)
        partials, cutoff = kept
    return partials, cutoff


def _empty(scores: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    rows, places, _ = scores.shape
    partials = torch.empty(rows, places, 2, tiles.num_blocks, dtype=torch.float64, device=scores.device)
    return partials, torch.empty(rows, places, dtype=torch.float32, device=scores.device)


if triton is not None:

    @triton.jit
    def temperature_at(temperature_ptr, row):
        """float32; 1 for a greedy row, which takes its probabilities from elsewhere."""
        temperature = tl.load(temperature_ptr + row)
        return tl.where(temperature == 0.0, 1.0, temperature).to(tl.float32)

    @triton.jit
    def weight_of(score, top, temperature):
        return tl.exp((score - top) / temperature)

    @triton.jit
    def prob_of(score, temperature, cutoff, top, mass):
        """float64, rounded as draft probabilities are, so that equal scores give equal p and q."""
        weight = tl.where(score >= cutoff, weight_of(score, top, temperature), 0.0)
        return (weight / mass.to(tl.float32)).to(tl.float64)

    @triton.jit
    def scores_at(ptr, index, vocab):
        """float32, -inf past the vocabulary."""
        return tl.load(ptr + index, mask=index < vocab, other=-float("inf")).to(tl.float32)

    @triton.jit
    def combined(partials_ptr, position, num_blocks, temperature, NUM_BLOCKS: tl.constexpr):
        """(top, mass) of one position from its partials; mass is NaN where the scores are unusable."""
        block = tl.arange(0, NUM_BLOCKS)
        tops_ptr = partials_ptr + position * 2 * num_blocks + block
        tops = tl.load(tops_ptr, mask=block < num_blocks, other=-float("inf")).to(tl.float32)
        masses = tl.load(tops_ptr + num_blocks, mask=block < num_blocks, other=0.0)
        top = tl.max(tops, 0)
        base = tl.where(top == -float("inf"), 0.0, top)
        mass = tl.sum(masses * weight_of(tops, base, temperature).to(tl.float64), 0)
        return top, tl.where(mass > 0.0, mass, float("nan"))

    @triton.jit
    def chosen_block(sums, threshold, NUM_BLOCKS: tl.constexpr):
        """(the block in which the running sum exceeds the threshold, the sum before it). sums: [NUM_BLOCKS] float64."""
        block = tl.arange(0, NUM_BLOCKS)
        chosen = first_above(sums, tl.cumsum(sums, 0), threshold, block, NUM_BLOCKS)
        return chosen, tl.sum(tl.where(block < chosen, sums, 0.0), 0)

    @triton.jit
    def first_above(mass, cumulative, threshold, index, SIZE: tl.constexpr):
        """The first entry with mass whose cumulative sum exceeds the threshold, or the last with mass."""
        first = tl.min(tl.where((cumulative > threshold) & (mass > 0.0), index, SIZE), 0)
        last = tl.max(tl.where(mass > 0.0, index, 0), 0)
        return tl.minimum(first, last)

    @triton.jit
    def _key_of(score):
        """Integers in the order of the float32 scores; the two zeros are one."""
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    @triton.jit
    def _score_of(key):
        """The score of a key, or of the least key that is a number's: that of -inf."""
        bits = tl.maximum(key, -0x7F800001).to(tl.int32)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)

    @triton.jit
    def _row(scores_ptr, position, places, row_stride, place_stride):
        return scores_ptr + (position // places) * row_stride + (position % places) * place_stride

    @triton.jit
    def _store_partials(partials_ptr, position, b, num_blocks, top, mass):
        partials_ptr += position * 2 * num_blocks + b
        tl.store(partials_ptr, top.to(tl.float64))
        tl.store(partials_ptr + num_blocks, mass)

    @kernel()
    def _mass_kernel(
        scores_ptr, vocab, places, row_stride, place_stride, num_blocks, temperature_ptr, partials_ptr, cutoff_ptr,
        VOCAB_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The partials of all scores; a cutoff of -inf."""
        position, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
        temperature = temperature_at(temperature_ptr, position // places)
        scores_ptr = _row(scores_ptr, position, places, row_stride, place_stride)
        score = scores_at(scores_ptr, b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK), vocab)
        top = tl.max(score, 0)
        base = tl.where(top == -float("inf"), 0.0, top)
        mass = tl.sum(weight_of(score, base, temperature).to(tl.float64), 0)
        _store_partials(partials_ptr, position, b, num_blocks, top, mass)
        if b == 0:
            tl.store(cutoff_ptr + position, -float("inf"))

    @triton.jit
    def _narrowed(
        low_ptr, amounts_ptr, position, num_blocks, needed, step, NUM_BLOCKS: tl.constexpr, DIGITS: tl.constexpr
    ):
        """The key of the largest of the pivots low + digit * step above which the needed amount lies."""
        block, digit = tl.arange(0, NUM_BLOCKS)[:, None], tl.arange(0, DIGITS)
        amounts_ptr += position * num_blocks * DIGITS + block * DIGITS + digit[None, :]
        amounts = tl.load(amounts_ptr, mask=(block < num_blocks) & (digit[None, :] > 0), other=0.0)
        amount = tl.sum(amounts, 0)
        largest = tl.max(tl.where((amount >= needed) & (amount > 0.0), digit, 0), 0)
        return tl.load(low_ptr + position) + largest.to(tl.int64) * step

    @triton.jit
    def _is_searched(needed_ptr, row, BY_MASS: tl.constexpr):
        """Whether a row has a top-k, or with BY_MASS a top-p."""
        needed = tl.load(needed_ptr + row)
        return needed < 1.0 if BY_MASS else needed > 0.0

    @triton.jit
    def _needed(needed_ptr, row, vocab, mass, BY_MASS: tl.constexpr):
        """How many scores, or with BY_MASS how much of the mass, a row wants above its cutoff, float64."""
        needed = tl.load(needed_ptr + row).to(tl.float32).to(tl.float64)
        if BY_MASS:
            needed *= mass
        else:
            needed = tl.minimum(needed, vocab)
        return needed

    @kernel()
    def _narrow_kernel(
        scores_ptr, vocab, places, row_stride, place_stride, num_blocks, temperature_ptr, partials_ptr, needed_ptr,
        old_low_ptr, old_amounts_ptr, step, low_ptr, amounts_ptr,
        BY_MASS: tl.constexpr, FIRST: tl.constexpr, VOCAB_BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
        DIGITS: tl.constexpr,
    ):  # fmt: skip
        """One digit of the largest key above which enough scores, or enough of the mass, lie.

        The last pass, whose pivots were DIGITS steps apart, has left its amounts; this one leaves those of the pivots
        between. A pivot at the low end always has enough above it and is not looked at.
        """
        position, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row = position // places
        if _is_searched(needed_ptr, row, BY_MASS):
            temperature = temperature_at(temperature_ptr, row)
            top, mass = combined(partials_ptr, position, num_blocks, temperature, NUM_BLOCKS)
            if FIRST:
                low = tl.full((), -2147483648, tl.int64)
            else:
                needed = _needed(needed_ptr, row, vocab, mass, BY_MASS)
                low = _narrowed(
                    old_low_ptr, old_amounts_ptr, position, num_blocks, needed, step * DIGITS, NUM_BLOCKS, DIGITS
                )
            scores_ptr = _row(scores_ptr, position, places, row_stride, place_stride)
            score = scores_at(scores_ptr, b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK), vocab)
            key = _key_of(score)
            weight = weight_of(score, top, temperature).to(tl.float64)
            amounts_ptr += (position * num_blocks + b) * DIGITS
            pivot = low
            for digit in tl.static_range(1, DIGITS):
                pivot += step
                counts = key >= pivot.to(tl.int32)
                if BY_MASS:
                    amount = tl.sum(tl.where(counts, weight, 0.0), 0)
                else:
                    amount = tl.sum(counts.to(tl.int32), 0).to(tl.float64)
                tl.store(amounts_ptr + digit, amount)
            if b == 0:
                tl.store(low_ptr + position, low)

    @kernel()
    def _cut_kernel(
        scores_ptr, vocab, places, row_stride, place_stride, num_blocks, temperature_ptr, partials_ptr, old_cutoff_ptr,
        needed_ptr, low_ptr, amounts_ptr, step, kept_ptr, cutoff_ptr,
        BY_MASS: tl.constexpr, VOCAB_BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, DIGITS: tl.constexpr,
    ):  # fmt: skip
        """The end of a search: its cutoff, and the partials of what that keeps."""
        position, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row = position // places
        if _is_searched(needed_ptr, row, BY_MASS):
            temperature = temperature_at(temperature_ptr, row)
            top, mass = combined(partials_ptr, position, num_blocks, temperature, NUM_BLOCKS)
            needed = _needed(needed_ptr, row, vocab, mass, BY_MASS)
            key = _narrowed(low_ptr, amounts_ptr, position, num_blocks, needed, step, NUM_BLOCKS, DIGITS)
            cutoff = tl.maximum(_score_of(key), tl.load(old_cutoff_ptr + position))
            scores_ptr = _row(scores_ptr, position, places, row_stride, place_stride)
            _keep(
                scores_ptr, position, b, vocab, num_blocks, temperature, top, cutoff, kept_ptr, cutoff_ptr, VOCAB_BLOCK
            )
        else:
            _copy(partials_ptr, old_cutoff_ptr, position, b, num_blocks, kept_ptr, cutoff_ptr)

    @kernel()
    def _min_p_kernel(
        scores_ptr, vocab, places, row_stride, place_stride, num_blocks, temperature_ptr, partials_ptr, old_cutoff_ptr,
        log_min_p_ptr, kept_ptr, cutoff_ptr, VOCAB_BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        position, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row = position // places
        log_min_p = tl.load(log_min_p_ptr + row).to(tl.float32)
        if log_min_p > -float("inf"):
            temperature = temperature_at(temperature_ptr, row)
            top, _ = combined(partials_ptr, position, num_blocks, temperature, NUM_BLOCKS)
            cutoff = tl.maximum(top + temperature * log_min_p, tl.load(old_cutoff_ptr + position))
            scores_ptr = _row(scores_ptr, position, places, row_stride, place_stride)
            _keep(
                scores_ptr, position, b, vocab, num_blocks, temperature, top, cutoff, kept_ptr, cutoff_ptr, VOCAB_BLOCK
            )
        else:
            _copy(partials_ptr, old_cutoff_ptr, position, b, num_blocks, kept_ptr, cutoff_ptr)

    @triton.jit
    def _keep(
        scores_ptr, position, b, vocab, num_blocks, temperature, top, cutoff, kept_ptr, cutoff_ptr,
        VOCAB_BLOCK: tl.constexpr,
    ):  # fmt: skip
        score = scores_at(scores_ptr, b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK), vocab)
        weight = tl.where(score < cutoff, 0.0, weight_of(score, top, temperature))  # a NaN stays one
        _store_partials(kept_ptr, position, b, num_blocks, top, tl.sum(weight.to(tl.float64), 0))
        if b == 0:
            tl.store(cutoff_ptr + position, cutoff)

    @triton.jit
    def _copy(partials_ptr, old_cutoff_ptr, position, b, num_blocks, kept_ptr, cutoff_ptr):
        """A row that a pass does not concern keeps what it has, to the last bit."""
        partial = position * 2 * num_blocks + b
        tl.store(kept_ptr + partial, tl.load(partials_ptr + partial))
        tl.store(kept_ptr + partial + num_blocks, tl.load(partials_ptr + partial + num_blocks))
        if b == 0:
            tl.store(cutoff_ptr + position, tl.load(old_cutoff_ptr + position))
