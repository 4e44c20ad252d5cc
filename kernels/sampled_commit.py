"""Lossless sampled verification and commit in one kernel: the committed tokens follow the target's distribution.

accepted: draft tokens that the target keeps. recovered: the token behind them where the draft was not kept in full, a
sample of what the drafter proposes too rarely. bonus: the token behind a draft kept in full, a sample of the target.

verification="token" (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023, arXiv 2302.01318):
draft token x at place i is accepted with probability min(1, p_i(x) / q_i(x)) until the first rejection.
verification="block" (Sun et al. 2024, arXiv 2403.10444, algorithm 2): with r_0 = 1,
r_i = min(1, r_{i-1} p(x_i) / q(x_i)) and R_i = sum_x (r_i p(x | x_<=i) - q(x | x_<=i))+, the longest prefix i with
u_i < h_i is accepted, where h_i = R_i / (R_i + 1 - r_i), or h_i = r_i for the whole draft. In expectation never fewer
tokens than "token".
The recovered token behind i accepted ones is a sample of norm((s p - q)+), where s = 1 for "token" and r_i for "block".

Randomness comes in as numbers, one row's in one row, so that a row's result never depends on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.dispatch import triton, uses_triton
from specdec.kernels.greedy_commit import NO_TOKEN, Committed, commit, empty_committed

if triton is not None:
    import triton.language as tl

    from specdec.kernels.greedy_commit import commit_row

VOCAB_BLOCK = 2048  # vocabulary entries that the kernel holds at a time


def sampled_commit(
    target_probs: Tensor,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    uniforms: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    verification: str = "token",
    implementation: str = "auto",
) -> Committed:
    """Verify sampled drafts and append the result to every row.

    target_probs: [rows, k + 1, vocab] float, the target's distribution p behind each input token.
    draft_ids: [rows, k] int64, NO_TOKEN where nothing was drafted; a row's drafts form a prefix.
    draft_probs: [rows, k, vocab] float, the distribution q that each draft was sampled from (what stands where nothing
        was drafted is not read); None for deterministic drafts, whose q is one-hot.
    uniforms: [rows, k + 1] float64 in [0, 1). Column 0 chooses the recovered or bonus token by inverse transform (a
        float32 has too few values for 10^5 tokens); column 1 + i decides about draft i. All must be independent of each
        other, of the numbers that the drafts were sampled with, and of every earlier step's: "block" looks at those
        behind a rejection too, so they may not serve again at their places in the next step.
    eos_ids: [num_eos] int64, may be empty.
    token_ids: [rows, >= max(lengths) + k + 1] int64, written in place behind each row's length.
    lengths: [rows] int64, advanced in place. limits: [rows] int64, each at least lengths + 1.
    verification: "token" or "block". For deterministic drafts both accept i or more with probability
        p(x_1) ... p(x_i), which no lossless rule exceeds; they are verified by token, the cheaper of the two.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.
    """
    _check(target_probs, draft_ids, draft_probs, uniforms, verification)
    serve = _sampled_commit_triton if uses_triton(implementation, target_probs) else sampled_commit_reference
    return serve(target_probs, draft_ids, draft_probs, uniforms, eos_ids, token_ids, lengths, limits, verification)


def _check(
    target_probs: Tensor, draft_ids: Tensor, draft_probs: Tensor | None, uniforms: Tensor, verification: str
) -> None:
    if verification not in ("token", "block"):
        raise ValueError(f"verification={verification!r}; choose 'token' or 'block'")
    rows, k = draft_ids.shape
    vocab = target_probs.shape[-1]
    expected = {
        "target_probs": (target_probs, (rows, k + 1, vocab)),
        "draft_probs": (draft_probs, (rows, k, vocab)),
        "uniforms": (uniforms, (rows, k + 1)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {rows} rows of {k} drafts need {shape}")
    if uniforms.dtype != torch.float64:
        raise ValueError(f"uniforms are {uniforms.dtype}; pass float64")


def sampled_commit_reference(
    target_probs: Tensor,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    uniforms: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    verification: str = "token",
) -> Committed:
    """The same in plain torch."""
    if verification == "block" and draft_probs is not None:
        chances, scales = block_chances(target_probs, draft_ids, draft_probs)
        num_accepted = _longest(uniforms[:, 1:] < chances)
    else:
        chances, scales = token_chances(target_probs, draft_ids, draft_probs)
        num_accepted = (uniforms[:, 1:] < chances).long().cumprod(1).sum(1)
    mass = final_mass(target_probs, draft_ids, draft_probs, num_accepted, scales)
    final = sample_tokens(mass, uniforms[:, 0])[:, None]
    column = torch.arange(draft_ids.shape[1] + 1, device=draft_ids.device)
    # The final token also fills the places behind it: they are written too, and no -1 may reach an embedding.
    drafts = torch.cat([draft_ids, final], 1)
    candidates = torch.where(column < num_accepted[:, None], drafts, final)
    return commit(candidates, num_accepted, eos_ids, token_ids, lengths, limits)


def token_chances(target_probs: Tensor, draft_ids: Tensor, draft_probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """min(1, p / q) of every draft, [rows, k] float64, 0 where nothing was drafted; the scales s = 1, [rows, k + 1]."""
    p, q = _probs_of_drafts(target_probs, draft_ids, draft_probs)
    return _ratio(p, q), p.new_ones(draft_ids.shape[0], draft_ids.shape[1] + 1)


def block_chances(target_probs: Tensor, draft_ids: Tensor, draft_probs: Tensor) -> tuple[Tensor, Tensor]:
    """h_i of every prefix, [rows, k] float64, 0 where nothing was drafted; the scales s = r_0 .. r_k, [rows, k + 1].

    One place at a time, so that no [rows, k, vocab] tensor is made.
    """
    p, q = _probs_of_drafts(target_probs, draft_ids, draft_probs)
    num_rows, k = draft_ids.shape
    scales, chances = p.new_ones(num_rows, k + 1), p.new_zeros(num_rows, k)
    for i in range(1, k + 1):
        scales[:, i] = _ratio(scales[:, i - 1] * p[:, i - 1], q[:, i - 1])
        chances[:, i - 1] = scales[:, i]
        if i < k:
            residual = (target_probs[:, i].double() * scales[:, i, None] - draft_probs[:, i]).clamp_(min=0).sum(1)
            denominator = residual + (1 - scales[:, i])
            goes_on = draft_ids[:, i] != NO_TOKEN  # otherwise i is this row's whole draft
            chance = torch.where(denominator > 0, residual / denominator, 0)
            chances[:, i - 1] = torch.where(goes_on, chance, scales[:, i])
    return chances.masked_fill_(draft_ids == NO_TOKEN, 0), scales


def final_mass(
    target_probs: Tensor, draft_ids: Tensor, draft_probs: Tensor | None, num_accepted: Tensor, scales: Tensor
) -> Tensor:
    """What the token behind the accepted ones is sampled from, not normalised, [rows, vocab] float64.

    Bonus: p. Recovered: (s p - q)+, or p where rounding leaves none of it (p equals q, so that nothing is to recover).
    """
    row = torch.arange(len(num_accepted), device=num_accepted.device)
    p = target_probs[row, num_accepted].double()
    num_drafted = (draft_ids != NO_TOKEN).sum(1)
    if draft_ids.shape[1] == 0:
        return p
    place = num_accepted.clamp(max=draft_ids.shape[1] - 1)
    if draft_probs is None:
        mass = p.scatter(1, draft_ids[row, place].clamp(min=0)[:, None], 0)
    else:
        mass = (p * scales[row, num_accepted, None]).sub_(draft_probs[row, place]).clamp_(min=0)
    is_bonus = (num_accepted == num_drafted) | (mass.sum(1) == 0)
    return torch.where(is_bonus[:, None], p, mass)


def sample_tokens(mass: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row with probability mass / mass.sum(), by inverse transform, [rows] int64.

    mass: [rows, vocab], not negative; a token without mass is never chosen. uniforms: [rows] float64 in [0, 1).
    """
    cumulative = mass.cumsum(1, dtype=torch.float64)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=mass.shape[1] - 1)
    # A parallel cumulative sum need not be monotone to the last bit, so it may rise at a token without mass.
    return torch.where(mass.gather(1, token) > 0, token, mass.argmax(1, keepdim=True)).squeeze(1)


