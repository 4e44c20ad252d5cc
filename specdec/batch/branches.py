"""Queries beside the text: behind some of its places stands a short branch, which the text itself never sees.

A branch behind the token at position p holds queries at positions behind p; each sees the text up to p and the queries
before it in its own branch, as if these stood in the text's place. One forward takes the text and all branches:
the text's columns first, then the branches one after the other, each column written to a slot of its own behind the
text's. The next forward starts among or right behind the text's slots and so writes over whatever it could see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branches:
    """Where the columns of one forward stand; [rows, columns] int64 each, in slots of the cache.

    num_tokens: the first so many columns are text.
    slots: where a column's keys are written. places: where the column would stand if its branch were the text; for the
        text, and with positions in place of slots, the same. ends: the last slot of the text that it sees. begins: the
        first slot of its branch; for the text its own slot, which closes the gap.
    """

    num_tokens: int
    slots: Tensor
    places: Tensor
    ends: Tensor
    begins: Tensor

    @staticmethod
    def behind(starts: Tensor, num_tokens: int, columns: Tensor, ahead: Tensor) -> Branches:
        """A branch behind each of some columns of the text.

        starts: [rows] int64, the slot of each row's first column. columns: [1 or rows, branches] int64. ahead: [length]
        int64, as in `ExtraQueries`.
        """
        text, length = starts[:, None] + torch.arange(num_tokens, device=starts.device), len(ahead)
        # [rows, branches, length]
        ends = (starts[:, None] + columns)[..., None].expand(-1, -1, length)
        branch = torch.arange(ends.shape[1], device=starts.device)
        begins = ((starts + num_tokens)[:, None] + branch * length)[..., None].expand_as(ends)

        def joined(own: Tensor) -> Tensor:
            return torch.cat([text, own.flatten(1)], 1)

        return Branches(
            num_tokens,
            joined(begins + torch.arange(length, device=starts.device)),
            joined(ends + ahead),
            joined(ends),
            joined(begins),
        )

    def visible(self, num_slots: int) -> Tensor:
        """Which slots each column sees, windows apart: [rows, columns, num_slots] bool."""
        key = torch.arange(num_slots, device=self.slots.device)
        text = key <= self.ends[..., None]
        own = (key >= self.begins[..., None]) & (key <= self.slots[..., None])
        return text | own

    def key_places(self, num_slots: int) -> Tensor:
        """The place of what is written in each slot, [rows, num_slots] int64; of older text its own slot."""
        slot = torch.arange(num_slots, device=self.slots.device).expand(len(self.slots), -1)
        return slot.scatter(1, self.slots, self.places)
