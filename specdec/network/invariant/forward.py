"""The layers of the short forward, its cache and its captured steps: all that is kept between generations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.cache import RaggedCache
from specdec.batch.columns import Columns
from specdec.draft import ExtraQueries
from specdec.kept import kept_with
from specdec.kernels.attention.ragged_attention import TREE_SLOTS
from specdec.kernels.compile_ahead import compile_ahead
from specdec.kernels.persistent.step import is_faster
from specdec.network.base import NetworkOutput, layer_numbers
from specdec.network.captured.graphs import StepGraphs, addresses, row_bucket, slot_bucket
from specdec.network.captured.prompts import PromptGraphs
from specdec.network.captured.seconds import StepSeconds
from specdec.network.invariant.guard import own_arithmetic
from specdec.network.invariant.layers import Head, Norm, layers_of
from specdec.network.invariant.one_launch import one_launch_step
from specdec.network.invariant.step import Step, step_of

# After the texts of a cache: for the branches of a step, and for the rows and columns that pad a graph.
SPARE_SLOTS = TREE_SLOTS


class InvariantForward:
    """Serves the cache's first rows; prefill, any."""

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
        self.graphs: StepGraphs | None = None
        if model.device.type == "cuda":
            seconds = kept_with(model, ("step seconds", must_be_exact), StepSeconds, self.weights)
            self.graphs = StepGraphs(self.cache, seconds)
        self.prompts = PromptGraphs(model.device) if model.device.type == "cuda" else None
        self.graphs_with_extra: dict[int, tuple[StepGraphs, ExtraQueries]] = {}  # by the number of extra queries
        self.one_launch = None
        if not must_be_exact:
            self.one_launch = one_launch_step(model, self.cache, *self.layers[0].options.rotation, num_slots)

    @property
    def nbytes(self) -> int:
        graphs = [graphs for graphs, _ in self.graphs_with_extra.values()]
        return self.cache.nbytes + sum(one.nbytes for one in (self.graphs, self.prompts, *graphs) if one is not None)

    def serves(self, model: PreTrainedModel, max_rows: int, num_slots: int) -> bool:
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
    def first_columns(self, token_ids: Tensor, last: Tensor, first_row: int) -> Tensor:
        """Cache prompts from their first token on; the logits after one column of each, [rows, 1, vocab].

        last: [rows] int64, that column.
        """
        rows, width = token_ids.shape
        starts = torch.zeros(rows, dtype=torch.long, device=token_ids.device)
        step = step_of(Columns.chain(starts, width), width, self.windows)
        hidden, _ = self.run(self.embed(token_ids), step, slice(first_row, first_row + rows), ())
        return self.logits(hidden[torch.arange(rows, device=hidden.device), last][:, None])

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

    def compile_prompts(self, num_rows: int, columns: int) -> None:
        """Compile the kernels that cache prompts of that size, several at a time; see `kernels/compile_ahead.py`."""
        with compile_ahead(self.cache.device):
            self.first_columns(self._zeros(num_rows, columns), self._zeros(num_rows), 0)

    def compile_steps(self, num_rows: int, widths: Sequence[int]) -> None:
        """The same for steps of these widths."""
        rows = row_bucket(num_rows)
        with compile_ahead(self.cache.device):
            for width in widths:
                self(self._zeros(rows, width), self._zeros(rows), min(slot_bucket(width), self.cache.num_slots), ())

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.cache.device)
