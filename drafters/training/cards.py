"""Cards of trained parts: how they were trained, with which command, and how well they do."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from specdec.drafters.training.checkpoint import written_whole
from specdec.drafters.training.trainer import TrainRecord
from specdec.files.trained import Trained
from specdec.policies.heads.files import PairHead
from specdec.version import __version__

HEAD_CARD = """# {title}

{what} It belongs to one target and one drafter, whose fingerprints are in `{kind}.json`, and refuses others. It has
{parameters:,} parameters; nothing else was trained.

    {command}

Labels: {labels}.
`held_out` is on texts that it was not trained on. `log_loss` is in nats per token, next to that of a constant and of
the drafter's own probability as the prediction; `rules` compares ways to stop a draft by simulation at the given draft
cost, each at its best setting, chosen on half of the texts and measured on the other.

```json
{record}
```
"""

ABOUT = {
    "acceptance_head": (
        "Acceptance head",
        "It predicts from the drafter's hidden state and distribution how likely the target is to accept the token "
        'just drafted (SpecDec++); use it with `length_policy="acceptance_head"`.',
    ),
    "disco": (
        "DISCO classifier",
        "It predicts from the drafter's largest probabilities, their entropy and the position in the draft whether the "
        'target accepts the token just drafted; use it with `length_policy="disco"`.',
    ),
}
LABELS = {
    "greedy": "greedy text of the target, 1 where both argmaxes agree",
    "sampled": "sampled text of the target at temperature 1, min(1, p / q) for a sample of q",
    "both": "half greedy text (1 where both argmaxes agree), half sampled at temperature 1 (min(1, p / q))",
}


LOOK_AHEAD_CARD = """# Look-ahead embeddings

{num_tokens} embeddings of {hidden_size} numbers, and {num_helpers} before them that predict nothing ({parameters:,}
parameters), with which one target drafts for itself (PaSS): use them with `specdec generate --look-ahead FOLDER` or
`specdec.drafters.look_ahead.LookAhead.load(FOLDER)`. The target's fingerprint is in `look_ahead.json`; others are
refused. Nothing but the embeddings was trained.

    {command}

Loss: cross-entropy of embedding i at position n + i on token n + 1 + i of a text split after token n, weighted by
{decay:g}^(i-1), {num_splits} splits a row. Data: {data}.

On held-out prompts, before and after: the acceptance lengths are tokens per step in the decoder itself, the target's
own token included, greedily and at temperature 1; by position, the share of steps that accepted a guess and all before
it.

```json
{record}
```
"""


DRAFT_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [speculative-decoding, draft-model]
---
# Draft model, trained with specdec

For speculative decoding with the target that it was trained for (`specdec.generate(target, drafter=draft)`).

    {command}

Loss: {loss}. Data: {data}. AdamW (weight decay {weight_decay} on matrices, gradients clipped at
{max_grad_norm}), a linear warm-up and a cosine decay of the learning rate from {learning_rate:g}, {num_steps} steps, no
dropout.

On held-out prompts, before and after: `greedy_agreement` is the share of the target's greedy tokens that are the
draft's argmax, `sampled_acceptance` the mean of 1 - TVD over the target's samples at temperature 1, the acceptance
lengths are tokens per step in the decoder itself.

```json
{record}
```
"""

LOSSES = {
    "fkl": "KL(target || draft)",
    "rkl": "KL(draft || target)",
    "jsd": "generalised Jensen-Shannon divergence",
    "tvd": "total variation distance, 1 - acceptance",
    "ce": "next-token cross-entropy, without the target",
}


def write_draft_card(folder: Path, record: TrainRecord, measured: dict[str, Any], command: str) -> Path:
    """measured: the results of `Validation.measure` "before" and "after", or empty."""
    recipe = record.settings["distillation"]
    card = DRAFT_CARD.format(
        command=command,
        loss=LOSSES[recipe["loss"]],
        data=", ".join(f"{share:.0%} {name}" for name, share in recipe["shares"].items()),
        record=json.dumps({**environment(), **asdict(record), "held_out": measured}, indent=1),
        **{name: record.settings[name] for name in ("weight_decay", "max_grad_norm", "learning_rate", "num_steps")},
    )
    return write_text(folder / "README.md", card)


def write_head_card(head: PairHead, folder: Path, command: str) -> Path:
    title, what = ABOUT[head.kind]
    card = HEAD_CARD.format(
        title=title,
        what=what,
        kind=head.kind,
        parameters=sum(parameter.numel() for parameter in head.parameters()),
        command=command,
        labels=LABELS[head.recipe["settings"]["data"]["labels"]],
        record=json.dumps({**environment(), **head.recipe}, indent=1),
    )
    return write_text(folder / f"{head.kind}.md", card)


def write_look_ahead_card(embeddings: Trained, folder: Path, command: str) -> Path:
    recipe = embeddings.recipe["settings"]["recipe"]
    card = LOOK_AHEAD_CARD.format(
        command=command,
        parameters=sum(parameter.numel() for parameter in embeddings.parameters()),
        data=", ".join(f"{share:.0%} {name}" for name, share in recipe["shares"].items()),
        decay=recipe["decay"],
        num_splits=recipe["num_splits"],
        record=json.dumps({**environment(), **embeddings.recipe}, indent=1),
        **embeddings.shape,
    )
    return write_text(folder / f"{embeddings.kind}.md", card)


def write_text(path: Path, text: str) -> Path:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def environment() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return {
        "hardware": device,
        "specdec": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def command_line() -> str:
    """The running command, with paths cut to their last two parts, which may exist on other machines too."""
    return "specdec " + " ".join(shlex.quote(_short(argument)) for argument in sys.argv[1:])


def _short(argument: str) -> str:
    return "/".join(Path(argument).parts[-2:]) if argument.startswith("/") else argument
