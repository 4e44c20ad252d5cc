"""Training text written by a model, greedily or by sampling: the target's, or the drafter's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from specdec.api.generate import generate
from specdec.check.padding import left_pad, until_end
from specdec.check.settings import ends_of, greedy_settings
from specdec.drafters.training.checkpoint import written_whole
from specdec.drafters.training.data import TokenStream, TrainBatch, pad_right
from specdec.errors import ConfigError

MIN_PROMPT_TOKENS = 8


class Prompts:
    """An endless sequence of prompts, addressed by number: those of a file in turn, or starts of rows of a token
    stream.
    """

    def __init__(self, source: Sequence[Tensor] | TokenStream, prefix: Sequence[int] = (), seed: int = 0):
        """prefix: the tokens that the tokenizer puts before every text; only a stream's rows lack them."""
        self.source, self.prefix, self.seed = source, torch.tensor(list(prefix), dtype=torch.long), seed

    def get(self, first: int, count: int) -> list[Tensor]:
        """Prompts first .. first + count - 1, [length] int64 each."""
        if not isinstance(self.source, TokenStream):
            return [self.source[number % len(self.source)] for number in range(first, first + count)]
        rows = self.source.rows(first, count)
        return [torch.cat([self.prefix, row[: self._length(first + i)]]) for i, row in enumerate(rows)]

    def _length(self, number: int) -> int:
        least = min(MIN_PROMPT_TOKENS, self.longest)
        return int(np.random.default_rng([self.seed, 1, number]).integers(least, self.longest + 1))

    @property
    def digest(self) -> str:
        """Distinguishes these prompts from others, by some of them."""
        some = torch.cat(self.get(0, 32)).numpy().astype("<i8").tobytes()
        return hashlib.sha256(some).hexdigest()[:16]

    @property
    def longest(self) -> int:
        return self.source.row_tokens if isinstance(self.source, TokenStream) else max(map(len, self.source))


@dataclass(frozen=True)
class Writing:
    """How text is written. temperature: 0 is greedy. batch_size: prompts decoded together."""

    num_new_tokens: int
    temperature: float
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} is below 0; 0 is greedy, 1 the model's own distribution")


def write(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    writing: Writing,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Each prompt with its continuation, end of sequence included, [length] int64 on the CPU.

    seed: of row 0; row i samples with seed + i, whatever its batch. on_progress: called with prompts just done.
    """
    rows: list[Tensor] = []
    with greedy_settings(model):
        pad, ends = model.generation_config.pad_token_id, ends_of(model)
        for first in range(0, len(prompts), writing.batch_size):
            batch = prompts[first : first + writing.batch_size]
            ids, mask = left_pad(batch, pad, model.device)
            seeds = range(seed + first, seed + first + len(batch))
            out: Any = generate(model, ids, mask, max_new_tokens=writing.num_new_tokens, **_options(writing, seeds))
            new = [until_end(row, ends, pad) for row in out[:, ids.shape[1] :].tolist()]
            rows += [torch.cat([prompt, torch.tensor(tokens)]) for prompt, tokens in zip(batch, new, strict=True)]
            if on_progress is not None:
                on_progress(len(batch))
    return rows


def _options(writing: Writing, seeds: range) -> dict[str, Any]:
    if writing.temperature == 0:
        return {}
    return {"do_sample": True, "temperature": writing.temperature, "top_k": 0, "top_p": 1.0, "seed": list(seeds)}


@dataclass(frozen=True)
class Pool:
    """Continued prompts, written once and read again and again.

    token_ids: [rows, columns] int64, padded on the right. counted: [rows, columns] bool, the continuations.
    """

    token_ids: Tensor
    counted: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def batch(self, first: int, count: int) -> TrainBatch:
        """Rows first .. first + count - 1 of the endlessly repeated pool, cut to the longest of them."""
        index = torch.arange(first, first + count) % len(self)
        token_ids, counted = self.token_ids[index], self.counted[index]
        columns = int(counted.any(0).nonzero().max()) + 1
        return TrainBatch(token_ids[:, :columns], counted[:, :columns])

    def save(self, path: Path) -> None:
        with written_whole(path) as temporary:
            save_file({"token_ids": self.token_ids, "counted": self.counted}, temporary)

    @staticmethod
    def load(path: Path) -> Pool:
        return Pool(**load_file(path))

    @staticmethod
    def of(rows: Sequence[Tensor], prompts: Sequence[Tensor], pad_token_id: int) -> Pool:
        batch = pad_right(rows, [len(prompt) for prompt in prompts], pad_token_id)
        return Pool(batch.token_ids, batch.counted)


def fill_pool(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    writings: Sequence[Writing],
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> Pool:
    """Continue prompt i with writing i modulo their number, so that every batch holds each kind equally."""
    rows: list[Tensor] = [torch.empty(0)] * len(prompts)
    for kind, writing in enumerate(writings):
        places = range(kind, len(prompts), len(writings))
        written = write(model, [prompts[i] for i in places], writing, seed + kind * len(prompts), on_progress)
        for place, row in zip(places, written, strict=True):
            rows[place] = row
    return Pool.of(rows, prompts, 0)
