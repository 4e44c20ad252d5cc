"""Runs any causal language model through its own modules over a ragged cache.

On a GPU the host cannot launch a layer's many small operations as fast as the device runs them, so where the modules
allow it their steps are captured as CUDA graphs (`CapturedStock`). In half precision a library's bits depend on how
much it computes at once; `SwappedNetwork` swaps batch-invariant kernels into the modules while it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.cache import RaggedCache
from specdec.batch.columns import Columns
from specdec.batch.layout import Layout
from specdec.draft import ExtraQueries
from specdec.network import attention
from specdec.network.base import CachePlan, Network, NetworkOutput, evaluating
from specdec.network.captured.graphs import MAX_STEP_WIDTH, StepGraphs, addresses, rounded_up, row_bucket
from specdec.network.invariant.attention import INVARIANT
from specdec.network.invariant.swap import batch_invariant
from specdec.network.kept_forwards import kept_forward, kept_of
from specdec.network.model_cache import cache_argument


class StockNetwork(Network):
    """Switches the model to ragged attention while it runs, and back afterwards.

    swaps: also swaps in the batch-invariant kernels.
    """

    swaps = False

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int,
        num_slots: int,
        max_length: int | None = None,
        layout: Layout | None = None,
    ):
        """max_length: no row grows longer; slots past it are for drafts that are never committed."""
        config = model.config.get_text_config(decoder=True)
        super().__init__(model, config.num_hidden_layers, max_rows, num_slots, layout)
        attention.register()
        is_sdpa = config._attn_implementation == "sdpa"
        if self.swaps or config._attn_implementation == INVARIANT:
            self.attention = INVARIANT
        elif type(model)._supports_attention_backend:
            self.attention = attention.RAGGED_SDPA if is_sdpa else attention.RAGGED
        else:
            self.attention = "sdpa" if is_sdpa else "eager"
        # The class's own forward: the instance's may be wrapped (accelerate, PEFT) and take anything.
        parameters = inspect.signature(type(model).forward).parameters
        self.accepts_positions = "position_ids" in parameters
        self.accepts_logits_to_keep = "logits_to_keep" in parameters
        # A captured step serves rows of any limit.
        self.max_length = None if self.captures else max_length
        self._limit_positions(num_slots)

    def resize(self, max_rows: int, num_slots: int) -> None:
        super().resize(max_rows, num_slots)
        self._limit_positions(num_slots)

    def _limit_positions(self, num_slots: int) -> None:
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.last_position = min(positions or num_slots, self.max_length or num_slots) - 1

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.swaps:
                stack.enter_context(batch_invariant(self.model))
            stack.enter_context(attention.attention_implementation(self.model, self.attention))
            stack.enter_context(evaluating(self.model))
            yield

    def _run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor | None,
        layers: tuple[int, ...],
        extra_queries: ExtraQueries | None = None,
    ) -> NetworkOutput:
        options: dict = {"use_cache": True, "return_dict": True, "output_hidden_states": bool(layers)}
        if self.accepts_positions:
            # Only drafts beyond a row's length limit are clamped; they are never committed.
            options["position_ids"] = positions.clamp(max=self.last_position)
        if self.cache.pads is not None:
            slots = torch.arange(self.cache.used_slots, device=positions.device)
            options["attention_mask"] = (slots >= self.cache.pads[:, None]).long()
        if logits_at is not None and self.accepts_logits_to_keep:
            # One set of columns serves all rows; each row then picks its own.
            columns, logits_at = torch.unique(logits_at, return_inverse=True)
            # A list, because accelerate moves tensors to the first device, and the head may be on another.
            options["logits_to_keep"] = columns.tolist()
        if extra_queries is not None:
            return self._run_with_extra(token_ids, extra_queries, layers, options)
        with attention.masks_of(self.cache.columns):
            output = self.model(input_ids=token_ids, **cache_argument(self.model, self.cache), **options)
        logits = output.logits
        if logits_at is not None:
            logits = logits[torch.arange(len(logits), device=logits.device), logits_at.to(logits.device)][:, None]
        return NetworkOutput(logits, tuple(output.hidden_states[i] for i in layers))

    def _run_with_extra(
        self, token_ids: Tensor, extra_queries: ExtraQueries, layers: tuple[int, ...], options: dict
    ) -> NetworkOutput:
        rows, num_tokens = token_ids.shape
        text = self.model.get_input_embeddings()(token_ids)
        branches = extra_queries.embeddings.to(text.dtype).repeat(num_tokens, 1)
        inputs = torch.cat([text, branches.expand(rows, -1, -1)], 1)
        with attention.masks_of(self.cache.columns):
            output = self.model(inputs_embeds=inputs, **cache_argument(self.model, self.cache), **options)
        logits, behind = output.logits[:, :num_tokens], output.logits[:, num_tokens:].unflatten(1, (num_tokens, -1))

        def extra_logits(columns: Tensor) -> Tensor:
            return behind[torch.arange(rows, device=columns.device), columns]

        return NetworkOutput(logits, tuple(output.hidden_states[i][:, :num_tokens] for i in layers), extra_logits)


class SwappedNetwork(StockNetwork):
    """The model's modules with the batch-invariant kernels in them."""

    swaps = True


