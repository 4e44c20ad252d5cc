"""A static KV cache in which every row has its own length.

A forward over `width` new tokens writes row b's keys and values at slots starts[b] .. starts[b] + width - 1 and sees
the slots before them. The cache stores no lengths: the caller of the forward says where each row starts. So a rewind
simply means not advancing, and rejected tokens are overwritten by the next forward. There is no padding, no realignment
and no copy.

The class is also a transformers `Cache`, so that any model can run its own modules over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.batch.columns import Columns
from specdec.batch.slots import moves_of, to_device
from specdec.kernels.move_rows import is_sequential, move_rows

ALIGNMENT = 64  # elements: kernels read whole words if an address is a multiple of a word


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, slots, heads, head_dim] each, allocated at the first write."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, owner: RaggedCache):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, because a masked slot's probability of 0 times an uninitialised NaN would still be NaN.
        shape = (self.owner.max_rows, self.owner.num_slots)
        with torch.inference_mode(False):  # rows are moved later, outside any inference mode the forward may use
            keys = key_states.new_zeros(*shape, key_states.shape[1], key_states.shape[3])
            values = value_states.new_zeros(*shape, value_states.shape[1], value_states.shape[3])
        self.hold(keys, values)

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Use these buffers, [rows, slots, heads, head_dim] each."""
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, width, head_dim] and return all slots in use, [rows, heads, slots, head_dim] views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.write(key_states.transpose(1, 2), value_states.transpose(1, 2))

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Like `update`, from [rows, width, heads, head_dim]."""
        owner = self.owner
        index = owner.write_index.to(self.device)  # layers of a model may be on several devices
        for buffer, new in ((self.keys, keys), (self.values, values)):
            flat = buffer.view(-1, buffer.shape[2] * buffer.shape[3])
            flat.index_copy_(0, index, new.reshape(-1, flat.shape[1]))
        used = (owner.rows, slice(0, owner.used_slots))
        return self.keys[used].transpose(1, 2), self.values[used].transpose(1, 2)

    def resize(self) -> None:
        """Change to the owner's new size; contents that fit are kept."""
        if self.is_initialized:
            with torch.inference_mode(False):
                self.keys, self.values = self._resized(self.keys), self._resized(self.values)

    def _resized(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.owner.max_rows, self.owner.num_slots, *old.shape[2:])
        kept = slice(0, min(len(old), len(new))), slice(0, min(old.shape[1], new.shape[1], self.owner.num_filled))
        new[kept] = old[kept]
        return new

    def move_slots(self, moved_from: Tensor, moved_to: Tensor) -> None:
        """Move tokens of any rows, given as [tokens] int64 indices into [rows * slots]."""
        if self.is_initialized:
            moved_from, moved_to = moved_from.to(self.device), moved_to.to(self.device)
            for buffer in (self.keys, self.values):
                flat = buffer.view(-1, buffer.shape[2] * buffer.shape[3])
                flat.index_copy_(0, moved_to, flat.index_select(0, moved_from))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.used_slots, 0

    def get_seq_length(self) -> int:
        # Models that derive masks or positions from it need an int; we pass ours explicitly. Other models only ask
        # whether a layer holds anything at all (Mllama skips its cross attention without images).
        return self.owner.used_slots - self.owner.width if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.owner.num_slots

    def get_max_cache_shape(self) -> int:
        return self.owner.num_slots

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a RaggedCache is rewound by starting the next forward earlier, row by row")


