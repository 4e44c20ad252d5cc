"""Training of the networks that stop a draft: SpecDec++'s acceptance head and DISCO's classifier, and nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.training.heads.labels import Proposals, draft_places, propose_everywhere
from specdec.drafters.training.heads.simulate import Trace, compare_rules
from specdec.drafters.training.own_text import Pool, Prompts, Writing, fill_pool
from specdec.drafters.training.trainer import TrainConfig, TrainStep, as_json, finish, train
from specdec.errors import ConfigError, InputError
from specdec.policies.heads.acceptance_head import NUM_NUMBERS, AcceptanceHead
from specdec.policies.heads.disco import Disco
from specdec.policies.heads.files import PairHead

LABELS = {"greedy": (0.0,), "sampled": (1.0,), "both": (0.0, 1.0)}  # temperatures of the target's text
POOL = "target_text.safetensors"


@dataclass(frozen=True)
class HeadData:
    """The training data of a head: text that the target writes after `num_texts` prompts.

    labels: "greedy" (text and proposals are argmaxes), "sampled" (both are samples at temperature 1) or "both".
    num_held_out: texts after additional prompts, to measure on. mix_share: see `propose_everywhere`.
    write_batch: texts that the target writes at once.
    """

    num_texts: int
    num_held_out: int = 128
    num_new_tokens: int = 192
    labels: str = "both"
    mix_share: float = 0.0
    batch_rows: int = 32
    write_batch: int = 64
    max_draft_tokens: int = 20
    draft_cost: float = 0.12

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise ConfigError(f"labels={self.labels!r}; choose one of {', '.join(LABELS)}")
        if not 0 <= self.mix_share < 1:
            raise ConfigError(f"mix_share={self.mix_share} must be at least 0 and below 1")
        if self.num_held_out < 2 * len(LABELS[self.labels]):
            raise ConfigError(f"num_held_out={self.num_held_out} is too few to measure on; use at least 4")
        if not self.draft_cost > 0:
            raise ConfigError(f"draft_cost={self.draft_cost} must be above 0: a draft token's time in target calls")

    @property
    def temperatures(self) -> tuple[float, ...]:
        return LABELS[self.labels]


class HeadRecipe(ABC):
    """How one kind of head reads proposals."""

    def __init__(self, head: PairHead, max_draft_tokens: int):
        self.head, self.max_draft_tokens = head, max_draft_tokens

    def initialise(self) -> None:  # noqa: B027 - optional hook
        """Set the initial weights of training."""

    @abstractmethod
    def loss(self, head: torch.nn.Module, proposals: Proposals, accepted: Tensor) -> Tensor:
        """accepted: [rows, columns] bool, drawn from `proposals.acceptance`."""

    @abstractmethod
    def log_acceptance(self, proposals: Proposals, accepted: Tensor) -> Tensor:
        """The head's prediction, [rows, columns] float32."""


class AcceptanceHeadRecipe(HeadRecipe):
    """SpecDec++, section 3.3: loss = sum[w (1 - a)(-log P0) + a (-log P1)] / sum[w (1 - a) + a]."""

    head: AcceptanceHead

    @torch.no_grad()
    def initialise(self) -> None:
        """Start by predicting the drafter's own probability of the token; training learns corrections to it."""
        for parameter in self.head.blocks.parameters():
            parameter[-NUM_NUMBERS:] = 0
        self.head.out.weight.zero_()
        self.head.out.weight[:, -4:-2] = torch.tensor([[-0.5, 0.5], [0.5, -0.5]])  # log q and log(1 - q)
        self.head.out.bias.copy_(torch.tensor([0.0, -math.log(self.head.rejection_weight)]))

    def loss(self, head: torch.nn.Module, proposals: Proposals, accepted: Tensor) -> Tensor:
        log_0, log_1 = head(proposals.hidden, proposals.statistics).log_softmax(-1).unbind(-1)
        a, w = proposals.acceptance, self.head.rejection_weight
        terms = -(w * (1 - a) * log_0 + a * log_1)
        weights = w * (1 - a) + a
        return (terms * proposals.counted).sum() / (weights * proposals.counted).sum().clamp(min=1e-6)

    def log_acceptance(self, proposals: Proposals, accepted: Tensor) -> Tensor:
        return self.head.log_acceptance(proposals.hidden, proposals.statistics)


