"""The short batch-invariant forward of a llama-, qwen-, mistral-, mixtral- or gemma-type model: few launches a layer.

Its bits are those of the model's own modules with the kernels swapped in (`batch_invariant`), so transformers' own
`generate` on the swapped model is its oracle. The modules themselves stay as they are; weights are read where they
lie. On a GPU the steps are replayed as CUDA graphs (`captured/`), because the host cannot launch a step's kernels as
fast as the device runs them.

A draft model's bits do not matter, since what is accepted is the target's own. Where the caller says so
(`must_be_exact=False`) its steps of few tokens are a single launch (`one_launch.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch.layout import Layout
from specdec.draft import ExtraQueries
from specdec.kept import kept_with
from specdec.kernels.attention.ragged_attention import TREE_SLOTS
from specdec.kernels.compile_ahead import in_background
from specdec.network.base import CachePlan, Network, NetworkOutput, prefill_budget
from specdec.network.captured.graphs import (
    MAX_STEP_WIDTH,
    Forward,
    StepGraphs,
    outliving_inference_mode,
    rounded_up,
    row_bucket,
    width_bucket,
)
from specdec.network.captured.timings import CapturedTimings
from specdec.network.invariant.forward import SPARE_SLOTS, InvariantForward
from specdec.network.invariant.swap import is_invariant_forward
from specdec.network.kept_forwards import kept_forward, kept_of
from specdec.network.known_classes import FAMILIES, is_known_class, is_plain


def can_shorten(model: PreTrainedModel) -> bool:
    """Whether `model` is exactly one of the known classes, with nothing attached but the swapped kernels."""
    return is_known_class(model, FAMILIES) and all(map(is_plain_or_swapped, model.modules()))


def is_plain_or_swapped(module: nn.Module) -> bool:
    return is_plain(module, may_be_replaced=is_invariant_forward(module.__dict__.get("forward")))


class InvariantNetwork(Network):
    """Runs the kernels over the model's own weights in the ragged layout; the modules are not touched."""

    must_be_exact = True  # whether the output depends on this model's bits, as it does on a target's
    captures = True
    max_tree = TREE_SLOTS

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int,
        num_slots: int,
        max_length: int | None = None,
        layout: Layout | None = None,
    ):
        super().__init__(model, 0, max_rows, num_slots)
        self._num_moves = 0

    @property
    def runs_ahead(self) -> bool:  # type: ignore[override]
        return self._graphs is not None

    @property
    def _graphs(self) -> StepGraphs | None:
        """Those of plain steps, None where steps are launched kernel by kernel."""
        return self.kept.graphs if self.captures else None

    @property
    def timings(self) -> CapturedTimings | None:
        kept = self.kept
        return None if kept.graphs is None else CapturedTimings(kept.graphs, kept, kept.num_slots)

    @classmethod
    def plan(cls, model: PreTrainedModel, max_rows: int, num_slots: int) -> CachePlan:
        kept = kept_of(model, cls)
        if kept is not None and kept.serves(model, max_rows, num_slots):
            return CachePlan(0, 0)
        freed = 0 if kept is None else kept.nbytes
        return CachePlan(row_bucket(max_rows), rounded_up(num_slots) + SPARE_SLOTS, freed)

    @contextmanager
    def running(self) -> Iterator[None]:
        size = self.cache.max_rows, self.cache.num_slots
        with kept_invariant(self.model, *size, self.must_be_exact) as self.kept:
            self.cache = self.kept.cache
            self.cache.num_filled = 0  # of an earlier generation nothing is left
            yield

    def compile_ahead(self, num_rows: int, prompt_length: int, widths: Sequence[int]) -> None:
        if self.kept.graphs is None or not num_rows:
            return

        # The kernels of prompts are chosen by the number of tokens, coarsely.
        columns = max(1, min(prompt_length, prefill_budget(self.model.device) // num_rows))
        key = "compiled", self.must_be_exact, self.model.dtype
        size = (num_rows * columns).bit_length()
        kept_with(self.model, (*key, size), lambda: self.kept.compile_prompts(num_rows, columns))
        kept_with(self.model, (*key, row_bucket(num_rows), *widths), lambda: self._compile_steps(num_rows, widths))

    def _compile_steps(self, num_rows: int, widths: Sequence[int]) -> None:
        self.kept.compile_steps(num_rows, widths)

    def resize(self, max_rows: int, num_slots: int) -> None:
        if max_rows > self.kept.max_rows or num_slots > self.kept.num_slots:
            size = row_bucket(max(max_rows, self.kept.max_rows)), max(num_slots, self.kept.num_slots)
            with outliving_inference_mode():
                self.kept = InvariantForward(self.model, size[0], rounded_up(size[1]), self.must_be_exact)
            self.kept.cache.copy_from(self.cache)
            self.cache = self.kept.cache

    def forward(
        self,
        token_ids: Tensor,
        starts: Tensor,
        used_slots: int,
        layers: tuple[int, ...] = (),
        host_starts: np.ndarray | None = None,
        extra_queries: ExtraQueries | None = None,
        parents: Tensor | None = None,
    ) -> NetworkOutput:
        """Choose among the ways below; each writes to the cache's first rows.

        A captured step is replayed on a GPU; elsewhere the same function launches its kernels one by one.
        """
        width = token_ids.shape[1]
        self.cache.num_filled = max(self.cache.num_filled, used_slots)  # no way announces its forward to the cache
        if parents is not None:
            return self._tree(token_ids, starts, used_slots, layers, parents)
        if extra_queries is not None:
            fits = self._captured_width(width) * (1 + extra_queries.num) <= TREE_SLOTS
            way = self._text_with_branches if fits else self._text_then_branch
            return way(token_ids, starts, used_slots, layers, extra_queries)
        if width <= MAX_STEP_WIDTH:
            return self._step(token_ids, starts, used_slots, layers)
        return self._wide_text(token_ids, starts, used_slots, layers)

    def _step(self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]) -> NetworkOutput:
        """A decode step; of a draft model a single launch where that is faster."""
        return self._captured(self._graphs, self.kept, token_ids, starts, used_slots, layers)

    def _wide_text(self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]) -> NetworkOutput:
        """More columns than any captured step has."""
        return self.kept.text(token_ids, starts, used_slots, layers)

    def _tree(
        self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...], parents: Tensor
    ) -> NetworkOutput:
        """A draft tree, which is not captured."""
        return self.kept.tree(token_ids, starts, used_slots, layers, parents)

    def _text_with_branches(
        self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...], extra: ExtraQueries
    ) -> NetworkOutput:
        """The text and a branch after each of its tokens in one forward."""
        kept, graphs, num_extra = self.kept, None, extra.num
        if self._graphs is not None:
            graphs, extra = self._graphs_with_extra(extra, TREE_SLOTS // self._captured_width(token_ids.shape[1]) - 1)
            # The columns that fill a bucket move the branches after them.
            used_slots = min(used_slots + TREE_SLOTS, self.cache.num_slots)

        forward = partial(kept.text_with_branches, extra=extra)
        output = self._captured(graphs, forward, token_ids, starts, used_slots, layers)
        *states, branches = output.hidden_states

        def extra_logits(columns: Tensor) -> Tensor:
            rows = torch.arange(len(columns), device=columns.device)
            return kept.logits(branches[:, :, :num_extra][rows, columns])

        return NetworkOutput(output.logits, tuple(states), extra_logits)

    def _text_then_branch(
        self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...], extra: ExtraQueries
    ) -> NetworkOutput:
        """The text alone, then each row's one branch that is wanted, where all branches do not fit into a tree."""
        kept, num_moves, width = self.kept, self._num_moves, token_ids.shape[1]
        way = self._step if width <= MAX_STEP_WIDTH else self._wide_text
        output = way(token_ids, starts, used_slots, layers)

        def extra_logits(columns: Tensor) -> Tensor:
            assert self._num_moves == num_moves, "rows have moved since the step; what is cached is another row's"
            return kept.branch_alone(starts, width, columns, used_slots, extra)

        return output._replace(extra_logits=extra_logits)

    def _captured(
        self,
        graphs: StepGraphs | None,
        forward: Forward,
        token_ids: Tensor,
        starts: Tensor,
        used_slots: int,
        layers: tuple[int, ...],
    ) -> NetworkOutput:
        """forward: always the same one for the same graphs."""
        if graphs is None:
            return forward(token_ids, starts, used_slots, layers)
        return graphs.replay(forward, token_ids, starts, used_slots, layers)

    def _captured_width(self, width: int) -> int:
        """The columns of text that a step of `width` tokens computes."""
        return width_bucket(width) if self._graphs is not None and width <= MAX_STEP_WIDTH else width

    def _graphs_with_extra(self, extra: ExtraQueries, most: int) -> tuple[StepGraphs, ExtraQueries]:
        """Graphs for as many queries or more, at most `most`, and the queries that they read.

        The last query is repeated until there are as many as the graphs take; no other sees the repetitions.
        """
        kept = self.kept
        num = min((num for num in kept.graphs_with_extra if extra.num <= num <= most), default=extra.num)
        repeated = torch.arange(num, device=extra.ahead.device).clamp(max=extra.num - 1)
        if num not in kept.graphs_with_extra:
            with outliving_inference_mode():
                embeddings = extra.embeddings.to(kept.embedding.weight.dtype, copy=True)
                kept.graphs_with_extra[num] = StepGraphs(self.cache), ExtraQueries(embeddings, extra.ahead.clone())
        graphs, inputs = kept.graphs_with_extra[num]
        inputs.embeddings.copy_(extra.embeddings[repeated])  # where the graphs read them
        inputs.ahead.copy_(extra.ahead[repeated])
        return graphs, inputs

    def prefill_columns(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        first_row: int,
        begin: int,
        end: int,
        layers: tuple[int, ...] = (),
    ) -> NetworkOutput:
        kept, cache = self.kept, self.cache
        if kept.prompts is not None and self.captures and begin == 0 and not layers:
            last = (lengths - 1).clamp(0, end - 1)
            logits = kept.prompts.replay(kept.first_columns, token_ids[:, :end], last, first_row, cache.num_slots)
            if logits is not None:
                cache.num_filled = max(cache.num_filled, end)
                return NetworkOutput(logits, ())
        return super().prefill_columns(token_ids, lengths, first_row, begin, end, layers)

    def keep_rows(self, index: Tensor) -> None:
        self._num_moves += 1
        super().keep_rows(index)

    def _run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor | None,
        layers: tuple[int, ...],
        extra_queries: ExtraQueries | None = None,
    ) -> NetworkOutput:
        """A piece of prefill, in whichever rows of the cache it is for."""
        kept, cache = self.kept, self.cache
        step = kept.step_of(cache.columns, cache.used_slots)
        hidden, states = kept.run(kept.embed(token_ids), step, cache.rows, layers)
        if logits_at is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), logits_at][:, None]
        return NetworkOutput(kept.logits(hidden), states)


class InvariantDraftNetwork(InvariantNetwork):
    """Of a draft model, whose bits the output does not depend on: a step of few tokens is one launch."""

    must_be_exact = False

    def _compile_steps(self, num_rows: int, widths: Sequence[int]) -> None:
        """Steps in one launch take the compiler ten seconds, and the first token does not need them."""
        kept = self.kept
        in_background(lambda: kept.compile_steps(num_rows, widths))


def kept_invariant(
    model: PreTrainedModel, max_rows: int, num_slots: int, must_be_exact: bool = True
) -> AbstractContextManager[InvariantForward]:
    """The model's forward from an earlier generation, or a new one with some room to spare."""

    def make() -> InvariantForward:
        return InvariantForward(model, row_bucket(max_rows), rounded_up(num_slots), must_be_exact)

    kind = InvariantNetwork if must_be_exact else InvariantDraftNetwork
    return kept_forward(model, kind, max_rows, num_slots, make)
