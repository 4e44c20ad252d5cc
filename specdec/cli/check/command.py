"""`specdec check`: is the output the target's own? For specdec in every setting, greedy or sampled, or any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.common import (
    BatchInvariantOption,
    ChatOption,
    Count,
    DeviceOption,
    DraftOption,
    DtypeOption,
    ExactOption,
    LayoutOption,
    LengthPoliciesOption,
    LimitOption,
    LookAheadOption,
    SystemOption,
    TargetOption,
)


def check(
    target: TargetOption,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=".txt (a prompt per line), .json (list of strings) or .jsonl (`prompt`, `turns`, `messages`).",
        ),
    ] = None,
    outputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Certify these outputs of any engine instead: .jsonl with `prompt_ids` or `prompt`, and "
            "`completion_ids` or `completion`.",
        ),
    ] = None,
    draft: DraftOption = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Drafters: prompt_lookup, draft_model (of --draft), look_ahead, a folder, a+b (a where it has a "
            "draft, else b), none.",
        ),
    ] = None,
    look_ahead: LookAheadOption = None,
    batch_size: Annotated[
        str | None, typer.Option(metavar="N,...", help="Prompts decoded together; by default 8, with --sampling 250.")
    ] = None,
    num_speculative_tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens drafted per prompt and step, 1 to 32.")
    ] = "5",
    layout: LayoutOption = None,
    length_policy: LengthPoliciesOption = None,
    max_new_tokens: Annotated[
        int | None,
        Count(
            help="Tokens to generate per prompt; by default 64, with --outputs the longest row's, with --sampling 8."
        ),
    ] = None,
    exact: ExactOption = True,
    batch_invariant: BatchInvariantOption = False,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Test that sampled output follows the target's distribution.")
    ] = False,
    num_samples: Annotated[
        int | None, Count(help="With --sampling: continuations of each prompt, by default 500.")
    ] = None,
    verification: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="With --sampling: token, block; by default both.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="With --sampling.")] = None,
    top_k: Annotated[int | None, Count(help="With --sampling.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="With --sampling.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="With --sampling: by default 0.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the report there.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="OUT", help="Write JUnit XML there, for CI.")] = None,
    allow_ties: Annotated[
        bool, typer.Option("--allow-ties", help="Succeed if all differences are numerical ties.")
    ] = False,
    limit: LimitOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Compare with plain greedy decoding, token by token.

    Decodes every prompt with transformers' plain greedy `generate`, one at a time, then with specdec in batches, once
    for every combination of the given values (lists such as 8,16). The first difference of each prompt is judged: `tie`
    if the target's margin between the two tokens, recomputed in float64, is within twice the measured error of a logit
    at that position, else `bug`.

    With --outputs, the rows of another engine are judged by one teacher-forced pass of the target, in --dtype, which
    should be the engine's: equal, tie or bug, at every position. Ties pass: two engines round differently.

    With --sampling, the beginnings of 8 prompts (or --limit) are continued many times, and the tokens tested against
    the target's exact probabilities wherever many continuations share a prefix; so are whole outputs of a tiny model.
    The same tests must find a planted bug.

    Exit status: 0 if all prompts are equal (or differ only by ties, where ties pass) or all tests give the required
    result, 1 if not, 2 for bad input.
    """
    drafters = ",".join(drafter) if drafter else None  # repeated, or as a list with commas
    from specdec.cli.check import matrix as check_matrix
    from specdec.cli.check import outputs as check_outputs
    from specdec.cli.check import sampling as check_sampling
    from specdec.cli.common import Arithmetic, Chat, Reports, by_kind
    from specdec.errors import ConfigError, InputError

    if (prompts is None) == (outputs is None):
        raise InputError("pass either --prompts FILE, to decode, or --outputs FILE, to certify decoded outputs")
    reports = Reports(json_path, junit).checked()
    arithmetic = Arithmetic(exact, batch_invariant)
    sampled = check_sampling.SamplingOptions(num_samples, verification, temperature, top_k, top_p, seed)
    if not sampling:
        sampled.refuse()
    elif outputs is not None:
        raise ConfigError("--sampling generates, --outputs judges existing outputs; pass one of them")
    batch_sizes = batch_size or ("250" if sampling else "8")
    axes = {"layout": layout, "length_policy": length_policy}
    if outputs is None:
        draft, look_ahead = by_kind(draft, look_ahead)
    choice = check_matrix.Choice(draft, drafters, batch_sizes, num_speculative_tokens, axes, look_ahead)
    if sampling:
        assert prompts is not None
        passed = check_sampling.run(
            target,
            prompts,
            choice,
            sampled,
            max_new_tokens or 8,
            arithmetic,
            reports,
            limit,
            dtype,
            device,
            Chat(chat, system),
        )
    elif outputs is None:
        assert prompts is not None
        passed = check_matrix.run(
            target,
            prompts,
            choice,
            max_new_tokens or 64,
            arithmetic,
            reports,
            allow_ties,
            limit,
            dtype,
            device,
            Chat(chat, system),
        )
    else:
        given = {
            "--draft": draft,
            "--drafter": drafters,
            "--look-ahead": look_ahead,
            "--layout": layout,
            "--length-policy": length_policy,
        }
        given["--limit"] = None if limit is None else str(limit)
        if chat or system is not None:
            raise ConfigError(
                "--chat and --system have no meaning for --outputs: its prompts stand as they were decoded"
            )
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name} {value} has no meaning for --outputs, which generates nothing; leave it out")
        passed = check_outputs.run(target, outputs, max_new_tokens, arithmetic, reports, dtype, device)
    if not passed:
        raise typer.Exit(1)
