"""The same prompts decoded in ways that must agree: by transformers one at a time, and by specdec in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.api.generate import generate
from specdec.batch.report import StepReport
from specdec.check.padding import left_pad, until_end
from specdec.check.progress import OnProgress, now, tell
from specdec.check.settings import ends_of
from specdec.engine.metrics import Speculation
from specdec.network.choose import service_of
from specdec.network.invariant.swap import batch_invariant
from specdec.options.speculation import SpeculativeConfig


@dataclass(frozen=True)
class Run:
    """outputs: the new tokens of each prompt, up to and with its end of sequence."""

    outputs: list[list[int]]
    seconds: float
    speculation: Speculation

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds


def is_exact(model: PreTrainedModel, exact: bool = True) -> bool:
    """Whether `generate` runs the model with batch-invariant kernels, so that no rounding explains a difference."""
    return service_of(model, exact=exact).is_exact


def oracle_of(model: PreTrainedModel, exact: bool = True) -> AbstractContextManager:
    """Within it transformers' own decoding of the model has the bits that `generate` gives: where that runs
    batch-invariant kernels, they are swapped in."""
    return batch_invariant(model) if is_exact(model, exact) else nullcontext()


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
