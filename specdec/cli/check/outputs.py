"""`specdec check --outputs`: certify what any engine wrote."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer
from transformers import PreTrainedTokenizerBase

from specdec.check.certify import BUG, EQUAL, TIE, Certificate, RowVerdict, certify
from specdec.check.outputs import read_outputs
from specdec.cli.common import Arithmetic, Reports, load_models, print_table, say_ignored, stage_bars
from specdec.files.junit import Case
from specdec.network.base import vocab_size_of

MAX_LISTED = 20
REASONS = {
    "token": "another token",
    "ends_early": "ends early",
    "too_long": "too long",
    "behind_end": "goes on after its end",
}


def run(
    target: str,
    outputs: Path,
    max_new_tokens: int | None,
    arithmetic: Arithmetic,
    reports: Reports,
    dtype: str | None,
    device: str,
) -> bool:
    """Certify, print, write the reports. Returns whether the exit status is 0."""
    models = load_models(target, None, [], device, dtype)
    positions = getattr(models.target.config.get_text_config(decoder=True), "max_position_embeddings", None)
    rows = read_outputs(outputs, models.tokenizer, vocab_size_of(models.target), positions)
    with arithmetic.oracle(models.target), stage_bars({"certifying": len(rows)}) as on_progress:
        found = certify(models.target, rows, max_new_tokens, models.tokenizer, on_progress)
    say_ignored(found.ignored_settings)
    print_certificate(found, models.tokenizer)
    origin = {"target": target, "outputs": str(outputs), **asdict(arithmetic)}
    reports.write_json({**found.to_dict(), **origin})
    reports.write_junit("specdec check --outputs", [junit_case(row) for row in found.rows])
    return found.certified


def junit_case(row: RowVerdict) -> Case:
    outcome = {EQUAL: "passed", TIE: "tie", BUG: "failed"}[row.kind]
    return Case(row.place, outcome, describe(row), describe(row))  # type: ignore[arg-type]


def describe(row: RowVerdict) -> str:
    found = row.finding
    if found is None:
        return ""
    margin = "" if found.margin is None else f", margin {found.margin:.3g}, rounding explains {found.limit:.3g}"
    return (
        f"{row.kind} at position {found.position}: {REASONS[found.reason]}, expected {found.expected_token_id}, "
        f"got {found.actual_token_id}{margin}"
    )


def print_certificate(found: Certificate, tokenizer: PreTrainedTokenizerBase) -> None:
    counts = ", ".join(f"{found.count(kind)} {kind}" for kind in (EQUAL, TIE, BUG))
    typer.echo(f"{len(found.rows)} rows: {counts}")
    marked = [row for kind in (BUG, TIE) for row in found.rows if row.kind == kind]
    if marked:
        print_rows(marked[:MAX_LISTED], tokenizer)
        if len(marked) > MAX_LISTED:
            typer.echo(f"and {len(marked) - MAX_LISTED} more; --json OUT lists all")
    num_tokens = sum(row.num_tokens for row in found.rows)
    typer.echo(
        f"{num_tokens} tokens in {found.seconds:.1f} s, at most {found.max_new_tokens} per row, {found.dtype} on "
        f"{found.device}"
    )
    if found.rounding is not None:
        note = f" ({found.margin_note})" if found.margin_note else ""
        typer.echo(f"margins in {found.margin_dtype}{note}; rounding moves a margin by {found.rounding:.2g} on average")


def print_rows(rows: list[RowVerdict], tokenizer: PreTrainedTokenizerBase) -> None:
    def named(token: int | None) -> str:
        return "-" if token is None else f"{token} {tokenizer.decode([token])!r}"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    table = [
        [
            row.place.partition(", ")[2] or str(row.index),
            row.kind,
            str(found.position),
            REASONS[found.reason],
            named(found.expected_token_id),
            named(found.actual_token_id),
            number(found.margin),
            number(found.limit),
        ]
        for row in rows
        if (found := row.finding) is not None
    ]
    print_table(["row", "kind", "position", "what", "expected", "actual", "margin", "tie up to"], table)
