"""`specdec train acceptance-head` and `specdec train disco`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli.common import Count, DeviceOption, Folder, TargetOption
from specdec.cli.train.common import (
    BatchRowsOption,
    CheckpointEveryOption,
    LearningRateOption,
    OptionalTextOption,
    OutOption,
    PrecisionOption,
    PromptsOption,
    PromptTokensOption,
    SeedOption,
    StepsOption,
    WriteBatchOption,
    load_pair,
    prompts_of,
    train_config,
    writing_bar,
)
from specdec.limits import MAX_DRAFT_TOKENS

if TYPE_CHECKING:
    from specdec.drafters.training.heads.recipe import HeadData
    from specdec.drafters.training.trainer import TrainConfig
    from specdec.policies.heads.files import PairHead

DraftOption = Annotated[str, Folder(help="The draft model's checkpoint; it stays unchanged.")]
TextsOption = Annotated[int, Count(help="Texts that the target writes to train on.")]
NewTokensOption = Annotated[int, Count(help="Tokens that the target writes per text.")]
HeldOutOption = Annotated[int, Count(help="Additional texts, to measure on.")]
LabelsOption = Annotated[
    str,
    typer.Option(metavar="KIND", help="The kind of decoding the head is for: greedy, sampled (temperature 1) or both."),
]
MixOption = Annotated[
    float, typer.Option(metavar="SHARE", help="Share of draft tokens mixed into the text that the drafter reads.")
]
DraftCostOption = Annotated[
    float, typer.Option(metavar="COST", help="A draft token's time in target calls, for the report on held-out texts.")
]


def acceptance_head(
    target: TargetOption,
    draft: DraftOption,
    out: OutOption,
    text: OptionalTextOption = None,
    prompts: PromptsOption = None,
    prompt_tokens: PromptTokensOption = 128,
    texts: TextsOption = 4096,
    new_tokens: NewTokensOption = 192,
    held_out: HeldOutOption = 128,
    labels: LabelsOption = "both",
    mix_share: MixOption = 0.0,
    rejection_weight: Annotated[
        float, typer.Option(metavar="W", help="How much more a rejection counts than an acceptance.")
    ] = 1.0,
    blocks: Annotated[int, Count(help="Residual blocks.")] = 3,
    steps: StepsOption = 2000,
    batch_rows: BatchRowsOption = 32,
    write_batch: WriteBatchOption = 64,
    learning_rate: LearningRateOption = 1e-3,
    draft_cost: DraftCostOption = 0.12,
    checkpoint_every: CheckpointEveryOption = 500,
    seed: SeedOption = 0,
    precision: PrecisionOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Train SpecDec++'s acceptance head for a draft model.

    The target continues prompts; the head learns from the drafter's hidden state how likely the target is to accept
    each token. Only the head is trained. Use it with length_policy="acceptance_head".
    """
    from specdec.drafters.training.heads.recipe import HeadData
    from specdec.policies.heads.acceptance_head import AcceptanceHead

    data = HeadData(texts, held_out, new_tokens, labels, mix_share, batch_rows, write_batch, draft_cost=draft_cost)
    config = train_config(steps, learning_rate, checkpoint_every, seed, precision)

    def build(hidden_size: int) -> AcceptanceHead:
        return AcceptanceHead(hidden_size, blocks, rejection_weight)

    run(target, draft, text, prompts, prompt_tokens, out, AcceptanceHead.kind, build, data, config, device)


def disco(
    target: TargetOption,
    draft: DraftOption,
    out: OutOption,
    text: OptionalTextOption = None,
    prompts: PromptsOption = None,
    prompt_tokens: PromptTokensOption = 128,
    texts: TextsOption = 2048,
    new_tokens: NewTokensOption = 192,
    held_out: HeldOutOption = 128,
    labels: LabelsOption = "both",
    max_draft_tokens: Annotated[
        int, Count(max=MAX_DRAFT_TOKENS, help="The longest draft of the decoding it is trained for.")
    ] = 20,
    top_k: Annotated[int, Count(help="How many of the drafter's largest probabilities the classifier sees.")] = 10,
    steps: StepsOption = 1000,
    batch_rows: BatchRowsOption = 32,
    write_batch: WriteBatchOption = 64,
    learning_rate: LearningRateOption = 3e-3,
    draft_cost: DraftCostOption = 0.12,
    checkpoint_every: CheckpointEveryOption = 500,
    seed: SeedOption = 0,
    precision: PrecisionOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Train DISCO's classifier for a draft model.

    It predicts from the drafter's largest probabilities, their entropy and the position in the draft whether the target
    accepts a token. Only the classifier is trained. Use it with length_policy="disco".
    """
    from specdec.drafters.training.heads.recipe import HeadData
    from specdec.policies.heads.disco import Disco

    data = HeadData(
        texts,
        held_out,
        new_tokens,
        labels,
        batch_rows=batch_rows,
        write_batch=write_batch,
        max_draft_tokens=max_draft_tokens,
        draft_cost=draft_cost,
    )
    config = train_config(steps, learning_rate, checkpoint_every, seed, precision)

    def build(hidden_size: int) -> Disco:
        return Disco(top_k)

    run(target, draft, text, prompts, prompt_tokens, out, Disco.kind, build, data, config, device)


def run(
    target: str,
    draft: str,
    text: list[Path] | None,
    prompts: Path | None,
    prompt_tokens: int,
    out: Path,
    kind: str,
    build: Any,
    data: HeadData,
    config: TrainConfig,
    device: str,
) -> None:
    """build: makes an untrained head from the drafter's hidden size."""
    import torch

    from specdec.drafters.training.cards import command_line, write_head_card
    from specdec.drafters.training.heads.recipe import check_free, train_head
    from specdec.drafters.training.trainer import make_accelerator

    check_free(out, kind)
    pair = load_pair(target, draft, device, config)
    source = prompts_of(text, prompts, prompt_tokens, pair, config.seed)
    torch.manual_seed(config.seed)
    head: PairHead = build(pair.draft.config.get_text_config(decoder=True).hidden_size)
    accelerator = make_accelerator(pair.target.device)
    with writing_bar(data.num_texts + data.num_held_out, accelerator.is_main_process) as on_progress:
        train_head(head, pair.target, pair.draft, source, data, config, out, accelerator, on_progress)
    if accelerator.is_main_process:
        path = write_head_card(head, out, command_line())
        report(head, path)


def report(head: Any, card: Path) -> None:
    for kind, found in head.recipe["held_out"].items():
        typer.echo(
            f"held-out {kind} text: acceptance {found['acceptance']:.3f}, log loss {found['log_loss']:.3f} "
            f"(by the drafter's own probability {found['log_loss_of_draft_probability']:.3f})"
        )
        for rule, values in found.get("rules", {}).items():
            typer.echo(f"  {rule}: {values['gain']:+.1%} over the best fixed K, setting {values['setting']:g}")
    typer.echo(f"card: {card}")
