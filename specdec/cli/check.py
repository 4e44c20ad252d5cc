"""`specdec check`: is the speculative output the target's own, token for token?"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.cli.common import (
    BatchSizeOption,
    DeviceOption,
    DrafterOption,
    DraftOption,
    DraftTokensOption,
    DtypeOption,
    LimitOption,
    MaxNewTokensOption,
    TargetOption,
    load_models,
    print_table,
    say_ignored,
    stage_bars,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specdec.equivalence import EquivalenceReport


def check(
    target: TargetOption,
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help=".txt (a prompt per line), .json (list of strings) or .jsonl (`prompt`, or first of `turns`).",
        ),
    ],
    draft: DraftOption = None,
    drafter: DrafterOption = None,
    batch_size: BatchSizeOption = 8,
    num_speculative_tokens: DraftTokensOption = 5,
    max_new_tokens: MaxNewTokensOption = 64,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the report there.")] = None,
    allow_ties: Annotated[
        bool, typer.Option("--allow-ties", help="Succeed if all differences are numerical ties.")
    ] = False,
    limit: LimitOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Compare with transformers' plain decoding, token by token.

    Decodes every prompt with transformers' plain greedy `generate`, one at a time, then with specdec in batches. The
    first difference of each prompt is judged: `tie` if the target's margin between the two tokens, recomputed in
    float64, is within twice the measured error of a logit at that place, else `bug`. The error is the largest
    difference between logits of one-token forwards, of (K+1)-token forwards, both in this dtype, and of float64.

    Exit status: 0 if all prompts are equal (with --allow-ties: or differ by ties only), 1 if not, 2 for bad input.
    """
    from specdec.equivalence import check_equivalence
    from specdec.errors import ConfigError, DrafterError
    from specdec.loading import read_prompts

    if draft is None and drafter is None:
        raise DrafterError("nothing to check against plain decoding; pass --draft FOLDER or --drafter NAME")
    if json_path is not None and (json_path.is_dir() or not json_path.resolve().parent.is_dir()):
        raise ConfigError(f"--json {str(json_path)!r} cannot be written; pass a file in a folder that exists")
    texts = read_prompts(prompts, limit)
    models = load_models(target, draft, drafter, device, dtype)
    token_ids = models.encode(texts)
    with stage_bars({"plain": len(texts), "speculative": len(texts)}) as on_progress:
        report = check_equivalence(
            models.target,
            token_ids,
            models.drafter,
            batch_size,
            num_speculative_tokens,
            max_new_tokens,
            on_progress,
        )
    say_ignored(report.ignored_settings)
    print_report(report, models.tokenizer)
    if json_path is not None:
        origin = {"target": target, "draft": draft, "prompts": str(prompts), "limit": limit}
        command = shlex.join(["specdec", *sys.argv[1:]])
        json_path.write_text(json.dumps({**report.to_dict(), **origin, "command": command}, indent=1) + "\n")
    if not report.equivalent and not (allow_ties and report.only_ties):
        raise typer.Exit(1)


def print_report(report: EquivalenceReport, tokenizer: PreTrainedTokenizerBase) -> None:
    """The verdict, the divergences and the numbers."""
    from specdec.referee import TIE_MULTIPLE

    num_ties = sum(divergence.kind == "tie" for divergence in report.divergences)
    typer.echo(f"{report.num_equal}/{report.num_prompts} prompts equal, token for token")
    if report.divergences:
        typer.echo(f"{num_ties} ties, {len(report.divergences) - num_ties} bugs:")
        print_divergences(report, tokenizer)
        if report.margin_dtype is not None:
            note = f" ({report.margin_note})" if report.margin_note else ""
            typer.echo(
                f"margins in {report.margin_dtype}{note}; a tie is within {TIE_MULTIPLE} times noise or rounding"
            )
    typer.echo(
        f"{report.drafter}, {report.num_speculative_tokens} draft tokens, {report.max_new_tokens} new tokens, "
        f"{report.dtype} on {report.device}"
    )
    typer.echo(f"mean acceptance length {report.speculation.mean_acceptance_length:.2f}, ", nl=False)
    typer.echo(f"draft acceptance rate {report.speculation.draft_acceptance_rate:.2f}")
    typer.echo(f"plain, one by one:          {report.plain_tokens_per_second:8.1f} tokens/s")
    typer.echo(f"speculative, batches of {report.batch_size}: {report.speculative_tokens_per_second:8.1f} tokens/s")


def print_divergences(report: EquivalenceReport, tokenizer: PreTrainedTokenizerBase) -> None:
    def named(token: int | None) -> str:
        return "(ended)" if token is None else f"{token} {tokenizer.decode([token])!r}"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    columns = ["prompt", "position", "expected", "actual", "margin", "noise", "rounding", "kind"]
    rows = [
        [
            str(found.prompt),
            str(found.position),
            named(found.expected_token_id),
            named(found.actual_token_id),
            number(found.margin),
            number(found.noise_all_tokens),
            number(found.rounding),
            found.kind,
        ]
        for found in report.divergences
    ]
    print_table(columns, rows)
