"""`specdec generate`: text to stdout; a single prompt streams, several are printed as they finish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.common import (
    BatchSizeOption,
    ChatOption,
    Count,
    DeviceOption,
    DrafterOption,
    DraftOption,
    DraftTokens,
    DtypeOption,
    ExactOption,
    LengthPolicyOption,
    LimitOption,
    LookAheadOption,
    SystemOption,
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
    look_ahead: LookAheadOption = None,
    max_new_tokens: Annotated[
        int | None, Count(help="Tokens to generate per prompt; by default 128, or as set by --generation-config.")
    ] = None,
    num_speculative_tokens: Annotated[
        int | None,
        DraftTokens(help="Tokens drafted per prompt and step; by default 5, with other length policies at most 20."),
    ] = None,
    batch_size: BatchSizeOption = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON per prompt, with token ids and acceptance.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Write rows to this file as they finish; the same command resumes an interrupted run.",
        ),
    ] = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    generation_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A generation_config.json; each of its settings is served or refused."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="Sample at this temperature.")] = None,
    top_k: Annotated[int | None, Count(help="Sample among the N most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Sample among the most likely tokens of this total probability.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Sampling seed: prompt i uses the stream (N, i).")
    ] = None,
    verification: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="token, or block when sampling; lossy: lenient:L, typical:EPSILON:DELTA, top_beta:BETA:TAU.",
        ),
    ] = "token",
    layout: Annotated[str, typer.Option(metavar="NAME", help="ragged, repad or grouped; the text is the same.")] = (
        "ragged"
    ),
    length_policy: LengthPolicyOption = None,
    kv_tokens: Annotated[
        int | None, Count(help="With --out: the most tokens that the target's cache may hold.")
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            "--order", metavar="ORDER", help="With --out: arrival, or longest_first, which reads all prompts first."
        ),
    ] = "arrival",
    limit: LimitOption = None,
    exact: ExactOption = True,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Continue a prompt, or a file of prompts in batches.

    One prompt streams, several are printed as they finish. Decodes greedily whatever the checkpoint's own generation
    config says, unless sampling is requested. Without a drafter it decodes plainly.
    """
    from specdec.cli.completions import DEFAULT_NEW_TOKENS, DecodingOptions, print_completions
    from specdec.drafters.registry import is_plain, only_one
    from specdec.errors import ConfigError, InputError
    from specdec.files.loading import Prompt, read_prompts

    if (prompt is None) == (prompts is None):
        raise InputError("pass either --prompt TEXT or --prompts FILE")
    if prompt == "":
        raise InputError("--prompt is empty; give it at least one token")
    texts = [Prompt(prompt, "--prompt")] if prompt is not None else read_prompts(Path(str(prompts)), limit)
    if out is None:
        given = {"--kv-tokens": kv_tokens is not None, "--order": order != "arrival"}
        for name in (name for name, is_given in given.items() if is_given):
            raise ConfigError(f"{name} applies only when rows are written to a file; add --out FILE.jsonl")
    elif as_json:
        raise ConfigError("--json prints rows, --out writes them to a file; pass one of them")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    decoding = DecodingOptions.of(generation_config, sampling, seed, verification)
    if out is not None and decoding != DecodingOptions():
        raise ConfigError("--out writes greedy rows; remove the generation config and the sampling options")
    chosen = only_one(drafter) if drafter else None
    if isinstance(chosen, list):
        candidates = [one for one in chosen if not is_plain(one)]
        loaded = load_models(target, draft, candidates, device, dtype, look_ahead)
        models = replace(loaded, is_chat=chat, is_list=True, system=system)
    else:
        models = replace(load_models(target, draft, chosen, device, dtype, look_ahead), is_chat=chat, system=system)
    if out is not None:
        from specdec.cli.to_file import write_completions

        speculation = batch_size, num_speculative_tokens, max_new_tokens or DEFAULT_NEW_TOKENS
        write_completions(models, texts, out, *speculation, layout, length_policy, kv_tokens, order, exact)
        return
    how = layout, length_policy, decoding, exact
    print_completions(models, texts, batch_size, num_speculative_tokens, max_new_tokens, as_json, *how)
