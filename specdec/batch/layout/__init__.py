"""How a batch whose rows have different lengths lies in the KV cache.

`ragged`: every row starts at slot 0 and each has its own length; nothing ever moves. `repad`: all rows end in one
column, as stock attention wants them, and are moved there whenever they have accepted different numbers of tokens
(EQSPEC). `grouped`: a pool of rows, of which each step takes some that end in one column already (EXSPEC).
"""

from specdec.batch.layout.base import LAYOUTS, Grouped, Layout, Ragged, Repad, resolve_layout

__all__ = ["LAYOUTS", "Grouped", "Layout", "Ragged", "Repad", "resolve_layout"]
