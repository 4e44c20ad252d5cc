"""Drafters that work on one batch together: what all their combinations have in common."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.rows import Rows
from specdec.draft import Draft
from specdec.drafter import Context, Drafter, check_contract
from specdec.errors import DrafterError


class Several(Drafter):
    """Passes everything on to its parts but `propose`, `begin` and `observe`.

    It shows length policies no tokens: they would be shown those of drafts that are not taken.
    """

    parts: tuple[Drafter, ...]

    def __init__(self, parts: Sequence[Drafter], name: str):
        self.parts, self.name = tuple(parts), name
        self._check_parts()

        self.kv_model = next((part.kv_model for part in parts if part.kv_model is not None), None)
        self.num_extra_queries = max(part.num_extra_queries for part in parts)
        self.target_layers = tuple(dict.fromkeys(layer for part in parts for layer in part.target_layers))
        self.learns = any(part.learns for part in parts)
        self.shares_slots = all(part.shares_slots for part in parts)
        self._started: list[Drafter] = []

    def _check_parts(self) -> None:
        """Raise DrafterError for drafters that cannot work on one batch."""
        instances = [id(leaf) for part in self.parts for leaf in leaves(part)]
        if len(set(instances)) < len(instances):
            raise DrafterError(f"drafter {self.name!r} uses one instance twice; make one for each place")
        with_cache = [part.name for part in self.parts if part.kv_model is not None]
        if len(with_cache) > 1:
            raise DrafterError(
                f"drafters {_quoted(with_cache)} each have a network with a cache of its own, and there "
                "is room for one; combine one of them with a drafter without a network, such as prompt_lookup"
            )
        with_queries = [part.name for part in self.parts if part.num_extra_queries]
        if len(with_queries) > 1:
            raise DrafterError(
                f"drafters {_quoted(with_queries)} both put queries into the target's forwards, which take "
                "those of one; combine one of them with a drafter without such queries, such as prompt_lookup"
            )

    def check(self, target: PreTrainedModel, max_length: int) -> None:
        for part in self.parts:
            check_contract(part)
            part.check(target, max_length)

    def start(self, context: Context, rows: Rows) -> None:
        super().start(context, rows)
        for part in self.parts:
            if part.is_busy:
                raise DrafterError(
                    f"drafter {part.name!r} is already at work in another generate call; make one for each"
                )
            check_contract(part)

        # No policy: it would be shown tokens of drafts that are not taken.
        own = replace(context, policy=None)
        for part in self.parts:
            part.is_busy = True
            self._started.append(part)
            part.start(own, rows)

    def read(self, rows: Rows, begin: int, end: int, states: tuple[Tensor, ...]) -> None:
        for part in self.parts:
            if part.target_layers:
                part.read(rows, begin, end, self._states_of(part, states))

    def keep_rows(self, index: Tensor) -> None:
        for part in self.parts:
            part.keep_rows(index)

    def ended(self, row_id: int, token_ids: Tensor) -> None:
        for part in self.parts:
            part.ended(row_id, token_ids)

    def join(self, rows: Rows, begin: int, end: int) -> None:
        for part in self.parts:
            part.join(rows, begin, end)

    def resize(self, num_slots: int, capacity: int) -> None:
        for part in self.parts:
            part.resize(num_slots, capacity)

    def finish(self) -> None:
        """Also where `start` failed on the way: only those that were started finish, and all of them do."""
        with ExitStack() as stack:
            for part in self._started:
                part.is_busy, part.context = False, None
                stack.callback(part.finish)
        self._started = []

    def _asked(self, part: Drafter, rows: Rows, max_tokens: int) -> Draft:
        draft = part.propose(rows, max_tokens)
        if not isinstance(draft, Draft):
            raise DrafterError(
                f"drafter {part.name!r} proposed a {type(draft).__name__}; propose() must return a Draft"
            )
        if draft.parents is not None:
            raise DrafterError(
                f"drafter {part.name!r} proposed a tree; only chains are verified yet, leave parents=None"
            )
        return draft

    def _states_of(self, part: Drafter, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of the hidden states in `target_layers` those that a part asked for; none where none were computed."""
        return tuple(states[self.target_layers.index(layer)] for layer in part.target_layers) if states else ()

    def _count_calls(self) -> None:
        self.num_calls = sum(part.num_calls for part in self.parts)


def leaves(drafter: Drafter) -> list[Drafter]:
    """The drafters that a combination consists of."""
    if not isinstance(drafter, Several):
        return [drafter]
    return [leaf for part in drafter.parts for leaf in leaves(part)]


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))
