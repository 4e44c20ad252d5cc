"""Lossless sampled verification and commit: the committed tokens follow the target's distribution.

accepted: draft tokens that the target keeps. recovered: the token after them where the draft was not kept in full, a
sample of what the drafter proposes too rarely. bonus: the token after a draft kept in full, a sample of the target.

verification="token" (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023, arXiv 2302.01318):
draft token x at place i is accepted with probability min(1, p_i(x) / q_i(x)) until the first rejection.
verification="block" (Sun et al. 2024, arXiv 2403.10444, algorithm 2): with r_0 = 1,
r_i = min(1, r_{i-1} p(x_i) / q(x_i)) and R_i = sum_x (r_i p(x | x_<=i) - q(x | x_<=i))+, the longest prefix i with
u_i < h_i is accepted, where h_i = R_i / (R_i + 1 - r_i), or h_i = r_i for the whole draft. In expectation never fewer
tokens than "token".
With `lenience` l below 1, "token" is no longer lossless: p counts for p / l, in the acceptance and in the residual.

The recovered token after i accepted ones is a sample of norm((s p - q)+), where s = 1 / l for "token" and r_i for
"block".

A greedy row commits what `greedy_commit` commits, by either method: drafts are accepted while they equal the first of
the target's largest scores, whatever the row's numbers and draft probabilities say.

The target's probabilities are computed from its scores where they are read and never stored. Only those of the drafts
and those at one place of each row are read ("block": at all places).

Randomness comes in as numbers, one row's in one row, so that a row's result never depends on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.commit.distribution import REFERENCE_ELEMENTS, Distribution, row_sums
from specdec.kernels.commit.greedy_commit import BAD_SCORES, NO_TOKEN, Committed, commit, nan_within
from specdec.kernels.commit.sample import sample_tokens
from specdec.kernels.commit.sampled_commit_triton import sampled_commit_triton
from specdec.kernels.dispatch import uses_triton


def sampled_commit(
    target: Distribution,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    uniforms: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    verification: str = "token",
    implementation: str = "auto",
    lenience: float = 1.0,
    passes: Tensor | None = None,
) -> Committed:
    """Verify sampled drafts and append the result to every row.

    target: over [rows, k + 1, vocab], the target's distribution p after each input token.
    draft_ids: [rows, k] int64, NO_TOKEN where nothing was drafted; a row's drafts form a prefix.
    draft_probs: [rows, k, vocab] float, the distribution q that each draft was sampled from (not read where nothing
        was drafted, and without effect in greedy rows); None for deterministic drafts, whose q is one-hot.
    uniforms: [rows, k + 1] float64 in [0, 1). Column 0 chooses the recovered or bonus token by inverse transform (a
        float32 has too few values for 10^5 tokens); column 1 + i decides about draft i. All must be independent of each
        other, of the numbers that the drafts were sampled with, and of every earlier step's: "block" looks at those
        after a rejection too, so they may not serve again at their places in the next step.
    eos_ids: [num_eos] int64 of all rows, or [rows, num_eos] of each, filled up with -1; may be empty.
    token_ids: [rows, >= max(lengths) + k + 1] int64, written in place after each row's length.
    lengths: [rows] int64, advanced in place. limits: [rows] int64, each at least lengths + 1.
    verification: "token" or "block". For deterministic drafts both accept i or more with probability
        p(x_1) ... p(x_i), which no lossless rule exceeds; they are verified by token, the cheaper of the two.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.
    lenience: above 0, at most 1; of "token" alone.
    passes: [rows, k] bool, as in `greedy_commit`: drafts that greedy rows accept besides the argmax. Rows that sample
        do not read it.
    """
    _check(target, draft_ids, draft_probs, uniforms, verification, lenience)
    options = (verification, lenience, passes)
    serve = sampled_commit_triton if uses_triton(implementation, target.scores) else sampled_commit_reference
    return serve(target, draft_ids, draft_probs, uniforms, eos_ids, token_ids, lengths, limits, *options)


def _check(
    target: Distribution,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    uniforms: Tensor,
    verification: str,
    lenience: float,
) -> None:
    if verification not in ("token", "block"):
        raise ValueError(f"verification={verification!r}; choose 'token' or 'block'")
    if not 0 < lenience <= 1 or (verification == "block" and lenience != 1):
        raise ValueError(f"lenience={lenience} must be in (0, 1], and 1 for block verification")
    rows, k = draft_ids.shape
    vocab = target.scores.shape[-1]
    expected = {
        "target": (target.scores, (rows, k + 1, vocab)),
        "draft_probs": (draft_probs, (rows, k, vocab)),
        "uniforms": (uniforms, (rows, k + 1)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {rows} rows of {k} drafts need {shape}")
    if uniforms.dtype != torch.float64:
        raise ValueError(f"uniforms are {uniforms.dtype}; pass float64")


def sampled_commit_reference(
    target: Distribution,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    uniforms: Tensor,
    eos_ids: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    verification: str = "token",
    lenience: float = 1.0,
    passes: Tensor | None = None,
) -> Committed:
    """The same in plain torch, a few rows at a time."""
    size = max(REFERENCE_ELEMENTS // target.scores.shape[2], 1)
    decided = []
    for first in range(0, len(draft_ids), size):
        part = slice(first, first + size)
        q = None if draft_probs is None else draft_probs[part]
        decided.append(_decide(target.rows(part), draft_ids[part], q, uniforms[part], verification, lenience))
    num_accepted, final = (torch.cat(values) for values in zip(*decided, strict=True))
    if target.best is not None:
        num_accepted, final = _decide_greedy(target.best, draft_ids, passes, num_accepted, final)

    column = torch.arange(draft_ids.shape[1] + 1, device=draft_ids.device)
    # The final token also fills the places after it: they are written too, and no -1 may reach an embedding.
    drafts = torch.cat([draft_ids, final[:, None]], 1)
    candidates = torch.where(column < num_accepted[:, None], drafts, final[:, None])
    done = commit(candidates, num_accepted, draft_ids, eos_ids, token_ids, lengths, limits)
    done.fault.copy_(nan_within(target.mass.isnan(), done.num_accepted) * BAD_SCORES)
    return done


def _decide(
    target: Distribution,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    uniforms: Tensor,
    verification: str,
    lenience: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """How many drafts are accepted and the token after them, [rows] int64 each."""
    if verification == "block" and draft_probs is not None:
        chances, scales = block_chances(target, draft_ids, draft_probs)
        num_accepted = _longest(uniforms[:, 1:] < chances)
    else:
        chances, scales = token_chances(target, draft_ids, draft_probs, lenience)
        num_accepted = (uniforms[:, 1:] < chances).long().cumprod(1).sum(1)
    mass = final_mass(target, draft_ids, draft_probs, num_accepted, scales)
    return num_accepted, sample_tokens(mass, uniforms[:, 0])


def _decide_greedy(
    best: Tensor, draft_ids: Tensor, passes: Tensor | None, num_accepted: Tensor, final: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, with what greedy rows decide put in place of what `_decide` made of them. best: see `Distribution`."""
    agrees = draft_ids == best[:, :-1]
    if passes is not None:
        agrees |= passes
    num_agreed = agrees.long().cumprod(1).sum(1)
    recovered = best.gather(1, num_agreed[:, None]).squeeze(1)

    is_greedy = best[:, 0] != NO_TOKEN
    return torch.where(is_greedy, num_agreed, num_accepted), torch.where(is_greedy, recovered, final)


