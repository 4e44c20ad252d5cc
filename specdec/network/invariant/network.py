"""The short forward of a batch-invariant llama-, qwen2-, qwen3-, mistral- or gemma-type model: few launches a layer.

Its bits are those of the model's own modules with the kernels swapped in (`batch_invariant`), so transformers' own
`generate` on that model stays the oracle. Weights are read where they lie. On a GPU the steps are replayed as CUDA
graphs (`step_graphs.py`), because the host cannot launch a step's kernels as fast as the device runs them.

A draft model's bits do not matter, since what is accepted is the target's own. Where the caller says so
(`must_be_exact=False`) its steps of few tokens are a single launch (`one_launch.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch.cache import RaggedCache
from specdec.batch.columns import Columns
from specdec.batch.layout import Layout
from specdec.draft import ExtraQueries
from specdec.kernels.attention.ragged_attention import TREE_SLOTS
from specdec.kernels.persistent.step import is_faster
from specdec.network.base import CachePlan, Network, NetworkOutput, layer_numbers
from specdec.network.invariant.graphs import MAX_STEP_WIDTH, Forward, StepGraphs, row_bucket, width_bucket
from specdec.network.invariant.guard import own_arithmetic
from specdec.network.invariant.layers import Head, Norm, layers_of
from specdec.network.invariant.one_launch import one_launch_step
from specdec.network.invariant.seconds import StepSeconds
from specdec.network.invariant.step import Step, step_of
from specdec.network.invariant.swap import is_batch_invariant, is_invariant_forward
from specdec.network.invariant.timings import CapturedTimings
from specdec.network.known_classes import FAMILIES, is_known_class, is_plain

# After the texts of a cache: for the branches of a step, and for the rows and columns that pad a graph.
SPARE_SLOTS = TREE_SLOTS


def can_shorten(model: PreTrainedModel) -> bool:
    """Whether `model` is batch-invariant and exactly one of the known classes, with nothing else attached."""
    return (
        is_batch_invariant(model) and is_known_class(model, FAMILIES) and all(map(is_plain_or_swapped, model.modules()))
    )


def is_plain_or_swapped(module: nn.Module) -> bool:
    return is_plain(module, may_be_replaced=is_invariant_forward(module.__dict__.get("forward")))


class InvariantForward:
    """The layers, a cache and the captured steps: all that is worth keeping from one generation to the next."""

    def __init__(self, model: PreTrainedModel, max_rows: int, num_slots: int, must_be_exact: bool = True):
        """must_be_exact: whether steps have the bits of the model's own modules; a draft model's need not."""
        self.max_rows, self.num_slots = max_rows, num_slots
        self.weights = addresses(model)
        num_cache_slots = num_slots + SPARE_SLOTS
        self.layers = layers_of(model, num_cache_slots)
        self.windows = {layer.window for layer in self.layers}
        self.embedding, self.norm, self.head = model.model.embed_tokens, Norm(model.model.norm), Head(model)
        self.cache = RaggedCache(len(self.layers), max_rows, num_cache_slots, model.device)
        head_dim = model.model.layers[0].self_attn.head_dim
        self.cache.allocate(model.config.num_key_value_heads, head_dim, self.embedding.weight.dtype)
        self.graphs = StepGraphs(self.cache) if model.device.type == "cuda" else None
        self.graphs_with_extra: dict[int, tuple[StepGraphs, ExtraQueries]] = {}  # by the number of extra queries
        self.one_launch = None
        if not must_be_exact:
            self.one_launch = one_launch_step(model, self.cache, *self.layers[0].options.rotation, num_slots)

    def known_seconds(self) -> StepSeconds | None:
        """What steps take, for a later forward of the same weights with another cache."""
        return None if self.graphs is None else self.graphs.seconds.taken_over(len(self.graphs.captured))

    def take_over(self, known: StepSeconds | None) -> None:
        if known is not None and self.graphs is not None:
            self.graphs.seconds = known

    def serves(self, model: PreTrainedModel, max_rows: int, num_slots: int) -> bool:
        """Whether it is large enough and of the same weights."""
        return max_rows <= self.max_rows and num_slots <= self.num_slots and self.weights == addresses(model)

    def __call__(self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]) -> NetworkOutput:
        """A step of the cache's first rows, in one launch where that serves; nothing waits for the device."""
        if self.one_launch is not None and is_faster(token_ids.numel(), used_slots) and set(layers) <= {-1}:
            logits, hidden = self.one_launch(token_ids, starts)
            return NetworkOutput(logits, (hidden,) * len(layers))
        return self.text(token_ids, starts, used_slots, layers)

    def text(self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]) -> NetworkOutput:
        """The same layer by layer."""
        columns = Columns.chain(starts, token_ids.shape[1])
        hidden, states = self.through_layers(self.embed(token_ids), columns, used_slots, layers)
        return NetworkOutput(self.logits(hidden), states)

    def tree(
        self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...], parents: Tensor
    ) -> NetworkOutput:
        """The same of a tree of at most TREE_SLOTS columns."""
        columns = Columns.tree(starts, parents)
        hidden, states = self.through_layers(self.embed(token_ids), columns, used_slots, layers)
        return NetworkOutput(self.logits(hidden), states)

    @torch.no_grad()
    def text_with_branches(
        self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...], extra: ExtraQueries
    ) -> NetworkOutput:
        """The same of a text and a branch after each of its tokens, at most TREE_SLOTS columns.

        The last of the hidden states is that of the branches after the final norm, [rows, width, extra, hidden].
        """
        rows, width = token_ids.shape
        each = torch.arange(width, device=starts.device)[None]
        # A graph's padding starts so late that its slots have room for tokens alone.
        columns = Columns.branches(starts.clamp(max=self.num_slots), width, each, extra.ahead)

        text = self.embed(token_ids)
        branches = extra.embeddings.to(text.dtype).repeat(width, 1).expand(rows, -1, -1)
        hidden, states = self.through_layers(torch.cat([text, branches], 1), columns, used_slots, layers)

        branches = hidden[:, width:].unflatten(1, (width, -1))
        return NetworkOutput(self.logits(hidden[:, :width]), (*(state[:, :width] for state in states), branches))

    @torch.no_grad()
    def branch_alone(self, starts: Tensor, width: int, after: Tensor, used_slots: int, extra: ExtraQueries) -> Tensor:
        """Logits of a branch after one column of each row, [rows, extra, vocab], in a forward of its own after that
        of the step's [rows, width] text. after: [rows] int64."""
        columns = Columns.branch_alone(starts, width, after, extra.ahead)
        inputs = extra.embeddings.to(self.embedding.weight.dtype).expand(len(starts), -1, -1)
        step = step_of(columns, used_slots, self.windows)  # without padding: this is never captured
        hidden, _ = self.run(inputs, step, slice(0, len(starts)), ())
        return self.logits(hidden)

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        return self.embedding(token_ids)

    def through_layers(
        self, inputs: Tensor, columns: Columns, used_slots: int, layers: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`run` of the cache's first rows."""
        return self.run(inputs, self.step_of(columns, used_slots), slice(0, len(inputs)), layers)

    def step_of(self, columns: Columns, used_slots: int) -> Step:
        return step_of(columns, used_slots, self.windows, self.num_slots)

    @torch.no_grad()
    def run(
        self, inputs: Tensor, step: Step, rows: slice, layers: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The states after the final norm, and those that were asked for, [rows, width, hidden] each, as `inputs`."""
        last = len(self.layers)
        asked = layer_numbers(layers, last)
        states = {0: inputs}
        with own_arithmetic():
            hidden, added = inputs, None
            for number, (layer, cached) in enumerate(zip(self.layers, self.cache.layers, strict=True), 1):
                hidden, added = layer(hidden, added, cached.keys[rows], cached.values[rows], step)
                if number in asked and number != last:
                    states[number] = hidden + added
            hidden, _ = self.norm.of_sum(hidden, added)
            states[last] = hidden
        return hidden, tuple(states[number] for number in asked)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        with own_arithmetic():
            return self.head(hidden)


# By whether the bits must be those of the model's modules: the target's must, a draft model's need not.
_kept: dict[bool, WeakKeyDictionary[PreTrainedModel, InvariantForward]] = {
    True: WeakKeyDictionary(),
    False: WeakKeyDictionary(),
}
SLOTS_ROUNDING = 256


@contextmanager
def kept_forward(
    model: PreTrainedModel, max_rows: int, num_slots: int, must_be_exact: bool = True
) -> Iterator[InvariantForward]:
    """The model's forward from an earlier generation if it is free, large enough and of the same weights.

    One is kept per model and exactness, the last used: its cache stays allocated, as transformers' static cache does.
    """
    kept = _kept[must_be_exact].pop(model, None)
    if kept is None or not kept.serves(model, max_rows, num_slots):
        known = None if kept is None or kept.weights != addresses(model) else kept.known_seconds()
        del kept  # before the new one takes memory
        kept = InvariantForward(model, row_bucket(max_rows), rounded_up(num_slots), must_be_exact)
        kept.take_over(known)
    yield kept
    _kept[must_be_exact][model] = kept  # not after an exception: a step may have been interrupted half-way


def rounded_up(num_slots: int) -> int:
    return -(-num_slots // SLOTS_ROUNDING) * SLOTS_ROUNDING


def addresses(model: PreTrainedModel) -> list[int]:
    """Where the weights lie: graphs read them there."""
    return [parameter.data_ptr() for parameter in model.parameters()]


class InvariantNetwork(Network):
    """Runs the kernels over the model's own weights in the ragged layout; the modules are not touched."""

    must_be_exact = True  # whether the output depends on this model's bits, as it does on a target's
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
        return self.kept.graphs is not None

    @property
    def timings(self) -> CapturedTimings | None:
        kept = self.kept
        return None if kept.graphs is None else CapturedTimings(kept.graphs, kept, kept.num_slots)

    @classmethod
    def plan(cls, model: PreTrainedModel, max_rows: int, num_slots: int) -> CachePlan:
        kept = _kept[cls.must_be_exact].get(model)
        if kept is not None and kept.serves(model, max_rows, num_slots):
            return CachePlan(0, 0)
        freed = 0 if kept is None else kept.cache.nbytes
        return CachePlan(row_bucket(max_rows), rounded_up(num_slots) + SPARE_SLOTS, freed)

    @contextmanager
    def running(self) -> Iterator[None]:
        size = self.cache.max_rows, self.cache.num_slots
        with kept_forward(self.model, *size, self.must_be_exact) as self.kept:
            self.cache = self.kept.cache
            self.cache.num_filled = 0  # of an earlier generation nothing is left
            yield

    def resize(self, max_rows: int, num_slots: int) -> None:
        if max_rows > self.kept.max_rows or num_slots > self.kept.num_slots:
            size = row_bucket(max(max_rows, self.kept.max_rows)), max(num_slots, self.kept.num_slots)
            known = self.kept.known_seconds()
            self.kept = InvariantForward(self.model, size[0], rounded_up(size[1]), self.must_be_exact)
            self.kept.take_over(known)
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
        return self._captured(self.kept.graphs, self.kept, token_ids, starts, used_slots, layers)

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
        if kept.graphs is not None:
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
        return width_bucket(width) if self.kept.graphs is not None and width <= MAX_STEP_WIDTH else width

    def _graphs_with_extra(self, extra: ExtraQueries, most: int) -> tuple[StepGraphs, ExtraQueries]:
        """Graphs for as many queries or more, at most `most`, and the queries that they read.

        The last query is repeated until there are as many as the graphs take; no other sees the repetitions.
        """
        kept = self.kept
        num = min((num for num in kept.graphs_with_extra if extra.num <= num <= most), default=extra.num)
        repeated = torch.arange(num, device=extra.ahead.device).clamp(max=extra.num - 1)
        if num not in kept.graphs_with_extra:
            embeddings = extra.embeddings.to(kept.embedding.weight.dtype, copy=True)
            kept.graphs_with_extra[num] = StepGraphs(self.cache), ExtraQueries(embeddings, extra.ahead.clone())
        graphs, inputs = kept.graphs_with_extra[num]
        inputs.embeddings.copy_(extra.embeddings[repeated])  # where the graphs read them
        inputs.ahead.copy_(extra.ahead[repeated])
        return graphs, inputs

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
