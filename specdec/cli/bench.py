"""`specdec bench`: every method on the same prompts, equality first, then time; reports and comparisons of records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.common import (
    Arithmetic,
    BatchInvariantOption,
    ChatOption,
    Count,
    DeviceOption,
    DraftOption,
    DtypeOption,
    ExactOption,
    LayoutOption,
    LengthPoliciesOption,
    LimitOption,
    MaxNewTokensOption,
    SystemOption,
)

app = typer.Typer(help="Measure every method on the same prompts; compare two records.", rich_markup_mode=None)
RecordArgument = Annotated[Path, typer.Argument(metavar="RECORD.json", help="Written by `specdec bench --json`.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the record there.")]
MarkdownOption = Annotated[Path | None, typer.Option(metavar="OUT", help="Write the tables there.")]
HtmlOption = Annotated[
    Path | None, typer.Option(metavar="OUT", help="Write one self-contained page with plots (needs matplotlib).")
]


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "--model", metavar="FOLDER", help="The target's checkpoint; by default the shipped pair."
        ),
    ] = None,
    draft: DraftOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Spec-Bench's .jsonl (question_id, category, turns), or .txt, .json, .jsonl as for `specdec check`; "
            "by default the first 16 of the shipped pair.",
        ),
    ] = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="none, draft_model, prompt_lookup, a folder, a+b (a where it has a draft, else b); by default all "
            "available.",
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens drafted per prompt and step, 1 to 32.")
    ] = "3,5",
    batch_size: Annotated[str, typer.Option(metavar="N,...", help="Prompts decoded together.")] = "1,8",
    layout: LayoutOption = None,
    length_policy: LengthPoliciesOption = None,
    acceptance_rates: Annotated[
        str | None, typer.Option(metavar="P,...", help="Also a drafter that is right with these probabilities.")
    ] = None,
    context_lengths: Annotated[
        str | None, typer.Option(metavar="N,...", help="Also prompts of these lengths, made of those in the file.")
    ] = None,
    max_new_tokens: MaxNewTokensOption = 64,
    max_prompt_tokens: Annotated[int | None, Count(help="Longer prompts keep their last N tokens.")] = None,
    repeats: Annotated[int, Count(help="Timed runs of every method.")] = 5,
    limit: LimitOption = None,
    peers: Annotated[
        bool, typer.Option(help="Also transformers' assisted generation and prompt lookup, at batch 1.")
    ] = True,
    stages: Annotated[bool, typer.Option(help="Also a run with a clock around the stages of a step.")] = True,
    exact: ExactOption = True,
    batch_invariant: BatchInvariantOption = False,
    json_path: JsonOption = None,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write Spec-Bench's answer files of all methods there.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")] = 0,
    chat: ChatOption = False,
    system: SystemOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Measure every method on the same prompts, in one process; or compare two such records.

    Compares every method's token ids with transformers' plain greedy decoding of each prompt alone, and times only
    methods that are equal (a peer that differs is timed and marked). Timed runs are interleaved; figures are medians
    with 95 % bootstrap intervals. docs/reading-the-report.md defines every column.

    Exit status: 0 if all our methods are equal, 1 if not, 2 for bad input.
    """
    drafters = ",".join(drafter) if drafter else None  # repeated, or as a list with commas
    if context.invoked_subcommand is not None:
        refuse_options(context)
        return
    from specdec.cli import bench_run

    axes = {"layout": layout, "length_policy": length_policy}
    wanted = bench_run.Wanted(
        target, draft, prompts, drafters, num_speculative_tokens, batch_size, axes, acceptance_rates, context_lengths,
        max_new_tokens, max_prompt_tokens, repeats, limit, peers, stages, exact, seed, chat, system,
    )  # fmt: skip
    files = bench_run.Files(json_path, markdown, html, answers).checked()
    if not bench_run.run(wanted, files, Arithmetic(exact, batch_invariant), dtype, device):
        raise typer.Exit(1)


def refuse_options(context: typer.Context) -> None:
    """Refuse options of the measurement if a subcommand runs."""
    from specdec.errors import ConfigError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"{parameter.opts[0]} has no meaning for `specdec bench {context.invoked_subcommand}`; leave it out"
            )


@app.command()
def compare(
    before: RecordArgument,
    after: RecordArgument,
    min_effect: Annotated[
        float, typer.Option(metavar="SHARE", help="The smallest slowdown that counts, as a share of the speed.")
    ] = 0.05,
    max_foreign_cores: Annotated[
        float, typer.Option(metavar="N", help="Repeats in which other processes kept more cores busy do not count.")
    ] = 0.2,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the comparison there.")] = None,
) -> None:
    """Say which methods became slower, beyond chance.

    Compares speeds as multiples of transformers' plain decoding in the same run, so a slower machine does not count as
    a regression. A method is slower if the ratio is 1 - SHARE or less and its whole bootstrap interval lies below 1.

    Exit status: 0 if none is slower and all methods that were equal still are, 1 if not, 2 for records of other work or
    if the machine was too busy to tell.
    """
    from specdec.cli import bench_run

    raise typer.Exit(bench_run.compare_files(before, after, min_effect, max_foreign_cores, json_path))


@app.command()
def report(
    record: RecordArgument,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write each plot there as SVG (needs matplotlib).")
    ] = None,
) -> None:
    """Print a record's tables; write them, the page or its plots to files."""
    from specdec.cli import bench_run

    bench_run.show(record, bench_run.Files(None, markdown, html, None, plots).checked())
