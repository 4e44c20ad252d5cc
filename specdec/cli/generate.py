"""`specdec generate`: text to stdout, one prompt as it is written or many as they finish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.common import (
    BatchSizeOption,
    Count,
    DeviceOption,
    DrafterOption,
    DraftOption,
    DtypeOption,
    LimitOption,
    MaxNewTokensOption,
    TargetOption,
    load_models,
)


def generate(
    target: TargetOption,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to continue.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Or a file of prompts: .txt, .json or .jsonl, as for `specdec check`."),
    ] = None,
    draft: DraftOption = None,
    drafter: DrafterOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    num_speculative_tokens: Annotated[
        int | None, Count(max=32, help="Tokens drafted per prompt and step, by default 5.")
    ] = None,
    batch_size: BatchSizeOption = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON per prompt, with token ids and acceptance.")
    ] = False,
    limit: LimitOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Continue a prompt, or a file of prompts in batches.

    One prompt streams, several are printed as they finish. Decodes greedily whatever the checkpoint's generation
    config says. Without a drafter it is plain decoding.
    """
    from specdec.cli.completions import print_completions
    from specdec.errors import InputError
    from specdec.loading import Prompt, read_prompts

    if (prompt is None) == (prompts is None):
        raise InputError("pass either --prompt TEXT or --prompts FILE")
    if prompt == "":
        raise InputError("--prompt is empty; give it at least one token")
    texts = [Prompt(prompt, "--prompt")] if prompt is not None else read_prompts(Path(str(prompts)), limit)
    models = load_models(target, draft, drafter, device, dtype)
    print_completions(models, texts, batch_size, num_speculative_tokens, max_new_tokens, as_json)
