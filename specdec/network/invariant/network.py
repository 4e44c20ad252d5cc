"""The short forward of a batch-invariant llama-, qwen2-, qwen3-, mistral- or gemma-type model: few launches a layer.

Its bits are those of the model's own modules with the kernels swapped in (`batch_invariant`), so transformers' own
`generate` on that model stays the oracle. Weights are read where they lie. On a GPU the steps are replayed as CUDA
graphs (`step_graphs.py`), because the host cannot launch a step's kernels as fast as the device runs them.

A draft model's bits do not matter, since what is accepted is the target's own. Where the caller says so
(`must_be_exact=False`) its steps of few tokens are a single launch (`one_launch.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch.branches import Branches
from specdec.batch.cache import RaggedCache
from specdec.batch.layout import Layout
from specdec.draft import ExtraQueries
from specdec.kernels.attention.ragged_attention import TREE_SLOTS
from specdec.kernels.persistent.step import is_faster
from specdec.network.base import CachePlan, Network, NetworkOutput
from specdec.network.invariant.graphs import MAX_STEP_WIDTH, StepGraphs, row_bucket, width_bucket
from specdec.network.invariant.guard import own_arithmetic
from specdec.network.invariant.layers import Head, Norm, layers_of
from specdec.network.invariant.one_launch import one_launch_step
from specdec.network.invariant.step import Step, branch_step, text_step, tree_step
from specdec.network.invariant.swap import is_batch_invariant, is_invariant_forward
from specdec.network.known_classes import FAMILIES, is_known_class, is_plain

# Behind the texts of a cache: what a step takes along with its text, and what pads a graph's rows and columns.
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

    def serves(self, model: PreTrainedModel, max_rows: int, num_slots: int) -> bool:
        """Whether it is large enough and of the same weights."""
        return max_rows <= self.max_rows and num_slots <= self.num_slots and self.weights == addresses(model)

    def __call__(self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]) -> NetworkOutput:
        """A step of the cache's first rows: launches alone, nothing waits for the device."""
        if self.one_launch is not None and is_faster(token_ids.numel(), used_slots) and set(layers) <= {-1}:
            logits, hidden = self.one_launch(token_ids, starts)
            return NetworkOutput(logits, (hidden,) * len(layers))
        step = text_step(starts, token_ids.shape[1], used_slots, self.num_slots, self.windows)
        hidden, states = self.run(self.embed(token_ids), step, slice(0, len(token_ids)), layers)
        return NetworkOutput(self.logits(hidden), states)

    @torch.no_grad()
    def with_extra(
        self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...], extra: ExtraQueries
    ) -> NetworkOutput:
        """The same with a branch behind each token. The last of the states are those of the branches, behind the final
        norm: [rows, width, extra, hidden]."""
        rows, width = token_ids.shape
        columns = torch.arange(width, device=starts.device)
        # A graph's padding starts so far behind the texts that there is room for tokens alone.
        branches = Branches.behind(starts.clamp(max=self.num_slots), width, columns[None], extra.ahead)
        text = self.embed(token_ids)
        behind = extra.embeddings.to(text.dtype).repeat(width, 1).expand(rows, -1, -1)
        step = tree_step(branches, used_slots, self.num_slots, self.windows)
        hidden, states = self.run(torch.cat([text, behind], 1), step, slice(0, rows), layers)
        behind = hidden[:, width:].unflatten(1, (width, -1))
        return NetworkOutput(self.logits(hidden[:, :width]), (*(state[:, :width] for state in states), behind))

    @torch.no_grad()
    def behind(self, starts: Tensor, width: int, columns: Tensor, used_slots: int, extra: ExtraQueries) -> Tensor:
        """Logits of a branch behind one column of each row, [rows, extra, vocab], in a forward of its own after that
        of the step's [rows, width] text. columns: [rows] int64."""
        branches = Branches.behind(starts, width, columns[:, None], extra.ahead)
        inputs = extra.embeddings.to(self.embedding.weight.dtype).expand(len(starts), -1, -1)
        step = branch_step(branches, used_slots, self.windows)
        return self.logits(self.run(inputs, step, slice(0, len(starts)), ())[0])

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        return self.embedding(token_ids)

    @torch.no_grad()
    def run(
        self, inputs: Tensor, step: Step, rows: slice, layers: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The states behind the final norm, and those that were asked for, [rows, width, hidden] each, as `inputs`."""
        with own_arithmetic():
            hidden, added = inputs, None
            states = [hidden]
            for layer, cached in zip(self.layers, self.cache.layers, strict=True):
                hidden, added = layer(hidden, added, cached.keys[rows], cached.values[rows], step)
                if layers:
                    states.append(hidden + added)
            hidden, _ = self.norm.of_sum(hidden, added)
            states[-1] = hidden
        return hidden, tuple(states[i] for i in layers)

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
        del kept  # before the new one takes memory
        kept = InvariantForward(model, row_bucket(max_rows), rounded_up(num_slots), must_be_exact)
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
    ) -> NetworkOutput:
        if extra_queries is not None:
            return self._forward_with_extra(token_ids, starts, used_slots, layers, extra_queries)
        kept = self.kept
        if (kept.graphs is None and kept.one_launch is None) or token_ids.shape[1] > MAX_STEP_WIDTH:
            return super().forward(token_ids, starts, used_slots, layers, host_starts)
        self.cache.num_filled = max(self.cache.num_filled, used_slots)  # a replay announces no forward to the cache
        if kept.graphs is None:
            return kept(token_ids, starts, used_slots, layers)
        return kept.graphs.replay(kept, token_ids, starts, used_slots, layers)

    def _forward_with_extra(
        self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...], extra: ExtraQueries
    ) -> NetworkOutput:
        """In one forward, if the text and its branches fit into a tree; else the one branch that is wanted in turn."""
        kept, width = self.kept, token_ids.shape[1]
        graphs_width = width_bucket(width) if kept.graphs is not None and width <= MAX_STEP_WIDTH else width
        self.cache.num_filled = max(self.cache.num_filled, used_slots)
        if graphs_width * (1 + extra.num) > TREE_SLOTS:
            output = self.forward(token_ids, starts, used_slots, layers)
            return output._replace(extra_logits=self._behind_cached(starts, width, used_slots, extra))
        if kept.graphs is None:
            output = kept.with_extra(token_ids, starts, used_slots, layers, extra)
        else:
            most = TREE_SLOTS // graphs_width - 1
            output = self._replay_with_extra(token_ids, starts, used_slots, layers, extra, most)
        *states, branches = output.hidden_states

        def extra_logits(columns: Tensor) -> Tensor:
            return kept.logits(branches[torch.arange(len(columns), device=columns.device), columns])

        return NetworkOutput(output.logits, tuple(states), extra_logits)

    def _behind_cached(
        self, starts: Tensor, width: int, used_slots: int, extra: ExtraQueries
    ) -> Callable[[Tensor], Tensor]:
        kept, num_moves = self.kept, self._num_moves

        def extra_logits(columns: Tensor) -> Tensor:
            assert self._num_moves == num_moves, "rows have moved since the step; what is cached is another row's"
            return kept.behind(starts, width, columns, used_slots, extra)

        return extra_logits

    def keep_rows(self, index: Tensor) -> None:
        self._num_moves += 1
        super().keep_rows(index)

    def _replay_with_extra(
        self,
        token_ids: Tensor,
        starts: Tensor,
        used_slots: int,
        layers: tuple[int, ...],
        extra: ExtraQueries,
        most: int,
    ) -> NetworkOutput:
        """By graphs of as many queries or more, at most `most`: the last, repeated, stands behind all that count."""
        kept = self.kept
        num = min((num for num in kept.graphs_with_extra if extra.num <= num <= most), default=extra.num)
        repeated = torch.arange(num, device=extra.ahead.device).clamp(max=extra.num - 1)
        if num not in kept.graphs_with_extra:
            embeddings = extra.embeddings.to(kept.embedding.weight.dtype, copy=True)
            kept.graphs_with_extra[num] = StepGraphs(self.cache), ExtraQueries(embeddings, extra.ahead.clone())
        graphs, inputs = kept.graphs_with_extra[num]
        inputs.embeddings.copy_(extra.embeddings[repeated])  # where the graphs read them
        inputs.ahead.copy_(extra.ahead[repeated])
        # The columns that fill a bucket move the branches behind them.
        used_slots = min(used_slots + TREE_SLOTS, self.cache.num_slots)
        output = graphs.replay(partial(kept.with_extra, extra=inputs), token_ids, starts, used_slots, layers)
        *states, branches = output.hidden_states
        return output._replace(hidden_states=(*states, branches[:, :, : extra.num]))

    def _run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor | None,
        layers: tuple[int, ...],
        extra_queries: ExtraQueries | None = None,
    ) -> NetworkOutput:
        cache = self.cache
        step = text_step(cache.starts, token_ids.shape[1], cache.used_slots, self.kept.num_slots, self.kept.windows)
        hidden, states = self.kept.run(self.kept.embed(token_ids), step, cache.rows, layers)
        if logits_at is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), logits_at][:, None]
        return NetworkOutput(self.kept.logits(hidden), states)


class InvariantDraftNetwork(InvariantNetwork):
    """Of a draft model, whose bits the output does not depend on: a step of few tokens is one launch."""

    must_be_exact = False
