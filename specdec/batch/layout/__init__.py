"""How a batch of rows of different lengths is laid out in the KV cache.

`ragged`: every row starts at slot 0 and has its own length; nothing ever moves. `repad`: all rows end in one column, as
stock attention requires, and are moved there whenever they have accepted different numbers of tokens (EQSPEC).
`grouped`: each step takes rows from a pool that already end in one column (EXSPEC).
"""

from specdec.batch.layout.base import LAYOUTS, Grouped, Layout, Ragged, Repad, resolve_layout

__all__ = ["LAYOUTS", "Grouped", "Layout", "Ragged", "Repad", "resolve_layout"]