class DiscoRecipe(HeadRecipe):
    """Binary cross-entropy at the positions where decoding would draft."""

    head: Disco

    def loss(self, head: torch.nn.Module, proposals: Proposals, accepted: Tensor) -> Tensor:
        places, drafted = draft_places(accepted, proposals.counted, self.max_draft_tokens)
        logits = head(self.head.features(proposals.logits, places))
        losses = F.binary_cross_entropy_with_logits(logits, proposals.acceptance, reduction="none")
        return (losses * drafted).sum() / drafted.sum().clamp(min=1)

    def log_acceptance(self, proposals: Proposals, accepted: Tensor) -> Tensor:
        places, _ = draft_places(accepted, proposals.counted, self.max_draft_tokens)
        return self.head.log_acceptance(proposals.logits, places)


def recipe_of(head: PairHead, max_draft_tokens: int) -> HeadRecipe:
    kind = AcceptanceHeadRecipe if isinstance(head, AcceptanceHead) else DiscoRecipe
    return kind(head, max_draft_tokens)


def train_head(
    head: PairHead,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Prompts,
    data: HeadData,
    config: TrainConfig,
    out: Path,
    accelerator: Accelerator,
    on_progress: Callable[[int], None] | None = None,
) -> PairHead:
    """Train `head` for the pair and save it in `out`, with its measurements on held-out texts.

    A killed run resumes from its last checkpoint when it is started again with the same arguments; its files are in
    `out/<kind>_training` until it ends, and its losses stay. on_progress: called with texts just written.

    Raises ConfigError if `out` already holds such a head.
    """
    check_free(out, head.kind)
    work = out / f"{head.kind}_training"
    target, draft = (model.to(accelerator.device).eval() for model in (target, draft))
    training, held_out = own_texts(target, prompts, data, config.seed, work, accelerator, on_progress)
    recipe = recipe_of(head, data.max_draft_tokens)
    recipe.initialise()

    def loss_of(module: torch.nn.Module, step: TrainStep) -> Tensor:
        batch = training.batch(step.index * data.batch_rows, data.batch_rows).to(step.device)
        proposals, accepted = proposals_at(target, draft, batch, data, [config.seed, 2, step.shard])
        with torch.autocast(step.device.type, enabled=False):
            return recipe.loss(module, proposals, accepted)

    settings = {"data": as_json(asdict(data)), "head": head.shape, "prompts": prompts.digest}
    record = train(head, loss_of, config, work, accelerator, settings)
    head.to(accelerator.device).eval()
    if accelerator.is_main_process:
        measured = measure(recipe, target, draft, held_out, data)
        head.trained_for(target, draft, {**asdict(record), "held_out": measured})
        head.save(out)
    finish(work, accelerator)
    return head


def check_free(out: Path, kind: str) -> None:
    if (out / f"{kind}.json").exists():
        raise ConfigError(f"{str(out)!r} already holds a trained {kind}; choose another --out, or delete {kind}.json")


