"""`specdec check --prompts`: our decoding against plain greedy, for every combination of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import typer
from transformers import PreTrainedTokenizerBase

from specdec.check.equivalence import EquivalenceReport, check_matrix
from specdec.check.referee import TIE_MULTIPLE
from specdec.check.ways import PLAIN, Way, axis_values, ways, whole_numbers
from specdec.cli.common import (
    DRAFT_MODEL,
    LOOK_AHEAD,
    Arithmetic,
    Chat,
    Models,
    Reports,
    load_models,
    print_table,
    say_ignored,
    stage_bars,
)
from specdec.drafters.registry import listed
from specdec.errors import DrafterError
from specdec.files.junit import Case
from specdec.files.loading import read_prompts
from specdec.limits import MAX_DRAFT_TOKENS


@dataclass(frozen=True)
class Choice:
    """The values of each axis, as typed. axes: those of `ways.AXES`, None where not given."""

    draft: str | None
    drafter: str | None
    batch_size: str
    num_speculative_tokens: str
    axes: Mapping[str, str | None] = field(default_factory=dict)
    look_ahead: str | None = None

    def drafters(self) -> tuple[str, ...]:
        """Raises DrafterError if no drafter is chosen, or if names and folders of drafters do not go together."""
        given = {DRAFT_MODEL: self.draft, LOOK_AHEAD: self.look_ahead}
        names = tuple(name for name, folder in given.items() if folder is not None)
        if not names and self.drafter is None:
            raise DrafterError("nothing to check against plain decoding; pass --draft FOLDER or --drafter NAME")
        if self.drafter is not None:
            names = tuple(listed("--drafter", self.drafter))
        is_used = any(DRAFT_MODEL in name.split("+") for name in names)
        if self.draft is not None and not is_used:
            raise DrafterError(
                f"--draft {self.draft} and --drafter {self.drafter} both choose a drafter; pass one of them, or both "
                f"as --drafter {DRAFT_MODEL},{self.drafter}"
            )
        if self.draft is None and is_used:
            raise DrafterError(
                f"drafter={DRAFT_MODEL!r} needs arguments; pass --draft FOLDER, or write {DRAFT_MODEL}:folder=FOLDER"
            )
        return names

    def ways(self) -> list[Way]:
        ks = whole_numbers("--num-speculative-tokens", self.num_speculative_tokens, MAX_DRAFT_TOKENS)
        return ways(self.drafters(), ks, whole_numbers("--batch-size", self.batch_size), axis_values(self.axes))

    def load(self, target: str, device: str, dtype: str | None, chat: Chat) -> Models:
        named = [name for name in self.drafters() if name not in (DRAFT_MODEL, PLAIN)]
        models = load_models(target, self.draft, named, device, dtype, self.look_ahead)
        return replace(models, is_chat=chat.is_chat, system=chat.system)


def run(
    target: str,
    prompts: Path,
    choice: Choice,
    max_new_tokens: int,
    arithmetic: Arithmetic,
    reports: Reports,
    allow_ties: bool,
    limit: int | None,
    dtype: str | None,
    device: str,
    chat: Chat,
) -> bool:
    """Check, print, write the reports. Returns whether the exit status is 0."""
    cells = choice.ways()
    texts = read_prompts(prompts, limit)
    models = choice.load(target, device, dtype, chat)
    token_ids = models.encode(texts)
    totals = {"plain": len(texts), "speculative": len(texts) * len(cells)}

    with arithmetic.swapped(models.target), stage_bars(totals) as on_progress:
        found = check_matrix(
            models.target, token_ids, cells, models.drafters(), max_new_tokens, on_progress, arithmetic.exact
        )

    say_ignored(found[0].ignored_settings)
    if len(cells) == 1:
        print_report(found[0], models.tokenizer)
    else:
        print_matrix(cells, found, models.tokenizer)

    passed = [report.equivalent or (allow_ties and report.only_ties) for report in found]

    origin = {
        "target": target,
        "draft": choice.draft,
        "prompts": str(prompts),
        "limit": limit,
        **chat._asdict(),
        **asdict(arithmetic),
    }
    named = [{"way": cell.label, **report.to_dict()} for cell, report in zip(cells, found, strict=True)]
    reports.write_json({**(named[0] if len(named) == 1 else {"equivalent": all(passed), "cells": named}), **origin})

    cases = [junit_case(cell, report, ok) for cell, report, ok in zip(cells, found, passed, strict=True)]
    reports.write_junit("specdec check", cases)
    return all(passed)


def junit_case(cell: Way, report: EquivalenceReport, passed: bool) -> Case:
    outcome = "passed" if report.equivalent else "tie" if passed else "failed"
    lines = [f"prompt {d.prompt}, position {d.position}: expected {d.expected_token_id}, got {d.actual_token_id}, "
             f"margin {d.margin}, {d.kind}" for d in report.divergences]  # fmt: skip
    message = f"{report.num_equal}/{report.num_prompts} prompts equal"
    return Case(cell.label, outcome, message, "\n".join(lines))  # type: ignore[arg-type]


def print_matrix(cells: Sequence[Way], found: Sequence[EquivalenceReport], tokenizer: PreTrainedTokenizerBase) -> None:
    """One line per cell, then the divergences of the cells that have any."""
    columns = ["way", "batch", "K", "equal", "ties", "bugs", "tokens per step"]
    rows = [
        [
            cell.name,
            str(cell.batch_size),
            str(cell.num_speculative_tokens or "-"),
            f"{report.num_equal}/{report.num_prompts}",
            str(report.num_ties),
            str(len(report.divergences) - report.num_ties),
            f"{report.speculation.mean_acceptance_length:.2f}",
        ]
        for cell, report in zip(cells, found, strict=True)
    ]

    print_table(columns, rows)

    for cell, report in zip(cells, found, strict=True):
        if report.divergences:
            typer.echo(f"\n{cell.label}:")
            print_divergences(report, tokenizer)

    first = found[0]
    num_right = sum(report.equivalent for report in found)
    typer.echo(f"\n{num_right}/{len(found)} ways equal plain greedy for all {first.num_prompts} prompts, ", nl=False)
    typer.echo(f"{first.max_new_tokens} new tokens per prompt, {first.dtype} on {first.device}")


def print_report(report: EquivalenceReport, tokenizer: PreTrainedTokenizerBase) -> None:
    """The verdict, the divergences and the acceptance of one way."""
    typer.echo(f"{report.num_equal}/{report.num_prompts} prompts equal, token for token")
    if report.divergences:
        typer.echo(f"{report.num_ties} ties, {len(report.divergences) - report.num_ties} bugs:")
        print_divergences(report, tokenizer)
        if report.margin_dtype is not None:
            note = f" ({report.margin_note})" if report.margin_note else ""
            typer.echo(
                f"margins in {report.margin_dtype}{note}; a tie is within {TIE_MULTIPLE} times noise or rounding"
            )
    typer.echo(
        f"{report.drafter}, {report.num_speculative_tokens} draft tokens, batches of {report.batch_size}, "
        f"{report.max_new_tokens} new tokens per prompt, {report.dtype} on {report.device}"
    )
    typer.echo(f"mean acceptance length {report.speculation.mean_acceptance_length:.2f}, ", nl=False)
    typer.echo(f"draft acceptance rate {report.speculation.draft_acceptance_rate:.2f}")


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