def token_chances(
    target: Distribution, draft_ids: Tensor, draft_probs: Tensor | None, lenience: float = 1.0
) -> tuple[Tensor, Tensor]:
    """min(1, s p / q) of every draft, [rows, k] float64, 0 where nothing was drafted; the scales s = 1 / lenience,
    [rows, k + 1]."""
    p, q = _probs_of_drafts(target, draft_ids, draft_probs)
    scales = p.new_full((draft_ids.shape[0], draft_ids.shape[1] + 1), 1 / lenience)
    return _ratio(p / lenience, q), scales


def block_chances(target: Distribution, draft_ids: Tensor, draft_probs: Tensor) -> tuple[Tensor, Tensor]:
    """h_i of every prefix, [rows, k] float64, 0 where nothing was drafted; the scales s = r_0 .. r_k, [rows, k + 1].

    One place at a time, so that no [rows, k, vocab] tensor is made.
    """
    p, q = _probs_of_drafts(target, draft_ids, draft_probs)
    num_rows, k = draft_ids.shape
    scales, chances = p.new_ones(num_rows, k + 1), p.new_zeros(num_rows, k)
    for i in range(1, k + 1):
        scales[:, i] = _ratio(scales[:, i - 1] * p[:, i - 1], q[:, i - 1])
        chances[:, i - 1] = scales[:, i]
        if i < k:
            place = torch.full_like(draft_ids[:, 0], i)
            residual = row_sums(_residual(target.at(place), draft_probs[:, i], scales[:, i])).double()
            denominator = residual + (1 - scales[:, i])
            goes_on = draft_ids[:, i] != NO_TOKEN  # otherwise i is this row's whole draft
            chance = torch.where(denominator > 0, residual / denominator, 0)
            chances[:, i - 1] = torch.where(goes_on, chance, scales[:, i])
    return chances.masked_fill_(draft_ids == NO_TOKEN, 0), scales


