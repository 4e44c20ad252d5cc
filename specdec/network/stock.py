"""Runs any causal language model through its own modules over a ragged cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.layout import Layout
from specdec.draft import ExtraQueries
from specdec.network import attention
from specdec.network.base import Network, NetworkOutput, evaluating
from specdec.network.invariant.attention import INVARIANT
from specdec.network.model_cache import cache_argument


class StockNetwork(Network):
    """Switches the model to ragged attention while it runs, and back afterwards."""

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
        if config._attn_implementation == INVARIANT:
            self.attention = INVARIANT
        elif type(model)._supports_attention_backend:
            self.attention = attention.RAGGED_SDPA if is_sdpa else attention.RAGGED
        else:
            self.attention = "sdpa" if is_sdpa else "eager"
        # The class's own forward: the instance's may be wrapped (accelerate, PEFT) and take anything.
        parameters = inspect.signature(type(model).forward).parameters
        self.accepts_positions = "position_ids" in parameters
        self.accepts_logits_to_keep = "logits_to_keep" in parameters
        self.max_length = max_length
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
