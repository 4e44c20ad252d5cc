"""`specdec train look-ahead`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli.common import Count, DeviceOption, TargetOption, print_table, quiet_transformers
from specdec.cli.train.common import (
    BatchRowsOption,
    CheckpointEveryOption,
    LearningRateOption,
    OptionalTextOption,
    OutOption,
    PrecisionOption,
    PromptsOption,
    PromptTokensOption,
    RowTokensOption,
    SeedOption,
    StepsOption,
    TrainingModel,
    WriteBatchOption,
    prompts_of,
    text_of,
    train_config,
    writing_bar,
)
from specdec.cli.train.distill import ValidationOption, held_out_prompts, shares_of
from specdec.limits import MAX_DRAFT_TOKENS

TokensOption = Annotated[int, Count(max=MAX_DRAFT_TOKENS, help="Number of look-ahead embeddings: the longest draft.")]
HelpersOption = Annotated[int, typer.Option(metavar="N", min=0, help="Embeddings before them that predict nothing.")]
SplitsOption = Annotated[int, Count(help="Positions of each row where they predict, in one forward.")]
DecayOption = Annotated[
    float,
    typer.Option(
        metavar="D",
        help="Embedding i's loss has weight D^(i-1), as its guess counts only if those before it are right.",
    ),
]
InitOption = Annotated[
    str, typer.Option(metavar="NAME", help="Start from the mean embedding of all tokens (mean) or of frequent ones.")
]
DataOption = Annotated[
    str,
    typer.Option(metavar="SOURCES", help="target (its own continuations), fixed (--text), or target=0.5,fixed=0.5."),
]
TemperaturesOption = Annotated[
    list[float],
    typer.Option("--temperature", metavar="T", help="Temperature of continuations; 0 is greedy; repeat for a mixture."),
]


def look_ahead(
    target: TargetOption,
    out: OutOption,
    text: OptionalTextOption = None,
    prompts: PromptsOption = None,
    prompt_tokens: PromptTokensOption = 48,
    num_tokens: TokensOption = 8,
    helpers: HelpersOption = 4,
    splits: SplitsOption = 32,
    decay: DecayOption = 0.8,
    init: InitOption = "frequent",
    data: DataOption = "target",
    temperature: TemperaturesOption = [0.0],  # noqa: B006 - typer copies it
    texts: Annotated[int, Count(help="Texts that the target writes.")] = 4096,
    steps: StepsOption = 2000,
    batch_rows: BatchRowsOption = 16,
    row_tokens: RowTokensOption = 192,
    write_batch: WriteBatchOption = 64,
    learning_rate: LearningRateOption = 0.4,
    validate: ValidationOption = None,
    validation_tokens: Annotated[int, Count(help="New tokens per held-out prompt.")] = 96,
    checkpoint_every: CheckpointEveryOption = 500,
    seed: SeedOption = 0,
    precision: PrecisionOption = "float32",
    compile_model: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Train embeddings with which a target drafts for itself.

    Look-ahead embeddings (PaSS): only the embeddings are trained. Use them with `--look-ahead FOLDER` or
    `drafter=LookAhead.load(FOLDER)`.
    """
    from dataclasses import asdict, replace

    from specdec.drafters.training.cards import command_line, write_look_ahead_card
    from specdec.drafters.training.look_ahead.recipe import OPTIMISER, LookAheadRecipe
    from specdec.drafters.training.look_ahead.run import Measure, check_free, train_look_ahead
    from specdec.drafters.training.trainer import finish, make_accelerator
    from specdec.files.loading import find_checkpoint, load_model, load_tokenizer, resolve_device
    from specdec.network.base import num_embeddings_of

    recipe = LookAheadRecipe(
        num_tokens,
        helpers,
        splits,
        decay,
        init,
        shares_of(data, 0.5),
        tuple(temperature),
        texts,
        batch_rows,
        row_tokens,
        write_batch,
    )
    config = replace(train_config(steps, learning_rate, checkpoint_every, seed, precision), **OPTIMISER)
    check_free(out)
    place, folder = resolve_device(device), find_checkpoint(target, "target")
    quiet_transformers()
    tokenizer = load_tokenizer(folder, "target")
    model = load_model(folder, "target", place, "bfloat16" if config.bfloat16 else "float32")
    known = TrainingModel(tokenizer, num_embeddings_of(model))
    stream = text_of(text, row_tokens, known, seed) if "fixed" in recipe.shares else None
    source = prompts_of(text, prompts, prompt_tokens, known, seed) if "target" in recipe.shares else None
    held_out = held_out_prompts(validate, known)
    accelerator = make_accelerator(place)
    measure = Measure(model, held_out, validation_tokens) if held_out and accelerator.is_main_process else None
    work = out / "training"
    num_texts = recipe.num_texts if "target" in recipe.shares else None
    with writing_bar(num_texts, accelerator.is_main_process) as on_progress:
        trained = train_look_ahead(
            model, recipe, config, work, accelerator, stream, source, compile_model, measure, on_progress
        )
    if accelerator.is_main_process:
        found = {**asdict(trained.record), "held_out": trained.measured}
        trained.embeddings.trained_for(model, found).save(out)
        report(trained.measured, write_look_ahead_card(trained.embeddings, out, command_line()))
    finish(work, accelerator)


def report(measured: dict[str, Any], card: Path) -> None:
    if measured:
        names = ["greedy_acceptance_length", "sampled_acceptance_length"]
        rows = [[name, *(f"{measured[when][name]:.3f}" for when in ("before", "after"))] for name in names]
        print_table(["held-out prompts", "before", "after"], rows)
    typer.echo(f"card: {card}")
