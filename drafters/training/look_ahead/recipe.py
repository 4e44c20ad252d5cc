"""Training of look-ahead embeddings (PaSS): only they are trained, the target stays unchanged.

At a split after token n of a text, embedding i is at position n + i and predicts token n + 1 + i; the loss is its
cross-entropy. Many splits of a text share one forward, each with its embeddings as a branch of the text
(`specdec/batch/columns.py`): the text does not see the branches, and they do not see each other. So the text's keys
and values are computed first, without gradients, and only the embeddings' own columns are differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from specdec.batch.columns import Columns
from specdec.drafters.look_ahead import LookAheadEmbeddings
from specdec.drafters.training.data import TrainBatch
from specdec.drafters.training.distill.recipe import CROSS_ENTROPY, Distillation, Reader, seed_of
from specdec.drafters.training.trainer import TrainStep
from specdec.errors import ConfigError
from specdec.network.model_cache import cache_argument

INITS = ("mean", "frequent")
OPTIMISER: dict[str, Any] = {"weight_decay": 0.0, "betas": (0.9, 0.99)}  # of `TrainConfig`
NUM_FREQUENT = 256  # number of tokens whose embeddings are averaged


@dataclass(frozen=True)
class LookAheadRecipe:
    """What is trained, and on which data.

    num_tokens: look-ahead embeddings. num_helpers: embeddings before them that predict nothing. num_splits: per text,
    in one forward. decay: embedding i's loss has weight decay ** (i - 1), since its guess counts only if those before
    it were right.
    init: the mean of all of the target's input embeddings, or of those of the text's most frequent tokens.
    shares, temperatures, num_texts, batch_rows, row_tokens, write_batch: the text, as for `Distillation`; "target" is
    text that the target itself writes, as in decoding.
    """

    num_tokens: int = 8
    num_helpers: int = 4
    num_splits: int = 32
    decay: float = 0.8
    init: str = "frequent"
    shares: dict[str, float] = field(default_factory=lambda: {"target": 1.0})
    temperatures: tuple[float, ...] = (0.0,)
    num_texts: int = 4096
    batch_rows: int = 16
    row_tokens: int = 192
    write_batch: int = 64

    def __post_init__(self) -> None:
        for name, least in (("num_tokens", 1), ("num_helpers", 0), ("num_splits", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay={self.decay} must be above 0 and at most 1, which weighs all embeddings equally")
        if self.init not in INITS:
            raise ConfigError(f"init={self.init!r}; choose {' or '.join(map(repr, INITS))}")
        if self.row_tokens < self.num_tokens + 2:
            raise ConfigError(
                f"row_tokens={self.row_tokens} leaves no split for {self.num_tokens} look-ahead tokens; raise it"
            )
        if "on-policy" in self.shares:
            raise ConfigError("on-policy text has no meaning here: the target is the drafter; use target or fixed")

    @property
    def text(self) -> Distillation:
        """The settings of the text, for its reader."""
        return Distillation(
            CROSS_ENTROPY,
            shares=self.shares,
            temperatures=self.temperatures,
            batch_rows=self.batch_rows,
            row_tokens=self.row_tokens,
            num_texts=self.num_texts,
            write_batch=self.write_batch,
        )


class LookAheadLoss(nn.Module):
    """Computes the losses from texts and their splits; only the embeddings require gradients."""

    def __init__(self, target: PreTrainedModel, embeddings: LookAheadEmbeddings):
        super().__init__()
        self.target, self.embeddings = target.eval().requires_grad_(False), embeddings

    def forward(self, token_ids: Tensor, splits: Tensor) -> Tensor:
        """Cross-entropies in nats, [rows, splits, num_tokens] float32, of embedding i on the token i + 1 after the
        split; meaningless where that is past the end of the text.

        token_ids: [rows, length] int64. splits: [rows, splits] int64, the last token that a split sees.
        """
        (rows, length), embeddings = token_ids.shape, self.embeddings
        text = DynamicCache()
        with torch.no_grad():
            self.target(input_ids=token_ids, use_cache=True, logits_to_keep=1, **cache_argument(self.target, text))
        columns = Columns.branches(token_ids.new_zeros(rows), length, splits, embeddings.ahead)
        visible = columns.mask(columns.slots.shape[1])[:, None, length:]
        dtype = self.target.dtype
        mask = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        ahead = embeddings.weight.to(dtype).repeat(splits.shape[1], 1).expand(rows, -1, -1)
        logits = self.target(
            inputs_embeds=ahead,
            attention_mask=mask,
            position_ids=columns.places[:, length:],
            use_cache=True,
            **cache_argument(self.target, text),
        ).logits
        logits = logits.unflatten(1, (splits.shape[1], -1))[:, :, embeddings.num_helpers :].float()
        labels = token_ids.gather(1, label_places(splits, embeddings.num_tokens).flatten(1).clamp(max=length - 1))
        losses = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
        return losses.view(logits.shape[:3])


def label_places(splits: Tensor, num_ahead: int) -> Tensor:
    """Positions of the tokens that the embeddings predict: [rows, splits, num_ahead] int64.

    The target's own prediction at the split is the next token; embedding 1 predicts the one after it.
    """
    return splits[..., None] + 2 + torch.arange(num_ahead, device=splits.device)


def draw_splits(batch: TrainBatch, num_splits: int, generator: torch.Generator) -> Tensor:
    """Split points at which embedding 1 has a counted token to predict, drawn with replacement: [rows, splits] int64.

    A row without such a point gets splits whose losses do not count.
    """
    usable = F.pad(batch.counted[:, 2:], (0, 2)).float()
    usable[:, 0] += (~batch.counted[:, 2:].any(1)).float()
    return torch.multinomial(usable, num_splits, replacement=True, generator=generator)


def loss_weights(batch: TrainBatch, splits: Tensor, num_ahead: int, decay: float) -> Tensor:
    """Weights, [rows, splits, num_ahead] float32, 0 where the token to predict does not count."""
    places = label_places(splits, num_ahead)
    counted = F.pad(batch.counted, (0, num_ahead + 1)).gather(1, places.flatten(1)).view_as(places)
    return counted * decay ** torch.arange(num_ahead, device=splits.device)


@dataclass
class LookAheadStep:
    """The step function: texts and splits of step n are functions of n and the seed alone."""

    reader: Reader
    recipe: LookAheadRecipe
    seed: int

    def __call__(self, module: nn.Module, step: TrainStep) -> Tensor:
        batch = self.reader.batch(TrainStep(step.index, step.rank, step.num_processes, torch.device("cpu")))
        generator = torch.Generator().manual_seed(seed_of(self.seed, 6, step.shard))
        # One shape for all steps, for the sake of a compiled module.
        missing = self.recipe.row_tokens - batch.token_ids.shape[1]
        batch = TrainBatch(F.pad(batch.token_ids, (0, missing)), F.pad(batch.counted, (0, missing)))
        splits = draw_splits(batch, self.recipe.num_splits, generator)
        weights = loss_weights(batch, splits, self.recipe.num_tokens, self.recipe.decay).to(step.device)
        losses = module(batch.token_ids.to(step.device), splits.to(step.device))
        return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


@torch.no_grad()
def initialise(embeddings: LookAheadEmbeddings, target: PreTrainedModel, token_ids: Tensor | None) -> None:
    """Start all embeddings from one mean of the target's own: of the most frequent of `token_ids`, or of all."""
    weight = target.get_input_embeddings().weight.float()
    if token_ids is not None:
        counts = torch.bincount(token_ids.flatten().long(), minlength=len(weight))
        weight = weight[counts.topk(min(NUM_FREQUENT, len(weight))).indices.to(weight.device)]
    embeddings.weight.copy_(weight.mean(0).expand_as(embeddings.weight))
