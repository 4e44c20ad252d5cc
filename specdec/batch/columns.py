"""Where the columns of one forward stand, and what each of them sees.

A forward appends some columns to the committed text of every row. Plain text is a chain: each column sees all columns
before it. In a tree a column sees the committed text, itself and its ancestors, and no other column. A draft tree is
one whose nodes are tokens; look-ahead branches are one whose nodes after the text are embeddings.

Each column is written to a slot of its own, one after the other. Its place is the slot it would have if the path that
leads to it were the text. Positions, sliding windows and chunks count places. A place is never after the slot, since
parents stand before their children.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.attention.ragged_attention import TREE_SLOTS

# transformers' mask functions: (row, head, place of the query, place of the key), which broadcast -> bool
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Columns:
    """The columns of one forward; slots are those of the cache.

    starts: [rows] int64, the slot of each row's first column.
    slots: [rows, columns] int64, where each column is written: starts[b] + column.
    places: [rows, columns] int64; of a chain, the slots themselves.
    committed: [rows] int64, the slots before it hold the text that every column of the row sees. Those from it up to
        `starts` are hidden from all; where there are none, it is the tensor `starts` itself.
    num_text: the first columns that form a chain, the text; what follows are nodes of a tree.
    seen: [1 or rows, columns, columns] bool, the columns that each column sees; None for a chain.
    """

    starts: Tensor
    slots: Tensor
    places: Tensor
    committed: Tensor
    num_text: int
    seen: Tensor | None = None

    @staticmethod
    def chain(starts: Tensor, width: int) -> Columns:
        """Plain text: `width` columns from each row's start."""
        slots = _count_from(starts, width)
        return Columns(starts, slots, slots, starts, width)

    @staticmethod
    def tree(starts: Tensor, parents: Tensor) -> Columns:
        """A draft tree. parents: [1 or rows, columns] int64, the column before each in its path, -1 for the committed
        text; parents stand before their children."""
        slots, seen = _count_from(starts, parents.shape[1]), ancestors(parents)
        depth = seen.sum(-1) - 1
        return Columns(starts, slots, starts[:, None] + depth, starts, 0, seen)

    @staticmethod
    def branches(starts: Tensor, num_tokens: int, columns: Tensor, ahead: Tensor) -> Columns:
        """The text, then a branch after each of some of its columns, one branch after the other.

        Each column of a branch sees the text up to the branch's own column and the branch up to itself.

        columns: [1 or rows, branches] int64, below num_tokens. ahead: [length] int64, as in `ExtraQueries`.
        """
        num_branches, length = columns.shape[1], len(ahead)
        slots = _count_from(starts, num_tokens + num_branches * length)
        own = torch.arange(slots.shape[1], device=starts.device)
        text, branch = own[:num_tokens], torch.arange(num_branches, device=starts.device)

        # The last column of the text and the first of its branch that each column sees; [1 or rows, columns].
        ends = columns[..., None].expand(-1, -1, length).flatten(1)
        begins = (num_tokens + branch * length)[:, None].expand(-1, length).flatten()
        last, first = torch.cat([text.expand(len(columns), -1), ends], 1), torch.cat([text, begins])
        seen = (own <= last[..., None]) | ((own >= first[:, None]) & (own <= own[:, None]))

        distance = torch.cat([ahead.new_zeros(num_tokens), ahead.repeat(num_branches)])
        places = starts[:, None] + (last + distance)
        return Columns(starts, slots, places, starts, num_tokens, seen)

    @staticmethod
    def branch_alone(starts: Tensor, num_tokens: int, columns: Tensor, ahead: Tensor) -> Columns:
        """The branch after one column of each row's text, once that text is cached at `starts`.

        columns: [rows] int64. The rest of the cached text stays hidden.
        """
        committed, begins = starts + columns + 1, starts + num_tokens
        places = committed[:, None] - 1 + ahead
        seen = _chain_sees(len(ahead), starts.device)
        return Columns(begins, _count_from(begins, len(ahead)), places, committed, 0, seen)

    @property
    def is_chain(self) -> bool:
        return self.seen is None

    def after_pads(self, pads: Tensor) -> Columns:
        """The same in rows whose first token lies at slot pads[b], [rows] int64."""
        slots = self.slots + pads[:, None]
        places = slots if self.is_chain else self.places + pads[:, None]
        starts = self.starts + pads
        committed = starts if self.committed is self.starts else self.committed + pads
        return Columns(starts, slots, places, committed, self.num_text, self.seen)

    def mask(self, num_slots: int, window: int | None = None) -> Tensor:
        """The slots that each column sees, [rows, columns, num_slots] bool. window: of a sliding layer, in places."""
        slots = torch.arange(num_slots, device=self.slots.device)
        if self.seen is None:
            visible = slots <= self.slots[..., None]
        else:
            num_rows, num_columns = self.slots.shape
            own = self.slots[:, None].expand(-1, num_columns, -1)
            visible = (slots < self.committed[:, None, None]).expand(-1, num_columns, -1)
            visible = visible.scatter(2, own, self.seen.expand(num_rows, -1, -1))
        if window is not None:
            keys = slots if self.is_chain else self.key_places(num_slots)[:, None]
            visible &= keys > self.places[..., None] - window
        return visible

    def mask_by(self, rule: Rule, num_slots: int, first_slot: int = 0) -> Tensor:
        """The same under a model's own rule (sliding, chunked ...), [rows, 1, columns, num_slots] bool.

        The rule is causal by places. first_slot: of a chain, the slot that the mask begins with.
        """
        num_rows, num_columns = self.slots.shape
        row = torch.arange(num_rows, device=self.slots.device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=self.slots.device)
        query = self.places[:, None, :, None]
        if self.is_chain:
            keys = torch.arange(num_slots, device=self.slots.device) + first_slot
            return rule(row, head, query, keys).expand(num_rows, 1, num_columns, num_slots)
        assert not first_slot, "a tree's cache keeps every slot"
        keys = self.key_places(num_slots)[:, None, None]
        return rule(row, head, query, keys) & self.mask(num_slots)[:, None]

    def key_places(self, num_slots: int) -> Tensor:
        """The place of what is written in each slot, [rows, num_slots] int64: of committed text the slot itself."""
        slots = torch.arange(num_slots, device=self.slots.device).expand(len(self.slots), -1)
        return slots.scatter(1, self.slots, self.places)

    def spans(self, used_slots: int, window: int | None = None, num_text_slots: int | None = None) -> Tensor:
        """The slots that each column looks at, [rows, columns, 3] int32 as `ragged_attention` takes them: the first,
        the one after the last, and 0, the slot of the row's first token. In a tree `bits` hides some of them.

        used_slots: slots in use. num_text_slots: rows that start there or later are padding and see nothing.
        """
        end = (self.slots + 1).clamp(max=used_slots).int()
        low = torch.zeros_like(end)
        if window is not None:
            low = torch.minimum((self.places + 1 - window).clamp(min=0).int(), end)
        if num_text_slots is not None:
            low = torch.where((self.starts < num_text_slots)[:, None], low, end)
        return torch.stack([low, end, torch.zeros_like(end)], -1)

    def bits(self, window: int | None = None) -> Tensor:
        """Each column's view of the slots from `committed` on, [rows, columns] int64: bit i for slot committed[b] + i.

        At most TREE_SLOTS columns.
        """
        num_rows, num_columns = self.slots.shape
        assert num_columns <= TREE_SLOTS, f"{num_columns} columns exceed the {TREE_SLOTS} bits of a mask"
        seen = _chain_sees(num_columns, self.slots.device) if self.seen is None else self.seen
        if window is not None:
            seen = seen & (self.places[..., None] - self.places[:, None] < window)
        bits = (seen.long() << torch.arange(num_columns, device=seen.device)).sum(-1)
        if self.committed is not self.starts:
            bits = bits << (self.starts - self.committed)[:, None]
        return bits.expand(num_rows, -1).contiguous()


