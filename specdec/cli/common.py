"""Shared by the subcommands: options, loading, progress, tables."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from specdec.limits import MAX_DRAFT_TOKENS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specdec.check.progress import OnProgress
    from specdec.drafter import Drafter
    from specdec.drafters.registry import Part
    from specdec.files.junit import Case
    from specdec.files.loading import Prompt

STAGES = {
    "plain": "plain greedy, one by one",
    "speculative": "specdec, in batches",
    "certifying": "teacher-forced",
    "sampling": "sampling",
}  # labels of progress bars
DRAFT_MODEL, LOOK_AHEAD = "draft_model", "look_ahead"


def check_draft_tokens(value: int | None) -> int | None:
    """Raise ConfigError, before anything is loaded, for more draft tokens than a step allows."""
    if value is not None and value > MAX_DRAFT_TOKENS:
        from specdec.errors import ConfigError

        raise ConfigError(f"--num-speculative-tokens {value} exceeds {MAX_DRAFT_TOKENS}; pass 1 to {MAX_DRAFT_TOKENS}")
    return value


Folder, Count = partial(typer.Option, metavar="FOLDER"), partial(typer.Option, metavar="N", min=1)
DraftTokens = partial(Count, callback=check_draft_tokens)
TargetOption = Annotated[
    str, typer.Option("--target", "--model", metavar="FOLDER", help="The target's checkpoint, with its tokenizer.")
]
DraftOption = Annotated[
    str | None, Folder(help="A draft model's checkpoint, with the target's tokenizer; or look-ahead embeddings.")
]
DrafterOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DRAFTER",
        help="prompt_lookup, with options prompt_lookup:max_ngram_size=4; suffix, or suffix:memory=FILE; a folder; or "
        "a+b: a where it has a draft, else b; or a,b,none: candidates for --length-policy cost_model.",
    ),
]
LookAheadOption = Annotated[
    str | None,
    Folder(help="The target's look-ahead embeddings, from `specdec train look-ahead`; the target drafts for itself."),
]
DraftTokensOption = Annotated[int, DraftTokens(help="Tokens drafted per prompt and step, 1 to 32.")]
BatchSizeOption = Annotated[int, Count(help="Prompts decoded together.")]
MaxNewTokensOption = Annotated[int, Count(help="Tokens to generate per prompt.")]
LayoutOption = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="Layouts of the KV cache: ragged (the default), repad, grouped.")
]
LENGTH_POLICIES = "fixed, heuristic, confidence, acceptance_head, disco or cost_model; confidence:0.5 sets a threshold"
LengthPolicyOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"How far to draft: {LENGTH_POLICIES}; by default fixed. The text is the same."),
]
LengthPoliciesOption = Annotated[
    str | None, typer.Option(metavar="NAME,...", help=f"Length policies: {LENGTH_POLICIES}. The default is fixed.")
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Treat prompts as a user's messages: apply the tokenizer's chat template.")
]
SystemOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The system message before every conversation; with --chat.")
]
LimitOption = Annotated[int | None, Count(help="Use only the first N prompts of the file.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16, float16 or float64; by default float32 on a CPU, else as stored.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="Where to run: cpu, cuda, cuda:1, ...")]


ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact/--no-exact",
        help="On a GPU: batch-invariant kernels, exact in half precision; or the model's own modules and kernels.",
    ),
]
BatchInvariantOption = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="On a CPU: swap in the kernels' references, which make half precision exact there too; slow, one thread.",
    ),
]


def check_temperature(value: float | None, for_greedy: str) -> None:
    """Raise ConfigError unless one can sample at this temperature. for_greedy: what to do instead, for the message."""
    from specdec.errors import ConfigError

    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"--temperature {value:g} is not a finite number above 0; for greedy decoding {for_greedy}")


class Chat(NamedTuple):
    """is_chat: prompts are messages, put into the chat template. system: the message before every conversation."""

    is_chat: bool = False
    system: str | None = None


@dataclass(frozen=True)
class Models:
    """named: drafters besides the draft model, by what they were called. is_chat: prompts are messages, put into the
    chat template. is_list: the named ones are candidates. system: the message before every conversation."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    draft: PreTrainedModel | None
    named: Mapping[str, Drafter]
    is_chat: bool = False
    is_list: bool = False
    system: str | None = None

    @property
    def drafter(self) -> Drafter | PreTrainedModel | list[Drafter | None] | None:
        """The `drafter=` for `specdec.generate`: the only one, or candidates, of which plain decoding is always one."""
        if self.is_list:
            return [*self.named.values(), None]
        return next(iter(self.named.values()), self.draft)

    def drafters(self) -> dict[str, Drafter | PreTrainedModel | str]:
        """The `drafter=` for `specdec.generate`, by name."""
        return {**({} if self.draft is None else {"draft_model": self.draft}), **self.named}

    def encode(self, prompts: list[Prompt]) -> list[Tensor]:
        from specdec.files.loading import encode_prompts

        return encode_prompts(self.tokenizer, prompts, self.is_chat, self.system)


