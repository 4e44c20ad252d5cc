"""`specdec train any-subset`: an XLNet that fills text in, from scratch or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.common import Count, DeviceOption, Folder, quiet_transformers
from specdec.cli.train.common import (
    BatchRowsOption,
    CheckpointEveryOption,
    LearningRateOption,
    OutOption,
    PrecisionOption,
    RowTokensOption,
    SeedOption,
    StepsOption,
    TextOption,
    train_config,
)


def any_subset(
    text: TextOption,
    out: OutOption,
    tokenizer: Annotated[
        str | None, Folder(help="Train from scratch with this checkpoint's tokenizer; a mask token is added to it.")
    ] = None,
    model: Annotated[str | None, Folder(help="Or continue from this XLNet checkpoint, with its own tokenizer.")] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="Text for validation, of the same kinds as --text.")
    ] = None,
    mask_rate: Annotated[
        tuple[float, float], typer.Option(metavar="LOW HIGH", help="Bounds of the share of hidden tokens.")
    ] = (0.15, 0.99),
    ramp_steps: Annotated[int, Count(help="Steps over which both bounds ramp from 0.15.")] = 500,
    span_share: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of rows that hide one block; others hide tokens anywhere.")
    ] = 0.5,
    draft_weight: Annotated[
        float, typer.Option(metavar="WEIGHT", help="Weight of the loss of marginal drafts; 0 for the joint loss alone.")
    ] = 0.5,
    d_model: Annotated[int, Count(help="Width of a new model.")] = 192,
    layers: Annotated[int, Count(help="Layers of a new model.")] = 5,
    heads: Annotated[int, Count(help="Attention heads of a new model.")] = 3,
    d_inner: Annotated[int, Count(help="Width of a new model's feed-forward layers.")] = 512,
    steps: StepsOption = 3000,
    batch_rows: BatchRowsOption = 64,
    row_tokens: RowTokensOption = 256,
    learning_rate: LearningRateOption = 1e-3,
    checkpoint_every: CheckpointEveryOption = 500,
    seed: SeedOption = 0,
    precision: PrecisionOption = "float32",
    compile_model: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Train a model that fills in any positions of a text.

    Trains on the joint density under lattice orders. Writes the model in bfloat16 with its tokenizer and a card.
    --row-tokens becomes the longest text it fills.
    """
    from specdec.drafters.training.any_subset.recipe import MaskRecipe, build_xlnet
    from specdec.drafters.training.any_subset.run import AnySubsetRun, load_xlnet
    from specdec.drafters.training.data import read_stream
    from specdec.errors import ConfigError
    from specdec.files.loading import find_checkpoint, load_tokenizer, resolve_device

    if (tokenizer is None) == (model is None):
        raise ConfigError("pass either --tokenizer FOLDER to train from scratch, or --model FOLDER to continue from")
    config = train_config(steps, learning_rate, checkpoint_every, seed, precision)
    recipe = MaskRecipe(mask_rate, ramp_steps, span_share, draft_weight)
    place = resolve_device(device)
    quiet_transformers()
    folder = find_checkpoint(str(tokenizer or model), "tokenizer" if tokenizer else "model")
    its_tokenizer = load_tokenizer(folder, "any-subset")
    if tokenizer is None:
        network = load_xlnet(folder, row_tokens)
    else:
        network = build_xlnet(its_tokenizer, d_model, layers, heads, d_inner, row_tokens, seed)
    vocab_size = network.config.vocab_size
    run = AnySubsetRun(network, its_tokenizer, recipe, config, batch_rows, row_tokens, compile_model)
    tokens = read_stream(text, its_tokenizer, vocab_size)
    validation = read_stream(held_out, its_tokenizer, vocab_size) if held_out else None
    record = run.train(tokens, validation, out, place)
    typer.echo(f"wrote {out}: loss {record['first loss']:.4f} -> {record['last loss']:.4f}")
