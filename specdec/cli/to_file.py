"""Continues a file of prompts into a file of rows, from where an earlier run was interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel

from specdec.api.generate_many import Completion, generate_many
from specdec.check.settings import greedy_settings
from specdec.cli.common import Models, say_ignored
from specdec.cli.completions import print_summary
from specdec.drafters.several import leaves
from specdec.files.fingerprint import Fingerprint
from specdec.files.loading import Prompt
from specdec.files.output_file import OutputFile


def write_completions(
    models: Models,
    prompts: Sequence[Prompt],
    out: Path,
    max_rows: int,
    num_speculative_tokens: int | None,
    max_new_tokens: int,
    layout: str,
    length_policy: str | None,
    kv_tokens: int | None,
    order: str,
    exact: bool = True,
) -> None:
    """Write each row once, as it finishes; show a bar and tokens/s on stderr."""
    token_ids = models.encode(list(prompts))

    # Batch, layout, order and length policy do not change a row; they may differ when a run is resumed.
    settings = {
        "target": fingerprint(models.target),
        "draft": drafter_name(models),
        "num_speculative_tokens": num_speculative_tokens,
        "max_new_tokens": max_new_tokens,
        "dtype": str(models.target.dtype),
    }
    settings |= {"is_chat": True} if models.is_chat else {}
    settings |= {} if models.system is None else {"system": models.system}
    chats = [prompt.chat for prompt in prompts]
    settings |= {"messages": sha256(json.dumps(chats).encode()).hexdigest()} if any(chats) else {}

    with greedy_settings(models.target) as ignored:
        say_ignored(ignored)

        # This checks all prompts, including those already done, before the file is created.
        options: dict[str, Any] = dict(
            drafter=models.drafter,
            num_speculative_tokens=num_speculative_tokens,
            layout=layout,
            length_policy=length_policy,
            exact=exact,
        )
        options |= dict(max_rows=max_rows, kv_tokens=kv_tokens, order=order, max_new_tokens=max_new_tokens)
        generate_many(models.target, token_ids, **options).close()

        file = OutputFile(out, settings, [prompt.text for prompt in prompts])

        try:
            left = [index for index in range(len(prompts)) if index not in file.done]
            if file.done:
                typer.echo(f"{out}: {len(file.done)} of {len(prompts)} rows are done, resuming", err=True)

            run = generate_many(models.target, [token_ids[index] for index in left], **options)
            begin = time.perf_counter()
            with progress() as bar:
                task = bar.add_task("rows", total=len(prompts), completed=len(file.done), rate="")
                for done in run:
                    index = left[done.index]
                    file.append(row_of(models, prompts[index], index, done))
                    rate = run.speculation.num_new_tokens / (time.perf_counter() - begin)
                    bar.update(task, advance=1, rate=f"{rate:.0f} tokens/s")

            if left:
                print_summary(run.speculation, time.perf_counter() - begin, models.drafter is not None)
        finally:
            file.close()


def row_of(models: Models, prompt: Prompt, index: int, done: Completion) -> dict:
    text = models.tokenizer.decode(done.token_ids, skip_special_tokens=True)
    numbers = asdict(done)
    own = {"index": index, "id": prompt.id, "prompt": prompt.text, "completion": text}
    own |= {"prompt_ids": numbers.pop("prompt_ids"), "completion_ids": numbers.pop("token_ids")}
    del numbers["index"]
    return {**own, **numbers}


def fingerprint(model: PreTrainedModel) -> str:
    """Tells checkpoints apart."""
    return sha256(json.dumps(asdict(Fingerprint.of(model)), sort_keys=True).encode()).hexdigest()[:16]


def drafter_name(models: Models) -> str | None:
    """Tells drafters apart; of draft models by their fingerprints."""
    if not models.named:
        return None if models.draft is None else fingerprint(models.draft)
    networks = [part.model for drafter in models.named.values() for part in leaves(drafter) if part.model is not None]
    return " ".join([*models.named, *map(fingerprint, networks)])


def progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TextColumn("{task.fields[rate]}"), console=Console(stderr=True))