def load_models(
    target: str,
    draft: str | None,
    drafters: str | Sequence[str] | None,
    device: str,
    dtype: str | None,
    look_ahead: str | None = None,
) -> Models:
    """Load the models. Errors that can be found without the weights are raised before the weights are read.

    drafters: one drafter, or a list of them; "draft_model" in it stands for the one in `draft`, which is used by itself
        too where it is given with a list. look_ahead: a folder of embeddings, for the name "look_ahead".
    """
    from specdec.drafters.registry import parse
    from specdec.files.loading import check_same_tokenizer, find_checkpoint, load_model, load_tokenizer, resolve_device

    draft, look_ahead = by_kind(draft, look_ahead)
    texts = chosen_drafters(draft, drafters, look_ahead)
    given = [name for name, folder in ((DRAFT_MODEL, draft), (LOOK_AHEAD, look_ahead)) if folder is not None]
    parts = [part for text in texts for part in parse(text, given)]
    place = resolve_device(device)
    target_folder = find_checkpoint(target, "target")
    draft_folder = find_checkpoint(draft, "draft") if draft is not None else None
    quiet_transformers()

    tokenizer = load_tokenizer(target_folder, "target")
    for folder in (draft_folder, *(part.folder for part in parts)):
        if folder is not None:
            check_same_tokenizer(tokenizer, find_drafter(folder))
    check_memories(parts, tokenizer)
    with Console(stderr=True).status("loading"):
        model = load_model(target_folder, "target", place, dtype)
        draft_model = load_model(draft_folder, "draft", place, dtype) if draft_folder is not None else None
        named = named_drafters(texts, model, draft_model, look_ahead)
    say_dequantised(target_folder, model)
    if draft_folder is not None and draft_model is not None:
        say_dequantised(draft_folder, draft_model)
    return Models(model, tokenizer, draft_model, named)


