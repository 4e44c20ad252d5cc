"""`specdec train`: one subcommand per recipe, and the options and steps they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.cli.common import Count, Folder, quiet_transformers, stage_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specdec.drafters.training.data import TokenStream
    from specdec.drafters.training.own_text import Prompts
    from specdec.drafters.training.trainer import TrainConfig

_text = partial(
    typer.Option,
    "--text",
    metavar="PATH",
    help="Training text: files or folders (may be repeated), .jsonl with `text`, or .npy with packed tokens.",
)
TextOption = Annotated[list[Path], _text()]
OptionalTextOption = Annotated[list[Path] | None, _text()]
PromptsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Prompts to be continued (.txt, .json, .jsonl); without it, pieces of --text."),
]
PromptTokensOption = Annotated[int, Count(help="The longest prompt cut from --text.")]
OutOption = Annotated[Path, Folder(help="Where the result goes; a run killed there is resumed.")]
StepsOption = Annotated[int, Count(help="Optimiser steps.")]
BatchRowsOption = Annotated[int, Count(help="Rows per step and process.")]
RowTokensOption = Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per row.")]
WriteBatchOption = Annotated[int, Count(help="Texts that a model writes at once.")]
LearningRateOption = Annotated[float, typer.Option(metavar="RATE", help="Peak learning rate.")]
CheckpointEveryOption = Annotated[int, Count(help="Steps between checkpoints.")]
SeedOption = Annotated[int, typer.Option(metavar="N", min=0, help="Order of the data and all random choices.")]
PrecisionOption = Annotated[
    str, typer.Option(metavar="DTYPE", help="float32, or bfloat16 for autocast over float32 weights.")
]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def train() -> None:
    """Train drafters, or heads that decide how far to draft.

    Each recipe writes losses.jsonl and checkpoints into --out and resumes a killed run from there. Several GPUs:
    `accelerate launch -m specdec train ...`.
    """


def train_config(steps: int, learning_rate: float, checkpoint_every: int, seed: int, precision: str) -> TrainConfig:
    from specdec.drafters.training.trainer import TrainConfig
    from specdec.errors import ConfigError

    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"--precision {precision!r} is unknown; use float32 or bfloat16")
    return TrainConfig(
        num_steps=steps,
        learning_rate=learning_rate,
        checkpoint_every=checkpoint_every,
        seed=seed,
        bfloat16=precision == "bfloat16",
    )


@dataclass(frozen=True)
class TrainingModel:
    """vocab_size: the tokens that training text may hold."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int


@dataclass(frozen=True)
class TrainingPair(TrainingModel):
    """vocab_size: the tokens that both models have."""

    target: PreTrainedModel
    draft: PreTrainedModel


def load_pair(target: str, draft: str, device: str, config: TrainConfig) -> TrainingPair:
    """The draft in float32, the target in the run's compute dtype."""
    from specdec.drafters.draft_model import DraftModel, vocab_size_of
    from specdec.files.loading import check_same_tokenizer, find_checkpoint, load_model, load_tokenizer, resolve_device

    place = resolve_device(device)
    folders = find_checkpoint(target, "target"), find_checkpoint(draft, "draft")
    quiet_transformers()
    tokenizer = load_tokenizer(folders[0], "target")
    check_same_tokenizer(tokenizer, folders[1])
    model = load_model(folders[0], "target", place, "bfloat16" if config.bfloat16 else "float32")
    draft_model = load_model(folders[1], "draft", place, "float32")
    DraftModel(draft_model).check(model, 1)
    return TrainingPair(tokenizer, min(vocab_size_of(model), vocab_size_of(draft_model)), model, draft_model)


def prompts_of(
    text: list[Path] | None, prompts: Path | None, prompt_tokens: int, model: TrainingModel, seed: int
) -> Prompts:
    """Prompts from --prompts if given, else from --text."""
    from specdec.drafters.training.own_text import Prompts
    from specdec.errors import InputError
    from specdec.files.loading import encode_prompts, read_prompts

    if prompts is not None:
        return Prompts(encode_prompts(model.tokenizer, read_prompts(prompts)))
    if not text:
        raise InputError("pass --text PATH or --prompts FILE: the target needs something to continue")
    return Prompts(text_of(text, prompt_tokens, model, seed), model.tokenizer("")["input_ids"], seed)


def text_of(text: list[Path] | None, row_tokens: int, model: TrainingModel, seed: int) -> TokenStream:
    from specdec.drafters.training.data import TokenStream, read_stream
    from specdec.errors import InputError

    if not text:
        raise InputError("fixed data needs a training text; pass --text PATH")
    return TokenStream(read_stream(text, model.tokenizer, model.vocab_size), row_tokens, seed)


@contextmanager
def writing_bar(num_texts: int | None, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while a model writes its texts; it appears with the first text."""
    with stage_bars({} if num_texts is None else {"writing text": num_texts}) as on_progress:
        yield lambda done: on_progress("writing text", done) if is_shown else None