def final_mass(
    target: Distribution, draft_ids: Tensor, draft_probs: Tensor | None, num_accepted: Tensor, scales: Tensor
) -> Tensor:
    """The masses that the token after the accepted ones is sampled by, not normalised, [rows, vocab].

    Bonus: p. Recovered: (s p - q)+, or p where rounding leaves none of it (p equals q, so nothing is missing).
    """
    row = torch.arange(len(num_accepted), device=num_accepted.device)
    p = target.at(num_accepted)
    num_drafted = (draft_ids != NO_TOKEN).sum(1)
    if draft_ids.shape[1] == 0:
        return p
    place = num_accepted.clamp(max=draft_ids.shape[1] - 1)
    if draft_probs is None:
        mass = p.scatter(1, draft_ids[row, place].clamp(min=0)[:, None], 0)
    else:
        mass = _residual(p, draft_probs[row, place], scales[row, num_accepted])
    is_bonus = (num_accepted == num_drafted) | (mass.sum(1) == 0)
    return torch.where(is_bonus[:, None], p, mass)


def _residual(p: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """(s p - q)+, [rows, vocab] in p's dtype. scale: [rows]."""
    return (p * scale[:, None].to(p.dtype)).sub_(q).clamp_(min=0)


def _probs_of_drafts(target: Distribution, draft_ids: Tensor, draft_probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """p and q of every draft, [rows, k] float64; p = 0 and q = 1 where nothing was drafted."""
    index = draft_ids.clamp(min=0)[..., None]
    nothing = draft_ids == NO_TOKEN
    p = target.of_tokens(index[..., 0]).masked_fill_(nothing, 0)
    if draft_probs is None:
        return p, torch.ones_like(p)
    return p, draft_probs.gather(2, index).squeeze(2).double().masked_fill_(nothing, 1)


def _ratio(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p / q), where p / 0 is 1 and 0 / 0 is 0."""
    return torch.where(p < q, p / q, (p > 0).to(p.dtype))


def _longest(accepted: Tensor) -> Tensor:
    """The longest accepted prefix, 0 for none, [rows]. accepted: [rows, k] bool, column i - 1 for the prefix of i."""
    return accepted.flip(1).cumsum(1).gt(0).sum(1)