def ancestors(parents: Tensor) -> Tensor:
    """Each column's path: [rows, columns] int64, -1 above a root -> [rows, columns, columns] bool, itself included.

    >>> ancestors(torch.tensor([[-1, 0, 0, 2]])).int().tolist()
    [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]]
    """
    num_rows, num_columns = parents.shape
    # Entry 0 stands for the committed text: it is its own ancestor and adds no column to a path.
    above = torch.nn.functional.pad(parents + 1, (1, 0))
    path = torch.eye(num_columns + 1, dtype=torch.bool, device=parents.device).expand(num_rows, -1, -1)

    # After n rounds a path holds its last 2^n columns, and `above` is the column 2^n levels up.
    for _ in range((num_columns - 1).bit_length()):
        path = path | path.gather(1, above[..., None].expand_as(path))
        above = above.gather(1, above)
    return path[:, 1:, 1:]


def _count_from(starts: Tensor, width: int) -> Tensor:
    """[rows] int64 -> [rows, width] int64"""
    return starts[:, None] + torch.arange(width, device=starts.device)


def _chain_sees(num_columns: int, device: torch.device) -> Tensor:
    """[1, columns, columns] bool: every column sees those before it."""
    return torch.ones(1, num_columns, num_columns, dtype=torch.bool, device=device).tril()