def check_memories(parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DrafterError for a file of another tokenizer's texts, and InputError for a file without any."""
    for part in parts:
        path = part.options.get("memory")
        if path is not None:
            from specdec.drafters.memory.memory import check_file

            check_file(path, tokenizer)


def by_kind(draft: str | None, look_ahead: str | None) -> tuple[str | None, str | None]:
    """The folders of --draft and --look-ahead, where look-ahead embeddings may have been passed as --draft.

    Raises DrafterError for a --draft folder that holds no drafter, and for two folders of embeddings.
    """
    from specdec.drafters.folders import kind_of
    from specdec.errors import DrafterError

    folder = None if draft is None else Path(draft).expanduser()
    if folder is None or not folder.is_dir() or kind_of(folder) != LOOK_AHEAD:
        return draft, look_ahead
    if look_ahead is not None:
        raise DrafterError(f"--draft {draft} and --look-ahead {look_ahead} both hold embeddings; pass one of them")
    return None, draft


def find_drafter(folder: Path) -> Path:
    """A drafter's folder: look-ahead embeddings, or a checkpoint."""
    from specdec.files.loading import find_checkpoint

    return folder if (folder / f"{LOOK_AHEAD}.json").is_file() else find_checkpoint(str(folder), "draft")


def chosen_drafters(draft: str | None, drafters: str | Sequence[str] | None, look_ahead: str | None) -> list[str]:
    """The drafters to build, as they were written. A folder alone chooses its own.

    Raises DrafterError for folders that no drafter uses.
    """
    from specdec.errors import DrafterError

    is_one = isinstance(drafters, str)
    texts = [drafters] if isinstance(drafters, str) else list(drafters or [])
    words = [word for text in texts for word in text.split("+")]
    if drafters is None and draft is not None and look_ahead is not None:
        raise DrafterError(f"--draft {draft} and --look-ahead {look_ahead} both choose a drafter; pass one of them")
    if is_one and draft is not None and DRAFT_MODEL not in words:
        raise DrafterError(f"--draft {draft} and --drafter {drafters} both choose a drafter; pass one of them")
    if look_ahead is not None and drafters is not None and LOOK_AHEAD not in words:
        raise DrafterError(f"--look-ahead {look_ahead} is for --drafter {LOOK_AHEAD}; name it too, or drop the folder")
    if LOOK_AHEAD in words and look_ahead is None:
        raise DrafterError(
            f"--drafter {LOOK_AHEAD} needs the embeddings; pass --look-ahead FOLDER, or write "
            f"{LOOK_AHEAD}:folder=FOLDER"
        )
    if drafters is None and look_ahead is not None:
        return [LOOK_AHEAD]
    return texts


def named_drafters(
    texts: Sequence[str], target: PreTrainedModel, draft: PreTrainedModel | None, look_ahead: str | None
) -> dict[str, Drafter]:
    """The drafters that were written, by their text."""
    from specdec.drafters.registry import drafter_class, resolve

    def given() -> dict[str, Drafter]:
        """New ones each time: one instance serves one generation."""
        found = {} if draft is None else {DRAFT_MODEL: resolve(draft)}
        embeddings: Any = drafter_class(LOOK_AHEAD)
        return found if look_ahead is None else {**found, LOOK_AHEAD: embeddings.load(look_ahead)}

    return {text: resolve(text, target, given()) for text in texts}


@dataclass(frozen=True)
class Arithmetic:
    """exact: as in `generate`. batch_invariant: the kernels are swapped into the target for the whole run."""

    exact: bool = True
    batch_invariant: bool = False

    def swapped(self, model: PreTrainedModel) -> AbstractContextManager:
        """`batch_invariant(model)` if it was asked for."""
        import torch

        from specdec.network.invariant.swap import batch_invariant

        if self.batch_invariant and model.device.type == "cpu":
            torch.set_num_threads(1)  # several would split element-wise operations in ways that depend on the batch
        return batch_invariant(model) if self.batch_invariant else nullcontext()

    @contextmanager
    def oracle(self, model: PreTrainedModel) -> Iterator[None]:
        """The same, and where `generate` runs these kernels by itself."""
        from specdec.check.oracle import oracle_of

        with self.swapped(model), oracle_of(model, self.exact):
            yield


@dataclass(frozen=True)
class Reports:
    """Files to write besides the printed output; None if not requested."""

    json: Path | None = None
    junit: Path | None = None

    def checked(self) -> Reports:
        """Raise ConfigError, before any work, for a file that cannot be written."""
        from specdec.errors import ConfigError

        for name, path in (("--json", self.json), ("--junit", self.junit)):
            if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
                raise ConfigError(f"{name} {str(path)!r} cannot be written; pass a file in a folder that exists")
        return self

    def write_json(self, report: Mapping[str, Any]) -> None:
        if self.json is not None:
            command = shlex.join(["specdec", *sys.argv[1:]])
            self.json.write_text(json.dumps({**report, "command": command}, indent=1) + "\n")

    def write_junit(self, suite: str, cases: Sequence[Case]) -> None:
        from specdec.files.junit import write_junit

        if self.junit is not None:
            write_junit(self.junit, suite, cases)


def quiet_transformers() -> None:
    """Silence its loading bars and advice; important problems are raised as errors."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def stage_bars(totals: Mapping[str, int]) -> Iterator[OnProgress]:
    """Show a bar on stderr for each stage from its first report on. totals: a stage's amount of work, if known."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def on_progress(stage: str, num_done: int) -> None:
        if not tasks:
            progress.start()
        if stage not in tasks:
            tasks[stage] = progress.add_task(STAGES.get(stage, stage), total=totals.get(stage))
        progress.advance(tasks[stage], num_done)

    try:
        yield on_progress
    finally:
        if tasks:
            progress.stop()


def say_ignored(settings: dict[str, Any]) -> None:
    """Say on stderr which settings of the checkpoint's generation config plain greedy decoding ignores."""
    if settings:
        listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        typer.echo(
            f"note: the checkpoint's generation_config sets {listed}; ignored for plain greedy decoding", err=True
        )


def say_dequantised(path: Path, model: PreTrainedModel) -> None:
    """Say on stderr in which precision the weights of a GGUF file are computed with."""
    from specdec.files.gguf import is_gguf

    if is_gguf(path):
        dtype = str(model.dtype).removeprefix("torch.")
        typer.echo(f"note: the weights of {path.name} are dequantised to {dtype}; --dtype chooses another", err=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a drawn table on a terminal; otherwise aligned text that is never cut to a width."""
    if sys.stdout.isatty():
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
