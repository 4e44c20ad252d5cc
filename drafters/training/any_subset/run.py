"""A whole training run of an any-subset model: train, save, validate the saved model, write the card."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, XLNetLMHeadModel

from specdec.drafters.training.any_subset.recipe import (
    AnySubsetLoss,
    AnySubsetStep,
    MaskRecipe,
    draft_acceptance,
    evenly_spaced,
    validate,
)
from specdec.drafters.training.checkpoint import written_whole
from specdec.drafters.training.data import TokenStream
from specdec.drafters.training.trainer import TrainConfig, as_json, finish, make_accelerator, train
from specdec.errors import InputError
from specdec.files.loading import LOADING_ERRORS, first_line
from specdec.network.any_subset.model import XLNet

HELD_OUT_ROWS = 256

CARD = """# Any-subset model

An XLNet that fills in any positions of a text: p(token | any set of the others), trained on the joint density under
lattice orders. {parameters:,} parameters, texts of up to {positions} tokens, mask token {mask!r} (id {mask_id}). Use it
with `specdec.infill`.

    {command}

Losses are in nats per hidden token. `held-out loss`: of the joint density, by kind of mask and share of hidden tokens;
`draft acceptance`: at 95 % hidden, the chance that a draft made 1, 2, ... ranks ahead is accepted if those before it
were.

```json
{record}
```
"""


@dataclass
class AnySubsetRun:
    model: XLNetLMHeadModel
    tokenizer: PreTrainedTokenizerBase
    recipe: MaskRecipe
    config: TrainConfig
    batch_rows: int
    row_tokens: int
    compile: bool = False

    def train(
        self,
        tokens: np.ndarray,
        held_out: np.ndarray | None,
        out: Path,
        device: torch.device,
        notes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write model, tokenizer and card into `out`, the run's state and losses into `out`/training.

        Returns the card's record. notes: additional entries for it.
        """
        module = AnySubsetLoss(self.model)
        if self.compile:
            module.compile()
        step = AnySubsetStep(TokenStream(tokens, self.row_tokens, self.config.seed), self.batch_rows, self.recipe)

        accelerator = make_accelerator(device)
        settings = {"batch_rows": self.batch_rows, "row_tokens": self.row_tokens, **as_json(asdict(self.recipe))}
        work = out / "training"

        done = train(module, step, self.config, work, accelerator, settings)
        record = {
            "first loss": done.first_loss,
            "last loss": done.last_loss,
            "training tokens": len(tokens),
            "settings": done.settings,
            **(notes or {}),
        }

        if accelerator.is_main_process:
            record |= save(self.model, self.tokenizer, out, held_out_rows(held_out, self.row_tokens))
            write_card(self.model, self.tokenizer, record, out)

        finish(work, accelerator)
        return record


def held_out_rows(tokens: np.ndarray | None, row_tokens: int) -> Tensor | None:
    """Rows that cover the held-out text evenly, [rows, row_tokens] int64."""
    if tokens is None:
        return None
    if len(tokens) < row_tokens:
        raise InputError(f"the held-out text has {len(tokens)} tokens, a row needs {row_tokens}; add text")
    starts = evenly_spaced(len(tokens), min(HELD_OUT_ROWS, len(tokens) // row_tokens), row_tokens)
    return torch.from_numpy(np.stack([tokens[start : start + row_tokens] for start in starts]).astype(np.int64))


def save(model: XLNetLMHeadModel, tokenizer: PreTrainedTokenizerBase, out: Path, rows: Tensor | None) -> dict[str, Any]:
    """Write the model in bfloat16, and measure it with the weights as written."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if rows is None:
        return {}
    model.float()
    module, rows = AnySubsetLoss(model), rows.to(model.device)
    return {"held-out loss": validate(module, rows), "draft acceptance": draft_acceptance(module, rows, 0.95)}


def write_card(model: XLNetLMHeadModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], out: Path) -> None:
    program = ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).name]
    command = shlex.join([*program, *sys.argv[1:]])
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        positions=model.config.max_positions,
        mask=tokenizer.mask_token,
        mask_id=model.config.mask_token_id,
        command=command,
        record=json.dumps(record, indent=1),
    )
    with written_whole(out / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def load_xlnet(folder: Path, row_tokens: int | None = None) -> XLNetLMHeadModel:
    """An XLNet checkpoint in float32; `row_tokens` becomes the longest text it fills if its config names none.

    Raises InputError for a checkpoint that cannot be read, UnsupportedModelError for another kind of model.
    """
    try:
        model = XLNetLMHeadModel.from_pretrained(folder, dtype=torch.float32)
    except LOADING_ERRORS as error:
        raise InputError(f"{str(folder)!r} cannot be loaded as an XLNet: {first_line(error)}") from error
    XLNet(model)
    if getattr(model.config, "max_positions", None) is None:
        model.config.max_positions = row_tokens
    return model