class RaggedCache(Cache):
    """Keys and values of all layers for up to `max_rows` rows of `num_slots` tokens.

    Before each forward, `begin` says where the rows start. Sliding windows are left to the mask: a layer keeps every
    slot, so a rewind never needs an evicted key.

    pads: [rows] int64, unused slots before each row's first token, None where there are none, as in this class.
    columns: of the forward that `begin` announced last, in slots.
    num_realignments: forwards that had to move rows first. num_filled: no slot from here on holds anything.
    """

    def __init__(self, num_layers: int, max_rows: int, num_slots: int, device: torch.device):
        self.max_rows, self.num_slots, self.device = max_rows, num_slots, device
        self.rows, self.used_slots, self.width = slice(0, max_rows), 0, 0
        self.pads: Tensor | None = None
        self.columns = Columns.chain(torch.zeros(max_rows, dtype=torch.long, device=device), 0)
        self.num_realignments = self.num_filled = 0
        self._row_offsets = torch.arange(max_rows, device=device)[:, None] * num_slots
        self._buffers: Tensor | None = None
        super().__init__(layers=[RaggedLayer(self) for _ in range(num_layers)])

    def allocate(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Allocate layers that are all alike in one piece, before the first write, so that one launch moves rows in
        all.
        """
        width = num_heads * head_dim
        size = self.max_rows * self.num_slots * width
        shape = 2 * len(self.layers), -(-size // ALIGNMENT) * ALIGNMENT
        with torch.inference_mode(False):  # rows are moved later, outside any inference mode
            memory = torch.zeros(shape, dtype=dtype, device=self.device)[:, :size]
            self._buffers = memory.view(-1, self.max_rows, self.num_slots, width)
            buffers = self._buffers.view(-1, self.max_rows, self.num_slots, num_heads, head_dim)
            for layer, keys, values in zip(self.layers, buffers[::2], buffers[1::2], strict=True):
                layer.hold(keys, values)

    @contextmanager
    def restored(self, num_rows: int, begin: int, end: int) -> Iterator[None]:
        """Slots begin .. end - 1 of the first rows are afterwards what they were, for a forward that is only tried out.

        For caches whose layers were allocated in one piece.
        """
        assert self._buffers is not None
        tried = self._buffers[:, :num_rows, begin:end]
        held = tried.clone()
        yield
        tried.copy_(held)

    def begin(
        self, columns: Columns, used_slots: int, first_row: int = 0, host_starts: np.ndarray | None = None
    ) -> Tensor:
        """Announce a forward and return the positions of its columns, [rows, columns] int64.

        columns: of the rows from `first_row` on, counted from each row's first token.
        used_slots: an upper bound of starts + columns known to the host; slots from there on are neither read nor
            masked.
        host_starts: the columns' starts on the host, [rows] int64, for layouts that decide there what to move.
        """
        assert used_slots <= self.num_slots, f"{used_slots} slots needed, {self.num_slots} allocated"
        num_rows, self.width = columns.slots.shape
        self.rows = slice(first_row, first_row + num_rows)
        self.used_slots, self.num_filled = used_slots, max(self.num_filled, used_slots)
        self.columns = columns if self.pads is None else columns.after_pads(self.pads)
        self.write_index = (self._row_offsets[self.rows] + self.columns.slots).flatten()
        return columns.places

    def resize(self, max_rows: int, num_slots: int) -> None:
        """Change the number of rows and tokens; contents that still fit are kept."""
        self.max_rows, self.num_slots, self._buffers = max_rows, num_slots, None
        self._row_offsets = torch.arange(max_rows, device=self.device)[:, None] * num_slots
        for layer in self.layers:
            layer.resize()
        self.num_filled = min(self.num_filled, num_slots)

    def copy_from(self, other: RaggedCache) -> None:
        """Copy the whole content of a smaller cache."""
        for layer, old in zip(self.layers, other.layers, strict=True):
            layer.keys[: other.max_rows, : other.num_filled] = old.keys[:, : other.num_filled]
            layer.values[: other.max_rows, : other.num_filled] = old.values[:, : other.num_filled]
        self.num_filled = max(self.num_filled, other.num_filled)

    def keep_rows(self, index: Tensor) -> None:
        """The new row i is the old row index[i] ([rows] int64 on the host). Copies only rows that change their place,
        and of these only filled slots."""
        host_moves = moves_of(index.numpy())
        if not host_moves.size:
            return
        implementation = "auto" if is_sequential(torch.from_numpy(host_moves)) else "torch"
        moves = to_device(host_moves, self.device)
        for buffers in self._all_buffers():
            move_rows(buffers, moves.to(buffers.device), self.num_filled, implementation)

    def _all_buffers(self) -> list[Tensor]:
        """All allocated buffers, [buffers, rows, slots, heads * head_dim] each."""
        if self._buffers is not None:
            return [self._buffers]
        layers = [layer for layer in self.layers if layer.is_initialized]
        return [buffer[None].flatten(3) for layer in layers for buffer in (layer.keys, layer.values)]

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:
        """The slot of each row's first query; transformers' mask code accepts one per row, [rows] int64."""
        return self.columns.starts

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)
