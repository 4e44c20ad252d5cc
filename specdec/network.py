"""A causal language model over a ragged KV cache: what the target and a draft model have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.cache import RaggedCache
from specdec.rows import Rows

PREFILL_CHUNK = 512  # tokens of a row per prefill forward: bounds the memory of masks and activations


class NetworkOutput(NamedTuple):
    """logits: [rows, width or 1, vocab] in the model's dtype. hidden_states: [rows, width, hidden] per asked layer."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


class Network(ABC):
    """One model and its cache. Rows are the first rows of the cache; `keep_rows` moves them when some leave."""

    def __init__(self, model: PreTrainedModel, num_layers: int, max_rows: int, num_slots: int):
        self.model = model
        self.cache = RaggedCache(num_layers, max_rows, num_slots, model.device)

    @abstractmethod
    def _run(
        self, token_ids: Tensor, positions: Tensor, logits_at: Tensor | None, layers: tuple[int, ...]
    ) -> NetworkOutput:
        """One forward after `cache.begin`. logits_at: [rows] int64, the one column a row needs logits for."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything between entering and leaving may call `forward`; the model is restored afterwards."""
        yield

    def forward(
        self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...] = ()
    ) -> NetworkOutput:
        """Feed [rows, width] tokens to follow each row's first starts[b] ([rows] int64) cached ones.

        used_slots: an upper bound of starts + width known to the host. layers: hidden states to return, numbered as
        in transformers (0 = embeddings, -1 = behind the final norm).
        """
        positions = self.cache.begin(starts, token_ids.shape[1], used_slots)
        return self._run(token_ids, positions, None, layers)

    def prefill(self, rows: Rows, token_ids: Tensor | None = None) -> Tensor:
        """Cache all committed tokens of every row; returns the logits behind each row's last one, [rows, vocab].

        token_ids: in place of `rows.token_ids`, where this network knows fewer tokens.
        """
        token_ids = rows.token_ids if token_ids is None else token_ids
        longest = rows.max_length
        out = torch.empty(0)
        for begin in range(0, longest, PREFILL_CHUNK):
            # Rows are sorted by falling length: those that reach into this chunk come first.
            num_rows = int((rows.host_lengths > begin).sum())
            end = min(begin + PREFILL_CHUNK, longest)
            starts = torch.full((num_rows,), begin, device=rows.device)
            positions = self.cache.begin(starts, end - begin, end)
            last = (rows.lengths[:num_rows] - 1 - begin).clamp(max=end - begin - 1)
            logits = self._run(token_ids[:num_rows, begin:end], positions, last, ()).logits[:, 0]
            out = logits if begin == 0 else torch.cat([logits, out[num_rows:]])
        return out

    def keep_rows(self, index: Tensor) -> None:
        self.cache.keep_rows(index)
