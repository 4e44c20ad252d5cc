"""`specdec memory`: files of texts that the suffix drafter starts with."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli.common import Count, Folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIB = 2**20
PathArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A file of `specdec memory build`.")]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def memory() -> None:
    """Texts that `--drafter suffix:memory=FILE` takes drafts from."""


@app.command()
def build(
    tokenizer: Annotated[str, Folder(help="The target's checkpoint, or a folder with its tokenizer.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the memory goes; an old one is replaced.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Prompts, each a text: .txt, .json or .jsonl. May be repeated."),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A file that is one text; or .jsonl: rows with `text`, or those of `specdec generate --out`. May be "
            "repeated.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, Count(help="The most tokens that it holds, 8 bytes each; by default 16777216.")
    ] = None,
) -> None:
    """Write a memory of texts.

    Where they are more than --max-tokens, the first ones leave.
    """
    from specdec.cli.common import quiet_transformers
    from specdec.drafters.memory.memory import DEFAULT_TOKENS, SuffixMemory
    from specdec.errors import ConfigError
    from specdec.files.loading import encode_prompts, load_tokenizer, read_prompts

    if not (prompts or texts):
        raise ConfigError("there is nothing to remember; pass --texts FILE or --prompts FILE")
    quiet_transformers()
    loaded = load_tokenizer(Path(tokenizer).expanduser(), "tokenizer")
    found = SuffixMemory(DEFAULT_TOKENS if max_tokens is None else max_tokens, loaded)
    begin = time.perf_counter()
    for path in prompts or ():
        found.extend(encode_prompts(loaded, read_prompts(path)))
    for path in texts or ():
        found.extend(ids_of(path, loaded))
    if not len(found):
        raise ConfigError("the texts have no two tokens that follow each other, so there is nothing to remember")
    found.save(out)
    seconds = time.perf_counter() - begin
    typer.echo(f"{out}: {len(found)} texts, {found.num_tokens} tokens in {seconds:.1f} s")


@app.command()
def inspect(
    path: PathArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a memory holds, and whose tokens."""
    from specdec.drafters.memory.memory import SuffixMemory

    found = SuffixMemory.load(path)
    assert found.tokenizer is not None
    about: dict[str, Any] = {
        "texts": len(found),
        "tokens": found.num_tokens,
        "max_tokens": found.max_tokens,
        "segments": [len(segment) for segment in found.segments],
        "bytes": found.num_bytes,
        "tokenizer": found.tokenizer.name,
        "tokenizer_sha256": found.tokenizer.sha256,
    }
    if as_json:
        typer.echo(json.dumps(about, indent=1))
        return
    typer.echo(f"{len(found)} texts, {found.num_tokens} of at most {found.max_tokens} tokens")
    typer.echo(f"{found.num_bytes / MIB:.1f} MiB in memory, {len(found.segments)} segments")
    typer.echo(f"tokenizer {found.tokenizer}")


def ids_of(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of each text of a file. Raises InputError that names the file, and the line."""
    from specdec.errors import InputError
    from specdec.files.loading import read_json_lines

    if path.suffix.lower() == ".jsonl":
        for row, place in read_json_lines(path, "text file"):
            yield row_ids(row, place, tokenizer)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"text file {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"text file {str(path)!r} is not UTF-8 ({error.reason} at byte {error.start})") from None
    yield encoded(text, tokenizer)


def row_ids(row: Any, place: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Raises InputError for a row with neither text nor ids."""
    from specdec.errors import InputError

    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return encoded(row["text"], tokenizer)
    parts: list[Any] = [row.get(name) for name in ("prompt_ids", "completion_ids")] if isinstance(row, dict) else []
    if not (parts and all(isinstance(part, list) for part in parts)):
        raise InputError(f"{place} has neither a `text` nor `prompt_ids` and `completion_ids`; write one of them")
    return [*parts[0], *parts[1]]


def encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """As it stands: long texts are not cut, and nothing is put before them."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
