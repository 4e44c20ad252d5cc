"""log q of one token a row: two launches over blocks of the vocabulary, whatever its size.

A library's softmax takes one program a row, and a policy that looks at drafted tokens waits for it at each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.block_statistics import block_statistics, kernel_scores, tiles_of
from specdec.kernels.dispatch import triton, uses_triton
from specdec.kernels.distribution import Truncation

if triton is not None:
    import triton.language as tl

    from specdec.kernels.block_statistics import combined


def log_prob(logits: Tensor, token_ids: Tensor, implementation: str = "auto") -> Tensor:
    """logits: [rows, vocab]; token_ids: [rows] int64, of which those that are no token are taken as the nearest one.

    Returns [rows] float32, NaN where a logit is.
    """
    if logits.dim() != 2 or token_ids.shape != logits.shape[:1] or token_ids.dtype != torch.long:
        raise ValueError(
            f"logits {list(logits.shape)} and token_ids {list(token_ids.shape)} {token_ids.dtype}; needed are "
            "[rows, vocab] and [rows] torch.int64"
        )
    if not uses_triton(implementation, logits):
        return log_prob_reference(logits, token_ids)
    scores = kernel_scores(logits)
    (rows, vocab), tiles = scores.shape, tiles_of(logits.shape[1])
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        partials, _ = block_statistics(scores[:, None], Truncation())
        _log_prob_kernel[(rows,)](
            scores, scores.stride(0), vocab, partials, token_ids, token_ids.stride(0), out, tiles.num_blocks,
            NUM_BLOCKS=tiles.padded,
        )  # fmt: skip
    return out


def log_prob_reference(logits: Tensor, token_ids: Tensor) -> Tensor:
    # One kernel; logsumexp is five, and takes more than twice the time on a CPU.
    log_probs = logits.float().log_softmax(1)
    return log_probs.gather(1, token_ids.clamp(0, log_probs.shape[1] - 1)[:, None])[:, 0]


if triton is not None:

    @triton.jit
    def _log_prob_kernel(
        scores_ptr, row_stride, vocab, partials_ptr, tokens_ptr, token_stride, out_ptr, num_blocks,
        NUM_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        top, mass = combined(partials_ptr, row, num_blocks, 1.0, NUM_BLOCKS)
        token = tl.load(tokens_ptr + row * token_stride)
        token = tl.minimum(tl.maximum(token, 0), vocab - 1)
        score = tl.load(scores_ptr + row * row_stride + token).to(tl.float32)
        tl.store(out_ptr + row, score - top - tl.log(mass).to(tl.float32))