def _probs_of_drafts(target_probs: Tensor, draft_ids: Tensor, draft_probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """p and q of every draft, [rows, k] float64; p = 0 and q = 1 where nothing was drafted."""
    index = draft_ids.clamp(min=0)[..., None]
    nothing = draft_ids == NO_TOKEN
    p = target_probs[:, :-1].gather(2, index).squeeze(2).double().masked_fill_(nothing, 0)
    if draft_probs is None:
        return p, torch.ones_like(p)
    return p, draft_probs.gather(2, index).squeeze(2).double().masked_fill_(nothing, 1)


def _ratio(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p / q), where p / 0 is 1 and 0 / 0 is 0."""
    return torch.where(p < q, p / q, (p > 0).to(p.dtype))


def _longest(accepted: Tensor) -> Tensor:
    """The longest accepted prefix, 0 for none, [rows]. accepted: [rows, k] bool, column i - 1 for the prefix of i."""
    return accepted.flip(1).cumsum(1).gt(0).sum(1)


def _sampled_commit_triton(
    target_probs: Tensor,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    uniforms: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    verification: str,
) -> Committed:
    num_rows, k = draft_ids.shape
    vocab = target_probs.shape[2]
    out = empty_committed(num_rows, k + 1, lengths.device)
    if target_probs.stride(2) != 1:
        target_probs = target_probs.contiguous()
    q = target_probs if draft_probs is None else draft_probs
    if q.stride(2) != 1:
        q = q.contiguous()
    vocab_block = min(VOCAB_BLOCK, triton.next_power_of_2(vocab))
    _sampled_commit_kernel[(num_rows,)](
        target_probs,
        draft_ids.contiguous(),
        q,
        uniforms.contiguous(),
        eos_ids,
        token_ids,
        lengths,
        limits,
        *out,
        k,
        vocab,
        eos_ids.numel(),
        target_probs.stride(0),
        target_probs.stride(1),
        q.stride(0),
        q.stride(1),
        token_ids.stride(0),
        BY_BLOCK=verification == "block" and draft_probs is not None,
        SAMPLED=draft_probs is not None,
        BLOCK=triton.next_power_of_2(k + 1),
        VOCAB_BLOCK=vocab_block,
        NUM_BLOCKS=triton.next_power_of_2(triton.cdiv(vocab, vocab_block)),
    )
    return out


if triton is not None:

    @triton.jit
    def _at(values, column, i):
        """values[i] of a vector in registers."""
        return tl.sum(tl.where(column == i, values, 0.0), 0)

    @triton.jit
    def _ratio_kernel(p, q):
        return tl.where(p < q, p / q, tl.where(p > 0.0, 1.0, 0.0).to(tl.float64))

    @triton.jit
    def _mass(p_ptr, q_ptr, index, vocab, scale, drafted, SAMPLED: tl.constexpr):
        """(s p - q)+ at `index`, one-hot q at `drafted` unless SAMPLED; p where `drafted` is -1."""
        mass = tl.load(p_ptr + index, mask=index < vocab, other=0.0).to(tl.float64) * scale
        if SAMPLED:
            num_read = tl.where(drafted == -1, 0, vocab)
            q = tl.load(q_ptr + index, mask=index < num_read, other=0.0).to(tl.float64)
            return tl.maximum(mass - q, 0.0)
        return tl.where(index == drafted, 0.0, mass)

    @triton.jit
    def _block_sums(
        p_ptr, q_ptr, vocab, scale, drafted,
        SAMPLED: tl.constexpr, VOCAB_BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """The mass of every block of the vocabulary, [NUM_BLOCKS] float64."""
        block = tl.arange(0, NUM_BLOCKS)
        sums = tl.zeros([NUM_BLOCKS], dtype=tl.float64)
        for b in range(tl.cdiv(vocab, VOCAB_BLOCK)):
            index = b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
            sums = tl.where(block == b, tl.sum(_mass(p_ptr, q_ptr, index, vocab, scale, drafted, SAMPLED), 0), sums)
        return sums

    @triton.jit
    def _first_above(mass, cumulative, threshold, index, SIZE: tl.constexpr):
        """The first entry with mass whose cumulative sum exceeds the threshold, or the last with mass."""
        first = tl.min(tl.where((cumulative > threshold) & (mass > 0.0), index, SIZE), 0)
        last = tl.max(tl.where(mass > 0.0, index, 0), 0)
        return tl.minimum(first, last)

    @triton.jit
    def _sample(
        p_ptr, q_ptr, vocab, scale, drafted, uniform,
        SAMPLED: tl.constexpr, VOCAB_BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """The recovered token, or the bonus where `drafted` is -1: one pass, then the block that holds the token."""
        sums = _block_sums(p_ptr, q_ptr, vocab, scale, drafted, SAMPLED, VOCAB_BLOCK, NUM_BLOCKS)
        if tl.sum(sums, 0) == 0.0:
            drafted = drafted * 0 - 1
            scale = scale * 0.0 + 1.0
            sums = _block_sums(p_ptr, q_ptr, vocab, scale, drafted, SAMPLED, VOCAB_BLOCK, NUM_BLOCKS)
        block = tl.arange(0, NUM_BLOCKS)
        threshold = uniform * tl.sum(sums, 0)
        chosen = _first_above(sums, tl.cumsum(sums, 0), threshold, block, NUM_BLOCKS)
        inner = tl.arange(0, VOCAB_BLOCK)
        mass = _mass(p_ptr, q_ptr, chosen * VOCAB_BLOCK + inner, vocab, scale, drafted, SAMPLED)
        before = tl.sum(tl.where(block < chosen, sums, 0.0), 0)
        return chosen * VOCAB_BLOCK + _first_above(mass, before + tl.cumsum(mass, 0), threshold, inner, VOCAB_BLOCK)

    @triton.jit
    def _longest_prefix(
        p, q, uniforms, draft, column, num_drafted, p_ptr, q_ptr, p_stride, q_stride, vocab,
        BLOCK: tl.constexpr, VOCAB_BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """Block verification, the longest prefix first: (number accepted, its scale r)."""
        scale = tl.full((), 1.0, tl.float64)
        scales = tl.zeros([BLOCK], dtype=tl.float64)
        for i in range(num_drafted):
            scale = _ratio_kernel(scale * _at(p, column, i), _at(q, column, i))
            scales = tl.where(column == i, scale, scales)
        place = num_drafted
        accepted = _at(uniforms, column, place - 1) < scale
        while (place > 0) & (accepted == 0):
            place -= 1
            scale = tl.where(place > 0, _at(scales, column, place - 1), 1.0)
            if place > 0:
                drafted = tl.sum(tl.where(column == place, draft, 0), 0)
                sums = _block_sums(
                    p_ptr + place * p_stride, q_ptr + place * q_stride, vocab, scale, drafted,
                    True, VOCAB_BLOCK, NUM_BLOCKS,
                )  # fmt: skip
                residual = tl.sum(sums, 0)
                # u < R / (R + 1 - r), and never where both are 0
                accepted = _at(uniforms, column, place - 1) * (residual + (1.0 - scale)) < residual
        return place, scale

    @triton.jit
    def _sampled_commit_kernel(
        target_ptr,
        draft_ptr,
        draft_probs_ptr,
        uniforms_ptr,
        eos_ptr,
        tokens_ptr,
        lengths_ptr,
        limits_ptr,
        out_ptr,
        num_committed_ptr,
        num_accepted_ptr,
        finished_ptr,
        k,
        vocab,
        num_eos,
        p_row_stride,
        p_stride,
        q_row_stride,
        q_stride,
        tokens_stride,
        BY_BLOCK: tl.constexpr,
        SAMPLED: tl.constexpr,
        BLOCK: tl.constexpr,
        VOCAB_BLOCK: tl.constexpr,
        NUM_BLOCKS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        p_ptr = target_ptr + row * p_row_stride
        q_ptr = draft_probs_ptr + row * q_row_stride
        column = tl.arange(0, BLOCK)
        draft = tl.load(draft_ptr + row * k + column, mask=column < k, other=-1)
        drafted = draft != -1
        num_drafted = tl.sum(drafted.to(tl.int32), 0)
        uniforms = tl.load(uniforms_ptr + row * (k + 1) + 1 + column, mask=drafted, other=1.0)
        p = tl.load(p_ptr + column * p_stride + draft, mask=drafted, other=0.0).to(tl.float64)
        q = tl.full([BLOCK], 1.0, tl.float64)
        if SAMPLED:
            q = tl.load(q_ptr + column * q_stride + draft, mask=drafted, other=1.0).to(tl.float64)
        if BY_BLOCK:
            num_accepted, scale = _longest_prefix(
                p, q, uniforms, draft, column, num_drafted, p_ptr, q_ptr, p_stride, q_stride, vocab,
                BLOCK, VOCAB_BLOCK, NUM_BLOCKS,
            )  # fmt: skip
        else:
            num_accepted = tl.min(tl.where(uniforms < _ratio_kernel(p, q), num_drafted, column), 0)
            scale = tl.full((), 1.0, tl.float64)
        # -1 behind the last draft, where column num_drafted is always inside, since BLOCK > k
        rejected = tl.sum(tl.where(column == num_accepted, draft, 0), 0)
        final = _sample(
            p_ptr + num_accepted * p_stride, q_ptr + num_accepted * q_stride, vocab, scale, rejected,
            tl.load(uniforms_ptr + row * (k + 1)), SAMPLED, VOCAB_BLOCK, NUM_BLOCKS,
        )  # fmt: skip
        commit_row(
            tl.where(column < num_accepted, draft, final.to(tl.int64)), num_accepted, column, row, eos_ptr, tokens_ptr,
            lengths_ptr, limits_ptr, out_ptr, num_committed_ptr, num_accepted_ptr, finished_ptr, k + 1, num_eos,
            tokens_stride,
        )  # fmt: skip
