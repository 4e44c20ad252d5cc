"""Which rows go through which expert's weights: the pairs of tokens and experts, grouped by expert, in blocks of rows.

All on the device and of sizes that follow from the shapes alone, so that nothing waits and a step can be captured. The
grouping decides which pairs share a tile, never how a pair is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.dispatch import kernel, triton, uses_triton
from specdec.kernels.overlap import overlap_options

if triton is not None:
    import triton.language as tl

    from specdec.kernels.overlap import wait_for_previous_kernel

MAX_PAIRS = 4096  # in one launch; more are sorted by torch
LEAST_CHUNK, MOST_CHUNK = 128, 2048  # pairs looked at together
LEAST_BINS = 32
BLOCK_ROWS = (16, 32, 64, 128)


class ExpertGroups(NamedTuple):
    """Pairs grouped by expert.

    order: [pairs] int32, the pairs of expert 0 in ascending order, then those of expert 1, and so on. blocks:
    [num_blocks, 3] int32: an expert, and the interval of `order` that the block covers, at most `block_rows` long;
    unused blocks are empty. num_blocks is an upper bound that follows from the shapes.
    """

    order: Tensor
    blocks: Tensor
    block_rows: int


def group_by_expert(
    expert_ids: Tensor, num_experts: int, implementation: str = "auto", block_rows: int | None = None
) -> ExpertGroups:
    """expert_ids: [pairs] int64, each in 0 ... num_experts - 1 (not checked: that would wait for the device).

    block_rows: rows of a tile; by default for the mean number of pairs of an expert.
    """
    if expert_ids.dim() != 1 or expert_ids.dtype != torch.long:
        raise ValueError(f"expert_ids {list(expert_ids.shape)} {expert_ids.dtype}; need [pairs] int64")
    num_pairs = len(expert_ids)
    block_rows = block_rows or rows_for(num_pairs, num_experts)
    if not uses_triton(implementation, expert_ids) or num_pairs > MAX_PAIRS:
        return group_by_expert_reference(expert_ids, num_experts, block_rows)

    order = torch.empty(num_pairs, dtype=torch.int32, device=expert_ids.device)
    blocks = torch.empty(most_blocks(num_pairs, num_experts, block_rows), 3, dtype=torch.int32, device=order.device)
    if num_pairs:
        _group_kernel[(num_experts,)](
            expert_ids.contiguous(),
            order,
            blocks,
            num_pairs,
            len(blocks),
            block_rows,
            BINS=max(LEAST_BINS, triton.next_power_of_2(num_experts + 1)),
            CHUNK=min(max(LEAST_CHUNK, triton.next_power_of_2(num_pairs)), MOST_CHUNK),
            num_warps=4,
            **overlap_options(order),
        )
    return ExpertGroups(order, blocks, block_rows)


def group_by_expert_reference(expert_ids: Tensor, num_experts: int, block_rows: int) -> ExpertGroups:
    """The same contract in plain torch; also serves many pairs on a GPU, as nothing here waits for it."""
    device, num_pairs = expert_ids.device, len(expert_ids)
    sorted_ids, order = torch.sort(expert_ids, stable=True)
    experts = torch.arange(num_experts, device=device)
    ends = torch.searchsorted(sorted_ids, experts, right=True)
    begins = torch.searchsorted(sorted_ids, experts)
    block_ends = torch.cumsum((ends - begins + block_rows - 1) // block_rows, 0)

    slot = torch.arange(most_blocks(num_pairs, num_experts, block_rows), device=device)
    expert = torch.searchsorted(block_ends, slot, right=True).clamp(max=num_experts - 1)
    first = block_ends[expert] - (ends - begins + block_rows - 1)[expert] // block_rows
    begin = begins[expert] + (slot - first) * block_rows
    end = torch.minimum(begin + block_rows, ends[expert])
    is_used = slot < block_ends[-1]
    blocks = torch.stack([expert, begin, end], -1) * is_used[:, None]
    return ExpertGroups(order.int(), blocks.int(), block_rows)


def most_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """However the pairs are spread: every expert's last block may be short, and no block is empty.

    >>> most_blocks(8, 128, 16), most_blocks(1000, 4, 16)
    (8, 66)
    """
    return min(num_pairs, num_pairs // block_rows + num_experts)


def rows_for(num_pairs: int, num_experts: int) -> int:
    """
    >>> [rows_for(pairs, 128) for pairs in (8, 1536, 4096, 32768)]
    [16, 16, 32, 128]
    """
    return next((rows for rows in BLOCK_ROWS if rows * num_experts >= num_pairs), BLOCK_ROWS[-1])


if triton is not None:

    @kernel(do_not_specialize=["num_pairs", "num_blocks"])
    def _group_kernel(
        ids_ptr,
        order_ptr,
        blocks_ptr,
        num_pairs,
        num_blocks,
        block_rows,
        BINS: tl.constexpr,
        CHUNK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per expert; each counts all pairs, which are few. The bin after the experts' counts none."""
        wait_for_previous_kernel(OVERLAP)
        expert = tl.program_id(0)
        num_experts = tl.num_programs(0)
        bins = tl.arange(0, BINS)
        lane = tl.arange(0, CHUNK)
        counts = tl.zeros((BINS,), tl.int32)
        for first in range(0, num_pairs, CHUNK):
            ids = tl.load(ids_ptr + first + lane, mask=first + lane < num_pairs, other=num_experts).to(tl.int32)
            counts += tl.histogram(ids, BINS)
        num_used = tl.where(bins < num_experts, (counts + block_rows - 1) // block_rows, 0)
        begin = tl.sum(tl.where(bins < expert, counts, 0), 0)
        block = tl.sum(tl.where(bins < expert, num_used, 0), 0)
        end = begin + tl.sum(tl.where(bins == expert, counts, 0), 0)

        place = begin
        for first in range(0, num_pairs, CHUNK):
            ids = tl.load(ids_ptr + first + lane, mask=first + lane < num_pairs, other=num_experts).to(tl.int32)
            mine = (ids == expert).to(tl.int32)
            tl.store(order_ptr + place + tl.cumsum(mine, 0) - 1, first + lane, mask=mine == 1)
            place += tl.sum(mine, 0)

        for row in range(begin, end, block_rows):
            entry = blocks_ptr + 3 * block
            tl.store(entry, expert)
            tl.store(entry + 1, row)
            tl.store(entry + 2, tl.minimum(row + block_rows, end))
            block += 1
        if expert == 0:
            for first in range(3 * tl.sum(num_used, 0), 3 * num_blocks, CHUNK):
                tl.store(blocks_ptr + first + lane, tl.zeros((CHUNK,), tl.int32), mask=first + lane < 3 * num_blocks)
