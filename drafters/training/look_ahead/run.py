"""A whole training run of look-ahead embeddings, and how well they draft before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from specdec.api.generate import generate
from specdec.check.padding import left_pad
from specdec.check.settings import greedy_settings
from specdec.drafters.look_ahead import LookAhead, LookAheadEmbeddings
from specdec.drafters.training.data import TokenStream
from specdec.drafters.training.distill.recipe import OnProgress, Reader, target_texts
from specdec.drafters.training.look_ahead.recipe import LookAheadLoss, LookAheadRecipe, LookAheadStep, initialise
from specdec.drafters.training.own_text import Pool, Prompts
from specdec.drafters.training.trainer import TrainConfig, TrainRecord, as_json, train
from specdec.engine.metrics import Speculation
from specdec.errors import ConfigError, InputError

COUNTED_TOKENS = 1_000_000  # of a training text, counted to find the most frequent ones


@dataclass(frozen=True)
class TrainedEmbeddings:
    """embeddings: not yet marked or saved. measured: the results of `Measure` "before" and "after", or empty."""

    embeddings: LookAheadEmbeddings
    record: TrainRecord
    measured: dict[str, Any]


def train_look_ahead(
    target: PreTrainedModel,
    recipe: LookAheadRecipe,
    config: TrainConfig,
    work: Path,
    accelerator: Accelerator,
    text: TokenStream | None = None,
    prompts: Prompts | None = None,
    compile_module: bool = False,
    measure: Measure | None = None,
    on_progress: OnProgress | None = None,
) -> TrainedEmbeddings:
    """Train embeddings for `target`, whose weights stay unchanged.

    text: for fixed data. prompts: for the target's own text. work: see `train`. on_progress: called with texts just
    written.

    Raises ConfigError or InputError, before any work, if something does not fit.
    """
    check_target(target, recipe)
    if "fixed" in recipe.shares and text is None:
        raise InputError("fixed data needs a training text; pass --text")
    if prompts is None and set(recipe.shares) != {"fixed"}:
        raise InputError("the target's own text needs prompts; pass --text or --prompts")
    target.to(accelerator.device)
    pool = None
    if "target" in recipe.shares and prompts is not None:
        pool = target_texts(target, prompts, recipe.text, config.seed, work, accelerator, on_progress)
    embeddings = LookAheadEmbeddings(
        recipe.num_tokens, target.get_input_embeddings().weight.shape[1], recipe.num_helpers
    )
    embeddings.to(accelerator.device)
    initialise(embeddings, target, frequent_text(recipe, pool, text))
    measured = {} if measure is None else {"before": measure(embeddings)}
    module = LookAheadLoss(target, embeddings)
    if compile_module:
        module.compile()
    step = LookAheadStep(Reader(recipe.text, text, prompts, pool, target, config.seed), recipe, config.seed)
    settings = {"recipe": as_json(asdict(recipe)), "prompts": None if prompts is None else prompts.digest}
    record = train(module, step, config, work, accelerator, settings)
    if measure is not None:
        measured["after"] = measure(embeddings)
    return TrainedEmbeddings(embeddings, record, measured)


def check_free(out: Path) -> None:
    """Raise ConfigError if `out` already holds embeddings."""
    name = f"{LookAheadEmbeddings.kind}.json"
    if (out / name).exists():
        raise ConfigError(f"{str(out)!r} already holds look-ahead embeddings; choose another --out, or delete {name}")


def check_target(target: PreTrainedModel, recipe: LookAheadRecipe) -> None:
    """Raise ConfigError for texts longer than the target's positions or its sliding window."""
    config = target.config.get_text_config(decoder=True)
    longest = recipe.row_tokens + recipe.num_tokens
    for name in ("max_position_embeddings", "sliding_window"):
        limit = getattr(config, name, None)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"row_tokens={recipe.row_tokens} and {recipe.num_tokens} look-ahead tokens exceed the target's "
                f"{name}={limit}; lower row_tokens"
            )


def frequent_text(recipe: LookAheadRecipe, pool: Pool | None, text: TokenStream | None) -> Tensor | None:
    """Text whose most frequent tokens give the initial embedding; None uses all tokens of the vocabulary."""
    if recipe.init == "mean":
        return None
    if pool is not None:
        return pool.token_ids[pool.counted]
    assert text is not None
    return torch.from_numpy(np.array(text.token_ids[:COUNTED_TOKENS]))


@dataclass(frozen=True)
class Measure:
    """Measures embeddings in the decoder itself, on held-out prompts of [length] int64 token ids each."""

    target: PreTrainedModel
    prompts: list[Tensor]
    num_new_tokens: int
    batch_size: int = 16

    def __call__(self, embeddings: LookAheadEmbeddings) -> dict[str, Any]:
        """*_acceptance_length: tokens per step and row, greedily and at temperature 1. *_acceptance_by_position: entry
        i, the share of steps that accepted guess i + 1 and all before it."""
        found: dict[str, Any] = {"num_prompts": len(self.prompts), "num_new_tokens": self.num_new_tokens}
        for kind in ("greedy", "sampled"):
            total = self.decode(embeddings, kind == "sampled")
            found[f"{kind}_acceptance_length"] = round(total.mean_acceptance_length, 4)
            found[f"{kind}_acceptance_by_position"] = [round(share, 4) for share in total.acceptance_by_position]
        return found

    def decode(self, embeddings: LookAheadEmbeddings, is_sampled: bool) -> Speculation:
        drafter = LookAhead(embeddings.trained_for(self.target, embeddings.recipe))
        total = Speculation()

        with greedy_settings(self.target):
            for first in range(0, len(self.prompts), self.batch_size):
                prompts = self.prompts[first : first + self.batch_size]
                ids, mask = left_pad(prompts, self.target.generation_config.pad_token_id, self.target.device)
                sampling: dict[str, Any] = {}
                if is_sampled:
                    seeds = list(range(first, first + len(prompts)))
                    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": seeds}
                generate(
                    self.target,
                    ids,
                    mask,
                    drafter=drafter,
                    num_speculative_tokens=embeddings.num_tokens,
                    max_new_tokens=self.num_new_tokens,
                    on_commit=total.add,
                    **sampling,
                )
        return total
