"""DistillSpec: a draft model learns the target's distribution, on the kind of text it will draft.

Zhou et al., "DistillSpec: Improving Speculative Decoding via Knowledge Distillation" (2023): minimise over the drafter
E_(x, y ~ G) 1/|y| sum_t D(p, q)(. | x, y_<t), with no gradient through the sampling of y (eq. 3 and 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from specdec.drafters.training.data import TokenStream, TrainBatch
from specdec.drafters.training.distill.divergences import Divergence, divergence_of
from specdec.drafters.training.own_text import Pool, Prompts, Writing, fill_pool
from specdec.drafters.training.trainer import TrainConfig, TrainRecord, TrainStep, as_json, train
from specdec.errors import ConfigError, InputError

CROSS_ENTROPY = "ce"
SOURCES = ("on-policy", "target", "fixed")
POOL = "target_text.safetensors"
OnProgress = Callable[[int], None]


@dataclass(frozen=True)
class Distillation:
    """The loss, and the data it is minimised on.

    loss: fkl, rkl, jsd or tvd; or ce, next-token cross-entropy without a target, the baseline. beta: of jsd.
    shares: source -> share of each batch's rows. "fixed" is rows of the training text; "target" the target's
    continuations of prompts; "on-policy" those of the drafter in its current state, renewed every `renew_every` steps
    and each read `own_reads` times.
    temperatures: of the continuations, in turn; 0 is greedy. num_texts: continuations that the target writes.
    """

    loss: str = "fkl"
    beta: float = 0.5
    shares: dict[str, float] = field(default_factory=lambda: {"fixed": 1.0})
    temperatures: tuple[float, ...] = (1.0,)
    batch_rows: int = 32
    row_tokens: int = 256
    num_texts: int = 4096
    renew_every: int = 8
    own_reads: int = 1
    write_batch: int = 64

    def __post_init__(self) -> None:
        if self.loss != CROSS_ENTROPY:
            divergence_of(self.loss, self.beta)
        unknown = sorted(self.shares.keys() - set(SOURCES))
        if unknown:
            raise ConfigError(f"data source {unknown[0]!r} is unknown; choose from {', '.join(SOURCES)}")
        if not self.shares or min(self.shares.values()) <= 0 or abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ConfigError(f"shares {self.shares} must be positive and sum to 1")
        if self.loss == CROSS_ENTROPY and "on-policy" in self.shares:
            raise ConfigError("cross-entropy on the drafter's own text teaches it nothing; use target or fixed data")
        if not self.temperatures:
            raise ConfigError("temperatures is empty; name at least one, 0 for greedy")
        if not 1 <= self.own_reads <= self.renew_every:
            raise ConfigError(
                f"own_reads={self.own_reads} must be from 1 to renew_every={self.renew_every}, the steps in between"
            )
        for name, count in self.rows_of_sources().items():
            if count < 1:
                raise ConfigError(f"share {self.shares[name]} of {name!r} is less than one row of {self.batch_rows}")

    def rows_of_sources(self) -> dict[str, int]:
        """Rows of each source in a batch; they sum to `batch_rows`."""
        names, edges = list(self.shares), np.cumsum([0.0, *self.shares.values()])
        places = np.round(edges * self.batch_rows).astype(int)
        return {name: int(end - begin) for name, begin, end in zip(names, places, places[1:], strict=False)}


class Reader:
    """Batches of all sources, by step; the drafter's latest texts are part of a checkpoint."""

    def __init__(
        self,
        data: Distillation,
        text: TokenStream | None,
        prompts: Prompts | None,
        target_pool: Pool | None,
        draft: PreTrainedModel,
        seed: int,
    ):
        self.data, self.text, self.prompts, self.target_pool = data, text, prompts, target_pool
        self.draft, self.seed = draft, seed
        self.own: Pool | None = None

    def batch(self, step: TrainStep) -> TrainBatch:
        parts = [
            getattr(self, "_" + name.replace("-", "_"))(step, n) for name, n in self.data.rows_of_sources().items()
        ]
        columns = max(part.token_ids.shape[1] for part in parts)
        padded = [[F.pad(t, (0, columns - t.shape[1])) for t in (part.token_ids, part.counted)] for part in parts]
        token_ids, counted = (torch.cat(tensors) for tensors in zip(*padded, strict=True))
        return TrainBatch(token_ids, counted).to(step.device)

    def _fixed(self, step: TrainStep, num_rows: int) -> TrainBatch:
        assert self.text is not None
        return self.text.batch(step.shard * num_rows, num_rows)

    def _target(self, step: TrainStep, num_rows: int) -> TrainBatch:
        assert self.target_pool is not None
        return self.target_pool.batch(step.index * num_rows, num_rows)

    def _on_policy(self, step: TrainStep, num_rows: int) -> TrainBatch:
        assert self.prompts is not None
        place = step.index % self.data.renew_every
        num_texts = num_rows * -(-self.data.renew_every // self.data.own_reads)
        if place == 0 or self.own is None:
            period = (step.index // self.data.renew_every) * step.num_processes + step.rank
            prompts = self.prompts.get(period * num_texts, num_texts)
            self.own = fill_pool(self.draft, prompts, writings(self.data, self.prompts), seed_of(self.seed, 4, period))
        return self.own.batch(place * num_rows, num_rows)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.own is None else {"token_ids": self.own.token_ids, "counted": self.own.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own = Pool(**state) if state else None


def writings(data: Distillation, prompts: Prompts) -> list[Writing]:
    num_new_tokens = data.row_tokens - prompts.longest
    if num_new_tokens < 1:
        raise ConfigError(
            f"row_tokens={data.row_tokens} leaves no room after prompts of up to {prompts.longest} tokens; "
            "raise it, or shorten the prompts"
        )
    return [Writing(num_new_tokens, temperature, data.write_batch) for temperature in data.temperatures]


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])


def target_texts(
    target: PreTrainedModel,
    prompts: Prompts,
    data: Distillation,
    seed: int,
    work: Path,
    accelerator: Accelerator,
    on_progress: OnProgress | None = None,
) -> Pool:
    """This process's share of the target's texts, written once and kept in `work` for a resumed run."""
    rank, path = accelerator.process_index, work / f"{accelerator.process_index}-{POOL}"
    num_mine = max(data.num_texts // accelerator.num_processes, len(data.temperatures))
    if not path.exists():
        wanted = prompts.get(rank * num_mine, num_mine)
        fill_pool(target, wanted, writings(data, prompts), seed_of(seed, 5, rank), on_progress).save(path)
    pool = Pool.load(path)
    if len(pool) != num_mine:
        raise InputError(f"{str(path)!r} is from a run with other settings; delete it or choose another folder")
    return pool


def distill(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    data: Distillation,
    config: TrainConfig,
    work: Path,
    accelerator: Accelerator,
    text: TokenStream | None = None,
    prompts: Prompts | None = None,
    on_progress: OnProgress | None = None,
) -> TrainRecord:
    """Train `draft` (float32 weights) in place. The target gets no gradients; neither model uses dropout.

    text: for fixed data. prompts: for the others. work: see `train`. on_progress: called with texts just written.

    Raises ConfigError or InputError if a source lacks something it needs.
    """
    if "fixed" in data.shares and text is None:
        raise InputError("fixed data needs a training text; pass --text")
    if prompts is None and set(data.shares) != {"fixed"}:
        raise InputError("on-policy and target data need prompts; pass --text or --prompts")
    draft.to(accelerator.device).eval().requires_grad_(True)
    target.to(accelerator.device).eval()
    pool = None
    if "target" in data.shares and prompts is not None:
        pool = target_texts(target, prompts, data, config.seed, work, accelerator, on_progress)
    reader = Reader(data, text, prompts, pool, draft, config.seed)
    divergence = None if data.loss == CROSS_ENTROPY else divergence_of(data.loss, data.beta)

    def loss_of(module: nn.Module, step: TrainStep) -> Tensor:
        batch = reader.batch(step)
        if divergence is None:
            return cross_entropy(module, batch)
        return distillation_loss(target, module, batch, divergence)

    settings = {"distillation": as_json(asdict(data)), "prompts": None if prompts is None else prompts.digest}
    return train(draft, loss_of, config, work, accelerator, settings, reader)


def distillation_loss(target: nn.Module, draft: nn.Module, batch: TrainBatch, divergence: Divergence) -> Tensor:
    """The mean over rows of the mean divergence at a row's counted positions, over the tokens that both models have."""
    inputs = batch.token_ids[:, :-1]
    with torch.no_grad():
        target_logits = target(input_ids=inputs, use_cache=False).logits
    draft_logits = draft(input_ids=inputs, use_cache=False).logits
    shared = min(target_logits.shape[-1], draft_logits.shape[-1])
    log_p, log_q = (logits[..., :shared].float().log_softmax(-1) for logits in (target_logits, draft_logits))
    return row_mean(divergence(log_p, log_q), batch.predicts)


def cross_entropy(draft: nn.Module, batch: TrainBatch) -> Tensor:
    logits = draft(input_ids=batch.token_ids[:, :-1], use_cache=False).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), batch.token_ids[:, 1:].flatten(), reduction="none")
    return row_mean(losses.view(len(logits), -1), batch.predicts)


def row_mean(values: Tensor, counted: Tensor) -> Tensor:
    """values: [rows, columns], counted: the same, bool. Rows without a counted position do not count."""
    per_row = counted.sum(1)
    sums = (values * counted).sum(1)
    return (sums / per_row.clamp(min=1)).sum() / (per_row > 0).sum().clamp(min=1)
