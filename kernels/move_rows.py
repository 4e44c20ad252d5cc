"""KV compaction: moves the remaining rows together, in all layers of a cache with one launch."""

from __future__ import annotations

from torch import Tensor

from specdec.kernels.dispatch import kernel, triton, uses_triton

if triton is not None:
    import triton.language as tl

BLOCK = 2048


def move_rows(buffers: Tensor, moves: Tensor, num_filled: int, implementation: str = "auto") -> None:
    """Copy the first `num_filled` slots of rows moves[0] to rows moves[1], in every buffer.

    buffers: [buffers, rows, slots, width], the last two dimensions contiguous; changed in place.
    moves: [2, moves] int64, on the buffers' device; distinct destinations. Triton makes one move after the other, so
        none may write a row that a later one reads (see `is_sequential`); the reference takes any.
    implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.
    """
    num_buffers, _, num_slots, width = buffers.shape
    if buffers.stride()[2:] != (width, 1) or not 0 <= num_filled <= num_slots:
        raise ValueError(
            f"buffers {list(buffers.shape)} with strides {buffers.stride()} do not hold {num_filled} slots"
        )
    if not uses_triton(implementation, buffers):
        return move_rows_reference(buffers, moves, num_filled)
    if moves.numel() and num_filled:
        _move_rows_kernel[(triton.cdiv(num_filled * width, BLOCK), num_buffers)](
            buffers, moves.contiguous(), moves.shape[1], num_filled * width, buffers.stride(0), buffers.stride(1),
            BLOCK=BLOCK, num_stages=1,
        )  # fmt: skip


def move_rows_reference(buffers: Tensor, moves: Tensor, num_filled: int) -> None:
    """The same in plain torch, one buffer at a time, so that the gathered copies stay small."""
    moved_from, moved_to = moves
    for buffer in buffers:
        buffer[moved_to, :num_filled] = buffer[moved_from, :num_filled]


def is_sequential(moves: Tensor) -> bool:
    """Whether no move writes a row that a later one reads. moves: [2, moves] on the host."""
    moved_from, moved_to = moves
    return not bool((moved_to[:, None] == moved_from).triu(1).any())


if triton is not None:

    @kernel(do_not_specialize=["num_moves"])
    def _move_rows_kernel(
        buffers_ptr, moves_ptr, num_moves, num_elements, buffer_stride, row_stride, BLOCK: tl.constexpr
    ):
        """One program takes a block of elements through all moves, so no program waits for another."""
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < num_elements
        buffers_ptr += tl.program_id(1).to(tl.int64) * buffer_stride + offset
        for i in range(num_moves):
            moved_from, moved_to = tl.load(moves_ptr + i), tl.load(moves_ptr + num_moves + i)
            values = tl.load(buffers_ptr + moved_from * row_stride, mask=inside)
            tl.store(buffers_ptr + moved_to * row_stride, values, mask=inside)
