"""The same prompts decoded in two ways that must agree: by transformers one at a time, and by specdec in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specdec.api.generate import generate
from specdec.batch.report import StepReport
from specdec.engine.metrics import Speculation
from specdec.options.speculation import SpeculativeConfig

# Settings that make decoding other than N plain greedy tokens, each with the value that does not (beside None).
# Sampling warpers are not among them: they do nothing without do_sample.
NO_CHANGE: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "token_healing": False,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "stop_strings": None,
}

OnProgress = Callable[[str, int], None]  # stage ("plain", "speculative" or "judging"), prompts done since the last call


@dataclass(frozen=True)
class Run:
    """outputs: the new tokens of each prompt, up to and with its end of sequence."""

    outputs: list[list[int]]
    seconds: float
    speculation: Speculation

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds


@contextmanager
def greedy_settings(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Plain greedy decoding as the model's generation config: of its own only the special tokens remain.

    Yields the settings that are ignored, by name. The model's config is put back afterwards.
    """
    own = model.generation_config
    values = own.to_dict()  # for JSON
    ignored = {name: values.get(name) for name, neutral in NO_CHANGE.items() if values.get(name) not in (None, neutral)}
    eos = own.eos_token_id
    pad = next((token for token in (own.pad_token_id, *ends_of(model)) if token is not None), 0)
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, bos_token_id=own.bos_token_id, eos_token_id=eos, pad_token_id=pad
    )
    try:
        yield ignored
    finally:
        model.generation_config = own


def run_plain(
    model: PreTrainedModel, prompts: Sequence[Tensor], max_new_tokens: int, on_progress: OnProgress | None = None
) -> Run:
    """transformers' own greedy decoding, one prompt at a time, within `greedy_settings`."""
    tell(on_progress, "plain", 0)
    begin, outputs = now(model), []
    for prompt in prompts:
        ids = prompt[None].to(model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens)
        outputs.append(out[0, len(prompt) :].tolist())
        tell(on_progress, "plain", 1)
    return Run(outputs, now(model) - begin, Speculation())


def run_batched(model: PreTrainedModel, prompts: Sequence[Tensor], max_new_tokens: int) -> Run:
    """transformers' own greedy decoding of one padded batch, within `greedy_settings`."""
    begin, pad = now(model), model.generation_config.pad_token_id
    ids, mask = left_pad(prompts, pad, model.device)
    sequences = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens)
    outputs = [until_end(row, ends_of(model), pad) for row in sequences[:, ids.shape[1] :].tolist()]
    return Run(outputs, now(model) - begin, Speculation())


def run_speculative(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    config: SpeculativeConfig,
    batch_size: int,
    max_new_tokens: int,
    on_progress: OnProgress | None = None,
    options: Mapping[str, Any] | None = None,
) -> Run:
    """Our decoding in batches, within `greedy_settings`. options: further keywords of `generate`."""
    begin, outputs, speculation = now(model), [], Speculation()

    def on_commit(report: StepReport) -> None:
        speculation.add(report)
        tell(on_progress, "speculative", int(report.finished.sum()))

    pad = model.generation_config.pad_token_id
    for first in range(0, len(prompts), batch_size):
        ids, mask = left_pad(prompts[first : first + batch_size], pad, model.device)
        sequences = generate(
            model,
            ids,
            mask,
            drafter=config.drafter,
            num_speculative_tokens=config.num_speculative_tokens,
            on_commit=on_commit,
            max_new_tokens=max_new_tokens,
            **(options or {}),
        )
        assert isinstance(sequences, Tensor)
        outputs += [until_end(row, ends_of(model), pad) for row in sequences[:, ids.shape[1] :].tolist()]
        speculation.num_draft_calls += config.drafter.num_calls
    return Run(outputs, now(model) - begin, speculation)


def until_end(row: list[int], eos_token_ids: Sequence[int], pad_token_id: int) -> list[int]:
    """A batch's row without the padding behind its end of sequence; anything else behind it stays, to be seen."""
    end = next((i + 1 for i, token in enumerate(row) if token in eos_token_ids), len(row))
    return row[:end] if all(token == pad_token_id for token in row[end:]) else row


def left_pad(prompts: Sequence[Tensor], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [rows, longest] int64 each."""
    shape = len(prompts), max(map(len, prompts))
    ids, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, shape[1] - len(prompt) :] = prompt
        mask[row, shape[1] - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def ends_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The end-of-sequence tokens of the model's generation config."""
    eos = model.generation_config.eos_token_id
    return () if eos is None else tuple(torch.as_tensor(eos).flatten().tolist())


def now(model: PreTrainedModel) -> float:
    """Seconds, once the device has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def tell(on_progress: OnProgress | None, stage: str, num_done: int) -> None:
    if on_progress is not None:
        on_progress(stage, num_done)