def own_texts(
    target: PreTrainedModel,
    prompts: Prompts,
    data: HeadData,
    seed: int,
    work: Path,
    accelerator: Accelerator,
    on_progress: Callable[[int], None] | None,
) -> tuple[Pool, Pool]:
    """This process's share of the texts to train on, and the held-out texts, which all processes write alike."""
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    path = work / f"{rank}-{POOL}"
    num_mine = max(data.num_texts // num_processes, len(data.temperatures))
    if path.exists():
        pool = Pool.load(path)
    else:
        wanted = prompts.get(0, data.num_held_out) + prompts.get(data.num_held_out + rank * num_mine, num_mine)
        writings = [Writing(data.num_new_tokens, temperature, data.write_batch) for temperature in data.temperatures]
        pool = fill_pool(target, wanted, writings, seed, on_progress)
        pool.save(path)
    n = data.num_held_out
    if len(pool) != n + num_mine:
        raise InputError(f"{str(path)!r} is from a run with other settings; delete it or choose another folder")
    return Pool(pool.token_ids[n:], pool.counted[n:]), Pool(pool.token_ids[:n], pool.counted[:n])


def proposals_at(
    target: PreTrainedModel, draft: PreTrainedModel, batch: Any, data: HeadData, seeds: Sequence[int]
) -> tuple[Proposals, Tensor]:
    """Proposals for a batch that begins at a multiple of the number of temperatures, and which of them are accepted."""
    device = batch.token_ids.device
    generator = torch.Generator(device).manual_seed(int(np.random.SeedSequence(list(seeds)).generate_state(1)[0]))
    rows = torch.arange(len(batch.token_ids), device=device) % len(data.temperatures)
    is_sampled = torch.tensor(data.temperatures, device=device)[rows] > 0
    proposals = propose_everywhere(target, draft, batch, is_sampled, generator, data.mix_share)
    draws = torch.rand(proposals.acceptance.shape, generator=generator, device=device)
    return proposals, draws < proposals.acceptance


@torch.no_grad()
def measure(
    recipe: HeadRecipe, target: PreTrainedModel, draft: PreTrainedModel, held_out: Pool, data: HeadData
) -> dict[str, Any]:
    """How good the predictions are on held-out texts of each kind, and what stopping by them gains."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    width = max(data.batch_rows // len(data.temperatures), 1) * len(data.temperatures)
    plain = HeadData(**{**asdict(data), "mix_share": 0.0})
    for first in range(0, len(held_out) // width * width or len(held_out), width):
        batch = held_out.batch(first, min(width, len(held_out))).to(target.device)
        proposals, accepted = proposals_at(target, draft, batch, plain, [0, 3, first])
        predicted = recipe.log_acceptance(proposals, accepted).exp()
        for row, counted in enumerate(proposals.counted):
            kind = "greedy" if data.temperatures[row % len(data.temperatures)] == 0 else "sampled"
            values = found.setdefault(kind, {"acceptance": [], "accepted": [], "predicted": [], "top_prob": []})
            values["acceptance"].append(proposals.acceptance[row][counted].double().cpu().numpy())
            values["accepted"].append(accepted[row][counted].cpu().numpy())
            values["predicted"].append(predicted[row][counted].double().cpu().numpy())
            values["top_prob"].append(proposals.statistics[row][counted][:, 0].exp().double().cpu().numpy())
    return {kind: describe(values, kind, data.draft_cost) for kind, values in found.items()}


def describe(values: dict[str, list[np.ndarray]], kind: str, draft_cost: float) -> dict[str, Any]:
    joined = {name: np.concatenate(parts) for name, parts in values.items()}
    described: dict[str, Any] = {
        "tokens": len(joined["accepted"]),
        "acceptance": float(joined["acceptance"].mean()),
        "log_loss": log_loss(joined["acceptance"], joined["predicted"]),
        "log_loss_of_constant": log_loss(
            joined["acceptance"], np.full_like(joined["predicted"], joined["acceptance"].mean())
        ),
        "log_loss_of_draft_probability": log_loss(joined["acceptance"], joined["top_prob"]),
        "calibration": calibration(joined["acceptance"], joined["predicted"]),
    }

    if kind == "greedy":
        traces = [
            Trace(accepted, predicted, top)
            for accepted, predicted, top in zip(
                values["accepted"], values["predicted"], values["top_prob"], strict=True
            )
        ]
        described["draft_cost"] = draft_cost
        described["rules"] = compare_rules(traces, draft_cost)

    return described


def log_loss(acceptance: np.ndarray, predicted: np.ndarray) -> float:
    """Cross-entropy of the predicted with the actual probability of acceptance, nats per token."""
    p = np.clip(predicted, 1e-6, 1 - 1e-6)
    return float(-(acceptance * np.log(p) + (1 - acceptance) * np.log(1 - p)).mean())


def calibration(acceptance: np.ndarray, predicted: np.ndarray, num_bins: int = 10) -> list[dict[str, float]]:
    """Predicted and actual acceptance in bins of the prediction; empty bins are left out."""
    index = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    return [
        {
            "predicted": float(predicted[index == i].mean()),
            "actual": float(acceptance[index == i].mean()),
            "tokens": int((index == i).sum()),
        }
        for i in range(num_bins)
        if (index == i).any()
    ]
