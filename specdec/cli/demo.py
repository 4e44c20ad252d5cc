"""`specdec demo`: three ways to decode the same eight prompts, measured on this machine with the shipped models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.cli.common import DraftTokens, MaxNewTokensOption, load_models, print_table, stage_bars

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from specdec.check.oracle import Run
    from specdec.check.progress import OnProgress
    from specdec.options.speculation import SpeculativeConfig

NUM_PROMPTS = 8
NUM_REPEATS = 3
PLAIN, SPECULATIVE = "specdec, plain", "specdec, speculative"
HEAD = "acceptance_head.json"  # if the draft model has a head


def demo(
    models: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another folder with target/, draft/ and prompts.json.")
    ] = None,
    max_new_tokens: MaxNewTokensOption = 64,
    num_speculative_tokens: Annotated[
        int | None, DraftTokens(help="The most tokens drafted per prompt and step; the default depends on the policy.")
    ] = None,
    length_policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How far to draft: by default cost_model if the draft model has an acceptance head, else fixed.",
        ),
    ] = None,
) -> None:
    """Show tokens and speed of plain and speculative decoding.

    Decodes eight prompts in under a minute on a CPU, with small models of Python code that come with specdec.
    Exit status 1 if any output differs from transformers' plain greedy decoding of that prompt alone.
    """
    from specdec.check.equivalence import check_prompts, first_differences
    from specdec.check.oracle import run_plain
    from specdec.check.settings import greedy_settings
    from specdec.files.loading import read_prompts
    from specdec.options.speculation import speculative_config

    folder = models or shipped_pair()
    texts = read_prompts(folder / "prompts.json", NUM_PROMPTS)
    loaded = load_models(str(folder / "target"), str(folder / "draft"), None, "cpu", None)
    model, prompts = loaded.target, loaded.encode(texts)
    # In a batch the row with the longest draft decides the cost of verifying, so a head alone would draft too far.
    policy = length_policy or ("cost_model" if (folder / "draft" / HEAD).is_file() else "fixed")
    speculation = speculative_config(loaded.drafter, num_speculative_tokens, length_policy=policy)
    check_prompts(model, prompts, speculation, len(prompts), max_new_tokens)
    ways = ways_to_decode(model, prompts, speculation)
    totals = {"plain": len(prompts), "measuring": len(ways) * (1 + NUM_REPEATS)}
    with greedy_settings(model), stage_bars(totals) as on_progress:
        oracle = run_plain(model, prompts, max_new_tokens, on_progress).outputs
        runs = measure(ways, max_new_tokens, on_progress)
    differing = {
        name: {row for run in repeats for row in first_differences(oracle, run.outputs)}
        for name, repeats in runs.items()
    }
    sample = loaded.tokenizer.decode(runs[SPECULATIVE][0].outputs[0], skip_special_tokens=True)
    typer.echo(f"A prompt and, after |>, the target model's continuation:\n\n{texts[0].text}|>{sample}\n")
    print_runs(runs, differing, len(prompts))
    mean_length = runs[SPECULATIVE][0].speculation.mean_acceptance_length
    typer.echo(f"mean acceptance length {mean_length:.2f}, length policy {policy}")
    typer.echo(f"{len(prompts) - len(differing[SPECULATIVE])}/{len(prompts)} outputs identical")
    if differing[PLAIN] or differing[SPECULATIVE]:
        raise typer.Exit(1)


def shipped_pair() -> Path:
    import specdec

    return Path(specdec.__file__).parent / "assets" / "demo_pair"


def ways_to_decode(
    model: PreTrainedModel, prompts: list[Tensor], speculation: SpeculativeConfig
) -> dict[str, Callable[[int], Run]]:
    """Name -> a function of max_new_tokens that decodes all prompts in one batch."""
    from specdec.check.oracle import run_batched, run_speculative
    from specdec.options.speculation import speculative_config

    rows = len(prompts)
    return {
        f"transformers, batch of {rows}": lambda length: run_batched(model, prompts, length),
        PLAIN: lambda length: run_speculative(model, prompts, speculative_config(None, None), rows, length),
        SPECULATIVE: lambda length: run_speculative(
            model, prompts, speculation, rows, length, options={"length_policy": speculation.length_policy}
        ),
    }


def measure(
    ways: dict[str, Callable[[int], Run]], max_new_tokens: int, on_progress: OnProgress
) -> dict[str, list[Run]]:
    """Run the ways in turn, several times, so that changes in the machine's speed affect all of them.

    The first round does not count: memory is cold, and a cost model has not yet seen the cost of forwards.
    """
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for repeat in range(1 + NUM_REPEATS):
        for name, decode in ways.items():
            run = decode(max_new_tokens)
            if repeat > 0:
                runs[name].append(run)
            on_progress("measuring", 1)
    return runs


def print_runs(runs: dict[str, list[Run]], differing: dict[str, set[int]], num_prompts: int) -> None:
    """Speed is the median of the repeats; the factor is relative to transformers' median."""
    speeds = {name: median(run.tokens_per_second for run in repeats) for name, repeats in runs.items()}
    slowest = next(iter(speeds.values()))
    rows = [
        [name, f"{speed:.0f}", f"{speed / slowest:.2f}x", f"{num_prompts - len(differing[name])}/{num_prompts}"]
        for name, speed in speeds.items()
    ]
    print_table([f"{num_prompts} prompts", "tokens/s", "speed", "as plain, one by one"], rows)
