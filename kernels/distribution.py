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

from specdec.kernels.dispatch import triton, uses_triton

if triton is not None:
    import triton.language as tl

VOCAB_BLOCK = 2048  # vocabulary entries that a kernel holds at a time
NUM_CANDIDATES = 16384  # scores above a bound of the cutoff that the kernel sets aside, to search only these
FEW = 128  # scores in which the reference looks for a top-p cutoff before it sorts the vocabulary
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
    flat = scores.reshape(-1, scores.shape[-1])
    statistics = (values.view(scores.shape[:-1]) for values in serve(flat, truncation))
    return Distribution(scores, truncation.temperature, *statistics)


def distribution_reference(scores: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    """(cutoff, top, mass) of [positions, vocab] scores, [positions] each, a few positions at a time."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    size = max(REFERENCE_ELEMENTS // scores.shape[1], 1)
    parts = [_statistics(part.to(dtype), truncation) for part in scores.split(size)]
    if not parts:
        empty = scores.new_empty(0, dtype=dtype)
        return empty, empty, empty.double()
    cutoff, top, mass = (torch.cat(values) for values in zip(*parts, strict=True))
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
    total = _mass(scores, top, cutoff, temperature) if top_k == 0 else None
    mass = torch.empty_like(top, dtype=torch.float64)
    rest, count = torch.arange(len(scores), device=scores.device), top_k + 1 if top_k else FEW
    while len(rest):  # of the few largest scores first, and of more of them where these do not tell
        some = scores if len(rest) == len(scores) else scores[rest]
        ranked = some.topk(count).values if count <= max(vocab // 16, min(vocab, FEW)) else falling(some)
        some_total = None if total is None else total[rest]
        cutoff[rest], mass[rest], is_sure = _cut(ranked, some_total, truncation, vocab)
        rest, count = rest[~is_sure], 8 * count
    return cutoff, top, mass


def falling(scores: Tensor) -> Tensor:
    """Sorted along the last dimension, the largest first."""
    if scores.device.type == "cpu":  # numpy sorts values without their places, five times faster
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)
    return scores.sort(descending=True).values


def _cut(ranked: Tensor, total: Tensor | None, truncation: Truncation, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """(cutoff, mass, whether the largest scores were enough to tell), [positions] each.

    ranked: [positions, count] the largest scores, falling. total: the mass of all scores, where top-k leaves them all.
    """
    temperature, top_k, top_p, min_p = truncation
    count = ranked.shape[1]
    top, last = ranked[:, :1], ranked[:, -1]
    weights = ranked.sub(top).div_(temperature).exp_().double()
    cutoff = torch.full_like(last, -math.inf)
    is_sure = torch.ones_like(last, dtype=torch.bool)
    if top_k and top_k < vocab:
        cutoff = ranked[:, top_k - 1]
        is_sure = (last < cutoff) | cutoff.isneginf()  # nothing beyond them ties with the k-th
    if top_k:
        weights *= ranked >= cutoff[:, None]
        total = weights.sum(1)
    if top_p < 1:
        assert total is not None
        reached = weights.cumsum(1) >= top_p * total[:, None]
        place = torch.where(reached.any(1), reached.long().argmax(1), count - 1)
        cutoff = ranked.gather(1, place[:, None]).squeeze(1)
        if not top_k:
            is_sure = reached.any(1) & (last < cutoff)
    if min_p > 0:
        cutoff = torch.maximum(cutoff, top[:, 0] + temperature * math.log(min_p))
    mass = (weights * (ranked >= cutoff[:, None])).sum(1)
    return cutoff, mass, is_sure | (count == vocab) | ranked[:, 0].isnan()


def _mass(scores: Tensor, top: Tensor, cutoff: Tensor, temperature: float) -> Tensor:
    """The sum of exp((scores - top) / temperature): the largest of these is 1, and its probability 1 / sum."""
    return probs_of(scores, top[:, None], cutoff[:, None], temperature).amax(1).double().reciprocal_()


def _distribution_triton(scores: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    num, vocab = scores.shape
    scores = kernel_scores(scores)
    cutoff, top = (torch.empty(num, dtype=torch.float32, device=scores.device) for _ in range(2))
    mass = torch.empty(num, dtype=torch.float64, device=scores.device)
    if num:
        _distribution_kernel[(num,)](
            scores,
            candidates_for(scores, truncation),
            cutoff,
            top,
            mass,
            vocab,
            scores.stride(0),
            NUM_CANDIDATES,
            *numbers_of(truncation),
            **blocks_of(vocab),
        )
    return cutoff, top, mass


def kernel_scores(scores: Tensor) -> Tensor:
    """[positions, vocab] as the kernels read them: entries side by side, float32 at most."""
    scores = scores.float() if scores.dtype == torch.float64 else scores
    return scores if scores.stride(-1) == 1 else scores.contiguous()


def candidates_for(scores: Tensor, truncation: Truncation) -> Tensor:
    """Room for the kernel's search; one entry where there is nothing to search."""
    searches = truncation.top_k > 0 or truncation.top_p < 1
    shape = (len(scores), NUM_CANDIDATES) if searches else (1, 1)
    return torch.empty(shape, dtype=scores.dtype, device=scores.device)


def numbers_of(truncation: Truncation) -> tuple[float, int, float, float]:
    """A truncation as kernels take it: temperature, top_k, top_p, log min_p."""
    temperature, top_k, top_p, min_p = truncation
    return float(temperature), int(top_k), float(top_p), math.log(min_p) if min_p > 0 else -math.inf


def blocks_of(vocab: int) -> dict[str, int]:
    """VOCAB_BLOCK and NUM_BLOCKS, a power of two that covers the vocabulary."""
    block = min(VOCAB_BLOCK, triton.next_power_of_2(vocab))
    return {"VOCAB_BLOCK": block, "NUM_BLOCKS": triton.next_power_of_2(triton.cdiv(vocab, block))}


if triton is not None:

    @triton.jit
    def _key_of(score):
        """Integers in the order of the float32 scores; the two zeros are one."""
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    @triton.jit
    def _score_of(key):
        bits = key.to(tl.int32)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)

    @triton.jit
    def weight_of(score, top, temperature):
        return tl.exp((score - top) / temperature)

    @triton.jit
    def prob_of(score, temperature, cutoff, top, mass):
        """float64, rounded as draft probabilities are, so that equal scores give equal p and q."""
        weight = tl.where(score >= cutoff, weight_of(score, top, temperature), 0.0)
        return (weight / mass.to(tl.float32)).to(tl.float64)

    @triton.jit
    def probs_at(ptr, index, vocab, temperature, cutoff, top, mass):
        """p at `index`, 0 behind the vocabulary."""
        score = tl.load(ptr + index, mask=index < vocab, other=-float("inf")).to(tl.float32)
        return prob_of(score, temperature, cutoff, top, mass)

    @triton.jit
    def _amount(ptr, size, key, top, temperature, BY_MASS: tl.constexpr, VOCAB_BLOCK: tl.constexpr):
        """The number, or the mass, of the scores not below that of `key`."""
        sums = tl.zeros([VOCAB_BLOCK], dtype=tl.float64)
        for b in range(tl.cdiv(size, VOCAB_BLOCK)):
            index = b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
            score = tl.load(ptr + index, mask=index < size, other=-float("inf")).to(tl.float32)
            counts = (_key_of(score) >= key) & (index < size)
            if BY_MASS:
                sums += tl.where(counts, weight_of(score, top, temperature), 0.0).to(tl.float64)
            else:
                sums += counts.to(tl.float64)
        return tl.sum(sums, 0)

    @triton.jit
    def _largest_key(ptr, size, low, high, needed, top, temperature, BY_MASS: tl.constexpr, VOCAB_BLOCK: tl.constexpr):
        """The largest key that leaves at least the needed amount; `low` does. Bisection over the bits of a float."""
        while low < high:
            middle = low + (high - low + 1) // 2
            if _amount(ptr, size, middle, top, temperature, BY_MASS, VOCAB_BLOCK) >= needed:
                low = middle
            else:
                high = middle - 1
        return low

    @triton.jit
    def _search(ptr, size, vocab, low, top, mass, temperature, top_k, top_p, VOCAB_BLOCK: tl.constexpr):
        """The key of the cutoff of top-k and then top-p among `size` scores, which hold all that they keep."""
        high = _key_of(top).to(tl.int64)
        if top_k > 0:
            needed = tl.minimum(top_k, vocab).to(tl.float64)
            low = _largest_key(ptr, size, low, high, needed, top, temperature, False, VOCAB_BLOCK)
        if top_p < 1.0:
            if top_k > 0:
                mass = _amount(ptr, size, low, top, temperature, True, VOCAB_BLOCK)
            low = _largest_key(ptr, size, low, high, top_p * mass, top, temperature, True, VOCAB_BLOCK)
        return low

    @triton.jit
    def _lower_bound(lane, top, mass, vocab, temperature, top_k, top_p, VOCAB_BLOCK: tl.constexpr):
        """A score that the cutoff is not below, so that what lies below need not be searched."""
        bound = top * 0.0 - float("inf")
        if top_k > 0:
            if top_k <= VOCAB_BLOCK:
                # The k-th largest of the lanes' largest scores: k scores at least are not below it.
                keys = _key_of(lane)
                low, high = tl.min(keys, 0).to(tl.int64), tl.max(keys, 0).to(tl.int64)
                while low < high:
                    middle = low + (high - low + 1) // 2
                    if tl.sum((keys >= middle).to(tl.int32), 0) >= top_k:
                        low = middle
                    else:
                        high = middle - 1
                bound = _score_of(low)
        else:
            # All tokens below it together weigh less than the share that top-p drops; half of it, for rounding.
            share = ((1.0 - top_p) * 0.5 * mass / vocab).to(tl.float32)
            bound = top + temperature * tl.log(share)
        return bound

    @triton.jit
    def _set_aside(ptr, candidates_ptr, vocab, bound, room, VOCAB_BLOCK: tl.constexpr):
        """Copy the scores not below `bound`, as far as there is room; returns how many there are."""
        count = 0
        for b in range(tl.cdiv(vocab, VOCAB_BLOCK)):
            index = b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
            score = tl.load(ptr + index, mask=index < vocab, other=-float("inf"))
            wanted = ((score.to(tl.float32) >= bound) & (index < vocab)).to(tl.int32)
            place = count + tl.cumsum(wanted, 0) - 1
            tl.store(candidates_ptr + place, score, mask=(wanted > 0) & (place < room))
            count += tl.sum(wanted, 0)
        tl.debug_barrier()  # the other threads read them next
        return count

    @triton.jit
    def statistics(ptr, candidates_ptr, vocab, room, temperature, top_k, top_p, log_min_p, VOCAB_BLOCK: tl.constexpr):
        """(cutoff, top, mass) of one row of scores, by one program."""
        lane = tl.full([VOCAB_BLOCK], -float("inf"), tl.float32)
        for b in range(tl.cdiv(vocab, VOCAB_BLOCK)):
            index = b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
            lane = tl.maximum(lane, tl.load(ptr + index, mask=index < vocab, other=-float("inf")).to(tl.float32))
        top = tl.max(lane, 0)
        sums = tl.zeros([VOCAB_BLOCK], dtype=tl.float64)
        for b in range(tl.cdiv(vocab, VOCAB_BLOCK)):
            index = b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
            score = tl.load(ptr + index, mask=index < vocab, other=-float("inf")).to(tl.float32)
            sums += weight_of(score, top, temperature).to(tl.float64)
        mass = tl.sum(sums, 0)  # NaN where the scores are unusable
        cutoff = top + temperature * log_min_p
        if mass == mass:
            if (top_k > 0) | (top_p < 1.0):
                bound = _lower_bound(lane, top, mass, vocab, temperature, top_k, top_p, VOCAB_BLOCK)
                count = _set_aside(ptr, candidates_ptr, vocab, bound, room, VOCAB_BLOCK)
                low = _key_of(bound).to(tl.int64)
                if count <= room:
                    key = _search(candidates_ptr, count, vocab, low, top, mass, temperature, top_k, top_p, VOCAB_BLOCK)
                else:
                    key = _search(ptr, vocab, vocab, low, top, mass, temperature, top_k, top_p, VOCAB_BLOCK)
                cutoff = tl.maximum(cutoff, _score_of(key))
            if cutoff > -float("inf"):
                mass = _amount(ptr, vocab, _key_of(cutoff), top, temperature, True, VOCAB_BLOCK)
        return cutoff, top, mass

    @triton.jit
    def _distribution_kernel(
        scores_ptr,
        candidates_ptr,
        cutoff_ptr,
        top_ptr,
        mass_ptr,
        vocab,
        stride,
        room,
        temperature,
        top_k,
        top_p,
        log_min_p,
        VOCAB_BLOCK: tl.constexpr,
        NUM_BLOCKS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        cutoff, top, mass = statistics(
            scores_ptr + row * stride, candidates_ptr + row * room, vocab, room, temperature, top_k, top_p, log_min_p,
            VOCAB_BLOCK,
        )  # fmt: skip
        tl.store(cutoff_ptr + row, cutoff)
        tl.store(top_ptr + row, top)
        tl.store(mass_ptr + row, mass)
