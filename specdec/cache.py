"""A static KV cache in which every row has its own length.

A forward over `width` new tokens writes row b's keys and values at slots starts[b] .. starts[b] + width - 1 and sees
what lies before. The cache keeps no lengths of its own: whoever runs the forward says where each row starts, so a
rewind is simply not advancing, and rejected tokens are overwritten by the next forward. There is no padding, no
realignment and no copy.

The class is also a transformers `Cache`, so that any model can run its own modules over it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, slots, heads, head_dim] each, allocated at the first write."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, owner: RaggedCache):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, because a masked slot's probability of 0 times an uninitialised NaN would still be NaN.
        shape = (self.owner.max_rows, self.owner.num_slots)
        with torch.inference_mode(False):  # rows are moved later, outside any inference mode the forward may use
            self.keys = key_states.new_zeros(*shape, key_states.shape[1], key_states.shape[3])
            self.values = value_states.new_zeros(*shape, value_states.shape[1], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, width, head_dim] and return all slots in use, [rows, heads, slots, head_dim] views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.write(key_states.transpose(1, 2), value_states.transpose(1, 2))

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same from [rows, width, heads, head_dim]."""
        owner = self.owner
        for buffer, new in ((self.keys, keys), (self.values, values)):
            flat = buffer.view(-1, buffer.shape[2] * buffer.shape[3])
            flat.index_copy_(0, owner.write_index, new.reshape(-1, flat.shape[1]))
        used = (owner.rows, slice(0, owner.used_slots))
        return self.keys[used].transpose(1, 2), self.values[used].transpose(1, 2)

    def move_rows(self, moved_from: Tensor, moved_to: Tensor) -> None:
        if self.is_initialized and moved_to.numel():
            self.keys[moved_to] = self.keys[moved_from]
            self.values[moved_to] = self.values[moved_from]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.used_slots, 0

    def get_seq_length(self) -> int:
        # Models that derive masks or positions from it need an int; ours are passed explicitly. Others ask whether a
        # layer holds anything at all (Mllama skips its cross attention without images).
        return self.owner.used_slots - self.owner.width if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.owner.num_slots

    def get_max_cache_shape(self) -> int:
        return self.owner.num_slots

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a RaggedCache is rewound by starting the next forward earlier, row by row")


class RaggedCache(Cache):
    """Keys and values of all layers for up to `max_rows` rows of `num_slots` tokens.

    Before each forward `begin` says where the rows start. Sliding windows are a matter of the mask: a layer keeps
    every slot, so that a rewind never needs a key that was evicted.
    """

    def __init__(self, num_layers: int, max_rows: int, num_slots: int, device: torch.device):
        self.max_rows, self.num_slots, self.device = max_rows, num_slots, device
        self.rows, self.used_slots, self.width = slice(0, max_rows), 0, 0
        self._row_offsets = torch.arange(max_rows, device=device)[:, None] * num_slots
        super().__init__(layers=[RaggedLayer(self) for _ in range(num_layers)])

    def begin(self, starts: Tensor, width: int, used_slots: int, first_row: int = 0) -> Tensor:
        """Announce a forward over [rows, width] tokens and return their positions, [rows, width] int64.

        starts: [rows] int64, tokens of each row that stay visible; these are the rows from `first_row` on.
        used_slots: an upper bound of starts + width known to the host; what lies behind it is neither read nor masked.
        """
        assert used_slots <= self.num_slots, f"{used_slots} slots needed, {self.num_slots} allocated"
        self.rows = slice(first_row, first_row + len(starts))
        self.width, self.used_slots = width, used_slots
        self.starts = starts
        self.positions = starts[:, None] + torch.arange(width, device=self.device)
        self.write_index = (self._row_offsets[self.rows] + self.positions).flatten()
        return self.positions

    def keep_rows(self, index: Tensor) -> None:
        """The new row i is the old row index[i]; only rows that change their place are copied."""
        moved_to = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        moved_from = index[moved_to]
        for layer in self.layers:
            layer.move_rows(moved_from, moved_to)

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:
        """transformers' mask code accepts one offset per row here, [rows] int64."""
        return self.starts

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)
