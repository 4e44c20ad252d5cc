"""`specdec train distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.cli.common import Count, DeviceOption, DraftTokens, Folder, TargetOption, print_table
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
    WriteBatchOption,
    load_pair,
    prompts_of,
    text_of,
    train_config,
    writing_bar,
)

if TYPE_CHECKING:
    from torch import Tensor

    from specdec.cli.train.common import TrainingModel

DraftOption = Annotated[str, Folder(help="The draft model to start from; it stays unchanged, --out gets the new one.")]
LossOption = Annotated[
    str, typer.Option(metavar="NAME", help="fkl, rkl, jsd or tvd; or ce, plain cross-entropy on the text.")
]
DataOption = Annotated[
    str,
    typer.Option(
        metavar="SOURCES",
        help="fixed (--text), target or on-policy (continuations by the target, by the drafter), mixed (on-policy and "
        "fixed), or shares such as target=0.5,fixed=0.5.",
    ),
]
MixShareOption = Annotated[float, typer.Option(metavar="SHARE", help="Share of on-policy rows with --data mixed.")]
TemperaturesOption = Annotated[
    list[float],
    typer.Option("--temperature", metavar="T", help="Temperature of continuations; 0 is greedy; repeat for a mixture."),
]
ValidationOption = Annotated[
    Path | None,
    typer.Option(
        "--validate", metavar="FILE", help="Held-out prompts on which acceptance is measured, before and after."
    ),
]


def distill(
    target: TargetOption,
    draft: DraftOption,
    out: OutOption,
    text: OptionalTextOption = None,
    prompts: PromptsOption = None,
    prompt_tokens: PromptTokensOption = 96,
    loss: LossOption = "fkl",
    beta: Annotated[float, typer.Option("--beta", metavar="BETA", help="Weight of the target in jsd.")] = 0.5,
    data: DataOption = "fixed",
    mix_share: MixShareOption = 0.5,
    temperature: TemperaturesOption = [1.0],  # noqa: B006 - typer copies it
    texts: Annotated[int, Count(help="Texts that the target writes, for --data target.")] = 4096,
    renew_every: Annotated[int, Count(help="Steps between renewals of the drafter's own text.")] = 8,
    own_reads: Annotated[int, Count(help="Times that each of these texts is read before the renewal.")] = 1,
    steps: StepsOption = 2000,
    batch_rows: BatchRowsOption = 32,
    row_tokens: RowTokensOption = 256,
    write_batch: WriteBatchOption = 64,
    learning_rate: LearningRateOption = 3e-4,
    validate: ValidationOption = None,
    validation_tokens: Annotated[int, Count(help="New tokens per held-out prompt.")] = 96,
    num_speculative_tokens: Annotated[int, DraftTokens(help="Tokens drafted per step when measuring.")] = 5,
    checkpoint_every: CheckpointEveryOption = 500,
    seed: SeedOption = 0,
    precision: PrecisionOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Distil a draft model from its target (DistillSpec).

    Writes a checkpoint that from_pretrained loads, with a card that says how it was trained and what it gained.
    """
    from specdec.drafters.training.cards import command_line, write_draft_card
    from specdec.drafters.training.distill.drafts import check_free, save_draft
    from specdec.drafters.training.distill.recipe import Distillation
    from specdec.drafters.training.distill.recipe import distill as train_draft
    from specdec.drafters.training.distill.validation import Validation
    from specdec.drafters.training.trainer import finish, make_accelerator

    check_free(out)
    recipe = Distillation(
        loss=loss,
        beta=beta,
        shares=shares_of(data, mix_share),
        temperatures=tuple(temperature),
        batch_rows=batch_rows,
        row_tokens=row_tokens,
        num_texts=texts,
        renew_every=renew_every,
        own_reads=own_reads,
        write_batch=write_batch,
    )
    config = train_config(steps, learning_rate, checkpoint_every, seed, precision)
    pair = load_pair(target, draft, device, config)
    stream = text_of(text, row_tokens, pair, seed) if "fixed" in recipe.shares else None
    source = prompts_of(text, prompts, prompt_tokens, pair, seed) if set(recipe.shares) != {"fixed"} else None
    held_out = held_out_prompts(validate, pair)
    accelerator = make_accelerator(pair.target.device)
    measured = {}
    validation = None
    if held_out and accelerator.is_main_process:
        validation = Validation(pair.target, held_out, validation_tokens, num_speculative_tokens, write_batch)
        measured["before"] = validation.measure(pair.draft)
    num_texts = recipe.num_texts if "target" in recipe.shares else None
    work = out / "training"
    with writing_bar(num_texts, accelerator.is_main_process) as on_progress:
        record = train_draft(pair.target, pair.draft, recipe, config, work, accelerator, stream, source, on_progress)
    if accelerator.is_main_process:
        with save_draft(pair.draft, draft, pair.tokenizer, out) as folder:
            if validation is not None:
                measured["after"] = validation.measure(pair.draft)
            write_draft_card(folder, record, measured, command_line())
        report(measured, out)
    finish(work, accelerator)


def shares_of(data: str, mix_share: float) -> dict[str, float]:
    from specdec.errors import ConfigError

    if data == "mixed":
        if not 0 < mix_share < 1:
            raise ConfigError(f"--mix-share {mix_share} must be between 0 and 1; use --data on-policy or fixed instead")
        return {"on-policy": mix_share, "fixed": 1 - mix_share}
    shares = {}
    for part in data.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share) if share else 1.0
        except ValueError:
            raise ConfigError(
                f"--data {data!r}: {share!r} is not a number; write for example target=0.5,fixed=0.5"
            ) from None
    return shares


def held_out_prompts(path: Path | None, model: TrainingModel) -> list[Tensor]:
    from specdec.files.loading import encode_prompts, read_prompts

    return [] if path is None else encode_prompts(model.tokenizer, read_prompts(path))


def report(measured: dict[str, dict[str, float]], out: Path) -> None:
    if measured:
        names = ["greedy_agreement", "sampled_acceptance", "greedy_acceptance_length", "sampled_acceptance_length"]
        before, after = measured["before"], measured["after"]
        rows = [[name, f"{before[name]:.4f}", f"{after[name]:.4f}"] for name in names]
        print_table(["held-out prompts", "before", "after"], rows)
    typer.echo(f"draft model: {out}")
