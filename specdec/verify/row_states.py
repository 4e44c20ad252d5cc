"""The stateful logits processors of one row, asked as plain decoding would ask them: once about each place, in order.

The places of a step are the nodes of a tree: the root follows the committed text, every other one a draft token. Each
node has the processors as they stand after they were asked about it, copied from its parent's. Those of the last
accepted node are the row's from then on; the others are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.verify.forks import fork


class RowStates:
    """A row that gives up its place keeps them, as its text stays the same."""

    def __init__(self, originals: Sequence[Any], unchanging: Sequence[Any], is_forked: bool):
        """originals: never asked, so that every row of a call begins with a copy of them as they came. unchanging: of
        these, those without state. is_forked: whether some places will need copies of processors that were asked."""
        self._originals, self._unchanging, self._is_forked = originals, unchanging, is_forked
        self._committed: list[Any] | None = None
        self._nodes: dict[int, list[Any]] = {}
        self._draft: list[Any] = []

    def at(self, node: int, parent: int | None, is_certain: bool) -> list[Any]:
        """The processors to ask about a node, once.

        parent: the node before it, None at the root, where a step begins. is_certain: whether the token between the
        two is going to be committed, so that nobody needs the parent's processors any more.
        """
        if parent is None:
            if self._committed is None:
                self._committed = self._fork(self._originals)
            self._nodes = {node: self._committed}
        else:
            self._nodes[node] = self._nodes.pop(parent) if is_certain else self._fork(self._nodes[parent])
        return self._nodes[node]

    def commit(self, node: int) -> None:
        """The row goes on after this node.

        Raises ConfigError, the first time, if the processors could be copied until they were asked and no longer.
        """
        assert node in self._nodes, "the row goes on after another token than was certain"
        self._committed, self._nodes, self._draft = self._nodes[node], {}, []
        if self._is_forked:
            self._fork(self._committed)
            self._is_forked = False

    def of_draft(self, place: int) -> list[Any]:
        """Processors to ask about what a drafter might say after `place` draft tokens, in order from 0 on. They are
        copies, which nothing comes of."""
        if place == 0:
            self._draft = self._fork(self._originals if self._committed is None else self._committed)
        assert self._draft, "a draft begins at place 0"
        return self._draft

    def _fork(self, processors: Sequence[Any]) -> list[Any]:
        return fork(processors, self._unchanging)
