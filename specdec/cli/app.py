"""`specdec`: the subcommands, and how errors are shown.

Exit status: 0 for success, 1 if outputs differ, 2 for bad input, 130 when interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specdec.cli.bench import app as bench
from specdec.cli.check.command import check
from specdec.cli.demo import demo
from specdec.cli.doctor import doctor
from specdec.cli.generate import generate
from specdec.cli.infill import infill
from specdec.cli.memory import app as memory
from specdec.cli.train.any_subset import any_subset
from specdec.cli.train.common import app as train
from specdec.cli.train.distill import distill
from specdec.cli.train.heads import acceptance_head, disco
from specdec.cli.train.look_ahead import look_ahead
from specdec.errors import SpecDecError
from specdec.version import __version__


class Commands(TyperGroup):
    """Print our own errors as one line without a traceback; other errors are bugs and keep theirs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SpecDecError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(check)
app.command()(generate)
app.command()(infill)
app.command()(demo)
app.command()(doctor)
app.add_typer(bench, name="bench")
app.add_typer(memory, name="memory")
train.command()(distill)
train.command()(acceptance_head)
train.command()(disco)
train.command()(any_subset)
train.command()(look_ahead)
app.add_typer(train, name="train")


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specdec {__version__}")
        raise typer.Exit


@app.callback()
def specdec(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Batched speculative decoding for Hugging Face causal LMs that does not change a token.

    Start with `specdec demo`; then prove it on your own models with `specdec check`.
    """


def main() -> None:
    try:
        app(prog_name="specdec")
    except KeyboardInterrupt:  # while torch was still being imported
        typer.echo("interrupted", err=True)
        sys.exit(130)
