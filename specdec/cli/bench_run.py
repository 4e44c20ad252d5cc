"""`specdec bench`: turns options into a plan, and a record into printed and written output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import typer

from specdec.bench.report.compare import Comparison, compare, read_record, table
from specdec.bench.report.page import page
from specdec.bench.report.plots import plots
from specdec.bench.report.tables import all_tables, document, summary
from specdec.bench.run import BenchPlan, Subject
from specdec.bench.run import run as run_plan
from specdec.bench.suite import read_questions
from specdec.check.ways import PLAIN, axis_values, ways, whole_numbers
from specdec.cli.common import DRAFT_MODEL, LOOK_AHEAD, Arithmetic, Models, by_kind, load_models, print_table
from specdec.cli.demo import shipped_pair
from specdec.drafters.registry import DRAFTERS, drafter_class, listed
from specdec.errors import ConfigError
from specdec.limits import MAX_DRAFT_TOKENS

QUIET_CORES = 0.2
NUM_SHIPPED = 16  # of the shipped prompts, without --limit


@dataclass(frozen=True)
class Wanted:
    """What to measure, as typed. axes: those of `ways.AXES`, None where not given."""

    target: str | None
    draft: str | None
    prompts: Path | None
    drafter: str | None
    num_speculative_tokens: str
    batch_size: str
    axes: Mapping[str, str | None]
    acceptance_rates: str | None
    context_lengths: str | None
    max_new_tokens: int
    max_prompt_tokens: int | None
    repeats: int
    limit: int | None
    peers: bool
    stages: bool
    exact: bool
    seed: int
    is_chat: bool = False
    system: str | None = None

    def with_defaults(self) -> Wanted:
        """Without a target use the shipped pair, without prompts its prompts."""
        pair = shipped_pair()
        found = self
        if self.prompts is None:
            limit = NUM_SHIPPED if self.limit is None else self.limit
            found = replace(self, prompts=pair / "prompts.json", limit=limit)
        if self.target is None:
            if self.draft is not None:
                raise ConfigError(f"--draft {self.draft} without --target; pass its target too")
            found = replace(found, target=str(pair / "target"), draft=str(pair / "draft"))
        return found

    def drafters(self) -> tuple[str, ...]:
        if self.drafter is not None:
            return tuple(listed("--drafter", self.drafter))
        complete = [name for name, entry in DRAFTERS.items() if entry.is_complete and not drafter_class(name).learns]
        draft, look_ahead = by_kind(self.draft, None)
        own = [name for name, folder in ((DRAFT_MODEL, draft), (LOOK_AHEAD, look_ahead)) if folder is not None]
        return (PLAIN, *own, *complete)

    def plan(self) -> BenchPlan:
        """Raises ConfigError for values that cannot be read."""
        ks = whole_numbers("--num-speculative-tokens", self.num_speculative_tokens, MAX_DRAFT_TOKENS)
        sizes = whole_numbers("--batch-size", self.batch_size)
        lengths = () if self.context_lengths is None else whole_numbers("--context-lengths", self.context_lengths)
        rates = () if self.acceptance_rates is None else probabilities("--acceptance-rates", self.acceptance_rates)
        return BenchPlan(
            ways(self.drafters(), ks, sizes, axis_values(self.axes)), sizes, ks, self.max_new_tokens, self.repeats,
            self.seed, rates, lengths, self.peers, self.stages, self.exact, self.max_prompt_tokens,
        )  # fmt: skip

    def load(self, device: str, dtype: str | None) -> Models:
        names = self.drafters()
        if self.draft is None and any(DRAFT_MODEL in name.split("+") for name in names):
            raise ConfigError(
                f"drafter={DRAFT_MODEL!r} needs arguments; pass --draft FOLDER, or write {DRAFT_MODEL}:folder=FOLDER"
            )
        assert self.target is not None
        return load_models(self.target, self.draft, [n for n in names if n not in (DRAFT_MODEL, PLAIN)], device, dtype)


@dataclass(frozen=True)
class Files:
    """Files to write besides the printed output; None if not requested. answers, plots: folders."""

    json: Path | None = None
    markdown: Path | None = None
    html: Path | None = None
    answers: Path | None = None
    plots: Path | None = None

    def checked(self) -> Files:
        """Raise ConfigError, before any work, for files that cannot be written."""
        for name in ("json", "markdown", "html"):
            path = getattr(self, name)
            if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
                raise ConfigError(f"--{name} {str(path)!r} cannot be written; pass a file in a folder that exists")
        for name in ("answers", "plots"):
            path = getattr(self, name)
            if path is not None and path.exists() and not path.is_dir():
                raise ConfigError(f"--{name} {str(path)!r} is a file; pass a folder")
        drawing = "--html" if self.html is not None else "--plots"
        if (self.html or self.plots) is not None and find_spec("matplotlib") is None:
            raise ConfigError(
                f"{drawing} draws with matplotlib, which is not installed; pip install 'specdec-toolkit[bench]', or "
                "leave it out and run `specdec bench report` on the record elsewhere"
            )
        return self

    def write(self, record: dict) -> None:
        if self.json is not None:
            self.json.write_text(json.dumps(record) + "\n")
        if self.markdown is not None:
            self.markdown.write_text(document(record))
        if self.html is not None:
            self.html.write_text(page(record))
        if self.plots is not None:
            self.plots.mkdir(parents=True, exist_ok=True)
            for plot in plots(record):
                (self.plots / f"{plot.title.lower().replace(' ', '-')}.svg").write_text(plot.svg)


def probabilities(option: str, text: str) -> tuple[float, ...]:
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ConfigError(f"{option} {text}: {part.strip()!r} is not a probability; pass 0.8 or 0,0.5,1")
        found.append(value)
    return tuple(dict.fromkeys(found))


def run(wanted: Wanted, files: Files, arithmetic: Arithmetic, dtype: str | None, device: str) -> bool:
    """Measure, print, write. Returns whether all of our methods are equal."""
    wanted = wanted.with_defaults()
    plan = wanted.plan()
    assert wanted.prompts is not None
    questions = read_questions(wanted.prompts, wanted.limit, wanted.is_chat, wanted.system)
    models = wanted.load(device, dtype)
    target = Path(str(wanted.target)).resolve()
    name = target.parent.name if target.name == "target" else target.name
    subject = Subject(name, models.target, models.draft, models.tokenizer, models.drafters())
    with arithmetic.swapped(models.target):
        record = run_plan(subject, questions, plan, ["specdec", *sys.argv[1:]], log, files.answers)
    files.write(record)
    print_record(record)
    busiest = max((cores for entry in record["results"] for cores in entry["foreign_cores"]), default=0.0)
    if busiest > QUIET_CORES:
        log(f"other processes kept up to {busiest:.1f} cores busy meanwhile; repeat it on a quiet machine")
    return all(entry["num_equal"] == entry["num_prompts"] for entry in record["results"] if entry["is_ours"])


def log(line: str) -> None:
    typer.echo(line, err=True)


def show(path: Path, files: Files) -> None:
    record = read_record(path)
    files.write(record)
    print_record(record)


def print_record(record: dict) -> None:
    for title, (header, rows) in all_tables(record):
        typer.echo(f"\n{title}")
        print_table(header, rows)
    typer.echo("")
    for line in summary(record):
        typer.echo(line)


def compare_files(
    before: Path, after: Path, min_effect: float, max_foreign_cores: float, json_path: Path | None
) -> int:
    """Compare, print, write. Returns the exit status."""
    Files(json_path).checked()
    found = compare(read_record(before), read_record(after), min_effect, max_foreign_cores)
    print_comparison(found)
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(found) | {"num_regressions": len(found.regressions)}, indent=1) + "\n")
    return 1 if found.regressions else 2 if found.unjudged else 0


def print_comparison(found: Comparison) -> None:
    for suite in dict.fromkeys(change.suite for change in found.changes):
        typer.echo(f"\n{suite}")
        print_table(*table([change for change in found.changes if change.suite == suite]))
    typer.echo("")

    for name, ratio in found.plain.items():
        typer.echo(f"{name}: tokens/s after over before {ratio:.2f}")
    for note in found.notes:
        typer.echo(f"the runs differ in {note}")

    for when, labels in (("before", found.only_before), ("after", found.only_after)):
        for label in labels:
            typer.echo(f"only {when}: {label}")

    if found.unjudged:
        typer.echo(
            f"{len(found.unjudged)} methods cannot be judged: other processes were busy in too many repeats; run "
            "both on a quiet machine, or pass --max-foreign-cores"
        )

    count = len(found.regressions)
    limits = f"(smallest change that counts {found.min_effect:.0%}, intervals {found.confidence:.2%})"
    typer.echo(f"{count} of {len(found.changes)} methods worse {limits}")
