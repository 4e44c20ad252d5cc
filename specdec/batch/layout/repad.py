"""The cache of EQSPEC: rows are padded on the left so that all of them end in one column.

Row b's token j is at slot pads[b] + j. A step accepts a different number of tokens in each row, so the rows then end in
different columns; before the next forward they are moved, all at once, so that they end together again. The pads are
recomputed from the lengths each time, never incremented. A cache holds a row's tokens except the last.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.batch.cache import RaggedCache
from specdec.batch.columns import Columns


class RepadCache(RaggedCache):
    """host_pads: [max_rows] int64 on the host, unused slots before each row's first token."""

    def __init__(self, num_layers: int, max_rows: int, num_slots: int, device: torch.device):
        super().__init__(num_layers, max_rows, num_slots, device)
        self.host_pads = np.zeros(max_rows, dtype=np.int64)

    def begin(
        self, columns: Columns, used_slots: int, first_row: int = 0, host_starts: np.ndarray | None = None
    ) -> Tensor:
        """As in the ragged cache. Without host_starts the columns' starts are copied to the host."""
        lengths = columns.starts.cpu().numpy() if host_starts is None else host_starts
        width = columns.slots.shape[1]
        pads = self.host_pads[first_row : first_row + len(lengths)]  # a view
        if not lengths.any():
            pads[:] = 0  # nothing is cached yet: old values belong to rows that have left
        column = pads + lengths
        if (column != column[0]).any() or column[0] + width > self.num_slots:
            aligned = lengths.max() - lengths
            self.realign(first_row, pads.copy(), aligned, int(lengths.max()))
            pads[:] = aligned
        self.pads = torch.from_numpy(pads.copy()).to(self.device) if pads.any() else None
        return super().begin(columns, int(pads[0] + lengths[0]) + width, first_row)

    def realign(self, first_row: int, old_pads: np.ndarray, new_pads: np.ndarray, num_columns: int) -> None:
        """Move each row of [rows] to its new padding, with one index for all layers."""
        self.num_realignments += 1
        moved = np.flatnonzero(old_pads != new_pads)
        # One copy to the device: where each row begins, and by how much its tokens move.
        host = np.stack([(moved + first_row) * self.num_slots, (old_pads - new_pads)[moved]])
        row_begins, shift = torch.from_numpy(host).to(self.device)[..., None]
        column = torch.arange(num_columns, device=self.device)
        # Padding gets the keys of some token of the row: they are finite, and masked.
        source = (row_begins + (column + shift).clamp(0, self.num_slots - 1)).flatten()
        target = (row_begins + column).flatten()
        for layer in self.layers:
            layer.move_slots(source, target)

    def resize(self, max_rows: int, num_slots: int) -> None:
        unpadded = np.zeros_like(self.host_pads)
        if self.host_pads.any():
            self.realign(0, self.host_pads, unpadded, self.num_filled)
        self.host_pads = np.resize(unpadded, max_rows)
        super().resize(max_rows, num_slots)

    def keep_rows(self, index: Tensor) -> None:
        self.host_pads[: len(index)] = self.host_pads[index.numpy()]
        super().keep_rows(index)