class CapturedModules:
    """A cache for a model's own modules, and the steps captured over it."""

    def __init__(self, model: PreTrainedModel, num_layers: int, max_rows: int, num_slots: int):
        self.max_rows, self.num_slots = max_rows, num_slots
        self.weights = addresses(model)
        # The rows that pad a step write after the texts.
        self.cache = RaggedCache(num_layers, max_rows, num_slots + MAX_STEP_WIDTH, model.device)
        self.graphs = StepGraphs(self.cache)

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + self.graphs.nbytes

    def serves(self, model: PreTrainedModel, max_rows: int, num_slots: int) -> bool:
        return max_rows <= self.max_rows and num_slots <= self.num_slots and self.weights == addresses(model)


class CapturedStock(StockNetwork):
    """Replays its steps as CUDA graphs; prefill, trees and extra queries are launched operation by operation."""

    captures = runs_ahead = True

    @classmethod
    def plan(cls, model: PreTrainedModel, max_rows: int, num_slots: int) -> CachePlan:
        kept = kept_of(model, cls)
        if kept is not None and kept.serves(model, max_rows, num_slots):
            return CachePlan(0, 0)
        freed = 0 if kept is None else kept.nbytes
        return CachePlan(row_bucket(max_rows), rounded_up(num_slots) + MAX_STEP_WIDTH, freed)

    @contextmanager
    def running(self) -> Iterator[None]:
        size = self.cache.max_rows, self.cache.num_slots
        with kept_forward(self.model, type(self), *size, lambda: self._make(*size)) as self.kept, super().running():
            self._take(self.kept)
            self.cache.num_filled = 0  # of an earlier generation nothing is left
            yield

    def _make(self, max_rows: int, num_slots: int) -> CapturedModules:
        return CapturedModules(self.model, len(self.cache.layers), row_bucket(max_rows), rounded_up(num_slots))

    def _take(self, kept: CapturedModules) -> None:
        self.kept, self.cache = kept, kept.cache
        self._limit_positions(kept.cache.num_slots)

    def resize(self, max_rows: int, num_slots: int) -> None:
        if max_rows <= self.kept.max_rows and num_slots <= self.kept.num_slots:
            return
        larger, old = self._make(max(max_rows, self.kept.max_rows), max(num_slots, self.kept.num_slots)), self.cache
        for new, layer in zip(larger.cache.layers, old.layers, strict=True):
            if layer.is_initialized:
                new.lazy_initialization(layer.keys.transpose(1, 2), layer.values.transpose(1, 2))
        larger.cache.copy_from(old)
        self._take(larger)

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
        is_text = extra_queries is None and parents is None
        is_step = self.captures and is_text and token_ids.shape[1] <= MAX_STEP_WIDTH
        # The first forward allocates the layers' buffers, which captured steps must find in place.
        if not is_step or not all(layer.is_initialized for layer in self.cache.layers):
            return super().forward(token_ids, starts, used_slots, layers, host_starts, extra_queries, parents)
        self.cache.num_filled = max(self.cache.num_filled, used_slots)
        with torch.no_grad():
            return self.kept.graphs.replay(self._step, token_ids, starts, used_slots, layers)

    def _step(self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]) -> NetworkOutput:
        """What is captured: nothing in it waits for the device."""
        columns = Columns.chain(starts, token_ids.shape[1])
        return self._run(token_ids, self.cache.begin(columns, used_slots), None, layers)


class CapturedSwapped(CapturedStock):
    """The same with the batch-invariant kernels in the modules."""

    swaps = True
