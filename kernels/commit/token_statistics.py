"""What length policies read of a distribution, of one token a row: two launches over blocks of the vocabulary.

A library's softmax takes one program a row, and a policy that looks at drafted tokens waits for it at each of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.commit.block_statistics import kernel_scores, tiles_of
from specdec.kernels.dispatch import kernel, triton, uses_triton

if triton is not None:
    import triton.language as tl

    from specdec.kernels.commit.block_statistics import scores_at, weight_of


def token_statistics(logits: Tensor, token_ids: Tensor, implementation: str = "auto") -> Tensor:
    """logits: [rows, vocab]; token_ids: [rows] int64, where ids outside the vocabulary count as the nearest token.

    Returns [rows, 3] float32, NaN where a logit is: log q of the token, log q of the most probable other token (-inf
    where there is none), and the entropy of the distribution in nats.
    """
    check(logits, token_ids)
    if not uses_triton(implementation, logits):
        return token_statistics_reference(logits, token_ids)
    scores = kernel_scores(logits)
    (rows, vocab), tiles = scores.shape, tiles_of(logits.shape[1])
    out = torch.empty(rows, 3, dtype=torch.float32, device=logits.device)
    if rows:
        partials = torch.empty(rows, 4, tiles.num_blocks, dtype=torch.float64, device=logits.device)
        where = (scores, scores.stride(0), vocab, token_ids, token_ids.stride(0), partials, tiles.num_blocks)
        _block_kernel[(rows, tiles.num_blocks)](*where, VOCAB_BLOCK=tiles.size, num_warps=tiles.num_warps)
        _row_kernel[(rows,)](*where, out, NUM_BLOCKS=tiles.padded)
    return out


def log_prob(logits: Tensor, token_ids: Tensor, implementation: str = "auto") -> Tensor:
    """The first of `token_statistics` alone, [rows] float32; arguments and errors are its."""
    check(logits, token_ids)
    if uses_triton(implementation, logits):
        return token_statistics(logits, token_ids, implementation)[:, 0]
    # One kernel; logsumexp is five, and takes more than twice the time on a CPU.
    log_probs = logits.float().log_softmax(1)
    return log_probs.gather(1, token_ids.clamp(0, log_probs.shape[1] - 1)[:, None])[:, 0]


def check(logits: Tensor, token_ids: Tensor) -> None:
    if logits.dim() != 2 or token_ids.shape != logits.shape[:1] or token_ids.dtype != torch.long:
        raise ValueError(
            f"logits {list(logits.shape)} and token_ids {list(token_ids.shape)} {token_ids.dtype}; needed are "
            "[rows, vocab] and [rows] torch.int64"
        )


def token_statistics_reference(logits: Tensor, token_ids: Tensor) -> Tensor:
    log_q = logits.detach().float().log_softmax(1)
    token = token_ids.clamp(0, log_q.shape[1] - 1)[:, None]
    own = log_q.gather(1, token)[:, 0]
    entropy = -log_q.exp().mul_(log_q.clamp(min=-1e4)).sum(1)  # 0 log 0 = 0
    # A NaN is in the whole row, so that the largest other is one too.
    other = log_q.scatter_(1, token, -torch.inf).amax(1) + 0 * entropy
    return torch.stack([own, other, entropy], 1)


def token_statistics_of_few(scores: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """The same on the host, [rows, 3] float32: of few rows calls into torch take several times as long.

    scores: [rows, vocab] float32. token_ids: [rows] integers.
    """
    row, token = np.arange(len(scores)), np.minimum(np.maximum(token_ids, 0), scores.shape[1] - 1)
    with np.errstate(invalid="ignore"):  # NaN is an answer
        score = scores - scores.max(1, keepdims=True)
        own, weight = score[row, token], np.exp(score)
        mass = weight.sum(1)
        moment = np.einsum("rv,rv->r", weight, np.maximum(score, -1e4))  # 0 log 0 = 0
        score[row, token] = -np.inf
        log_mass = np.log(mass)
        return np.stack([own - log_mass, score.max(1) - log_mass, log_mass - moment / mass], 1)


if triton is not None:

    @triton.jit
    def _token(tokens_ptr, token_stride, row, vocab):
        return tl.minimum(tl.maximum(tl.load(tokens_ptr + row * token_stride), 0), vocab - 1)

    @kernel()
    def _block_kernel(
        scores_ptr, row_stride, vocab, tokens_ptr, token_stride, partials_ptr, num_blocks, VOCAB_BLOCK: tl.constexpr
    ):  # fmt: skip
        """Of a block: its largest score, sum w and sum (score - largest) w of w = exp(score - largest), and the
        largest score that is not the token's."""
        row, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
        index = b * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
        score = scores_at(scores_ptr + row * row_stride, index, vocab)
        top = tl.max(score, 0)
        base = tl.where(top == -float("inf"), 0.0, top)
        weight = weight_of(score, base, 1.0)
        moment = tl.where(score == -float("inf"), 0.0, (score - base) * weight)
        other = tl.where(index == _token(tokens_ptr, token_stride, row, vocab), -float("inf"), score)
        partials_ptr += row * 4 * num_blocks + b
        tl.store(partials_ptr, top.to(tl.float64))
        tl.store(partials_ptr + num_blocks, tl.sum(weight.to(tl.float64), 0))
        tl.store(partials_ptr + 2 * num_blocks, tl.sum(moment.to(tl.float64), 0))
        tl.store(partials_ptr + 3 * num_blocks, tl.max(other, 0).to(tl.float64))

    @kernel()
    def _row_kernel(
        scores_ptr, row_stride, vocab, tokens_ptr, token_stride, partials_ptr, num_blocks, out_ptr,
        NUM_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row, block = tl.program_id(0).to(tl.int64), tl.arange(0, NUM_BLOCKS)
        partials_ptr += row * 4 * num_blocks + block
        is_block = block < num_blocks
        tops = tl.load(partials_ptr, mask=is_block, other=-float("inf")).to(tl.float32)
        masses = tl.load(partials_ptr + num_blocks, mask=is_block, other=0.0)
        moments = tl.load(partials_ptr + 2 * num_blocks, mask=is_block, other=0.0)
        others = tl.load(partials_ptr + 3 * num_blocks, mask=is_block, other=-float("inf")).to(tl.float32)
        top = tl.max(tops, 0)
        base = tl.where(top == -float("inf"), 0.0, top)
        weight = weight_of(tops, base, 1.0).to(tl.float64)
        mass = tl.sum(masses * weight, 0)
        mass = tl.where(mass > 0.0, mass, float("nan"))
        shift = tl.where(tops == -float("inf"), 0.0, tops - base).to(tl.float64)
        moment = tl.sum((moments + shift * masses) * weight, 0)
        log_mass = tl.log(mass).to(tl.float32)
        score = tl.load(scores_ptr + row * row_stride + _token(tokens_ptr, token_stride, row, vocab)).to(tl.float32)
        tl.store(out_ptr + row * 3, score - top - log_mass)
        tl.store(out_ptr + row * 3 + 1, tl.max(others, 0) - top - log_mass)
        tl.store(out_ptr + row * 3 + 2, log_mass - (moment / mass).to(tl.float32))
