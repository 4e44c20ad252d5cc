"""`specdec check --sampling`: does sampled output follow the target's distribution?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from specdec.check.goodness import POWER
from specdec.check.sampling import SamplingReport, SamplingTest, check_sampling
from specdec.check.ways import words
from specdec.cli.check.matrix import Choice
from specdec.cli.common import Arithmetic, Chat, Reports, check_temperature, print_table, say_ignored, stage_bars
from specdec.errors import ConfigError
from specdec.files.junit import Case
from specdec.files.loading import read_prompts
from specdec.options.speculation import VERIFICATIONS

MAX_PROMPTS = 8  # without --limit; each is continued many times


@dataclass(frozen=True)
class SamplingOptions:
    """The options that only `--sampling` has; None where not given."""

    num_samples: int | None = None
    verification: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def refuse(self) -> None:
        """Raise ConfigError if any is given in another check."""
        for name, value in vars(self).items():
            if value is not None:
                raise ConfigError(f"--{name.replace('_', '-')} {value} applies only to sampling; add --sampling")

    def options(self) -> dict[str, Any]:
        """Keywords of `generate`. Raises ConfigError for values that sampling cannot use."""
        check_temperature(self.temperature, "leave --sampling out")
        named = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in named.items() if value is not None}


def run(
    target: str,
    prompts: Path,
    choice: Choice,
    sampling: SamplingOptions,
    max_new_tokens: int,
    arithmetic: Arithmetic,
    reports: Reports,
    limit: int | None,
    dtype: str | None,
    device: str,
    chat: Chat,
) -> bool:
    """Test, print, write the reports. Returns whether the exit status is 0."""
    if choice.axes.get("layout") is not None:
        raise ConfigError("--layout has no meaning for --sampling; leave it out")

    cells = choice.ways()
    verifications = words("--verification", sampling.verification or ",".join(VERIFICATIONS), VERIFICATIONS)
    options = sampling.options()

    texts = read_prompts(prompts, limit or MAX_PROMPTS)
    models = choice.load(target, device, dtype, chat)
    token_ids = models.encode(texts)
    total = {"sampling": len(texts) * len(cells) * (len(verifications) + 1)}

    with arithmetic.oracle(models.target), stage_bars(total) as on_progress:
        found = check_sampling(
            models.target,
            token_ids,
            cells,
            models.drafters(),
            verifications,
            sampling.num_samples or 500,
            max_new_tokens,
            sampling.seed or 0,
            options,
            on_progress,
        )

    say_ignored(found.ignored_settings)
    print_report(found)

    origin = {
        "target": target,
        "draft": choice.draft,
        "prompts": str(prompts),
        "num_prompts": len(texts),
        **chat._asdict(),
    }
    reports.write_json({**found.to_dict(), **origin, **chat._asdict(), **asdict(arithmetic)})
    reports.write_junit("specdec check --sampling", [junit_case(test) for test in found.tests])
    return found.passed


def print_report(found: SamplingReport) -> None:
    columns = ["test", "of", "samples", "places", "p", "worst place", "ranks", "finds TV", "tokens per step", "verdict"]
    rows = [
        [
            test.name,
            test.kind,
            str(test.num_samples),
            str(test.num_places),
            f"{test.p_value:.2g}",
            f"{test.worst_p_value:.2g}",
            f"{test.rank_p_value:.2g}",
            f"{test.detectable_distance:.3f}",
            f"{test.tokens_per_step:.2f}",
            verdict(test),
        ]
        for test in found.tests
    ]

    print_table(columns, rows)

    options = ", ".join(f"{name}={value}" for name, value in found.options.items())
    typer.echo(f"{options}, seed {found.seed}")
    typer.echo(
        f"a correct decoder fails with probability at most {found.alpha:g}: each test rejects below p = "
        f"{found.tests[0].alpha:.1e}"
    )
    typer.echo(f"finds TV: the total variation that is found with probability {POWER:g} if every position has it")
    typer.echo("sampled output follows the target" if found.passed else "FAILED")


def verdict(test: SamplingTest) -> str:
    if test.is_control:
        return "found" if test.passed else "NOT FOUND"
    return "follows" if test.passed else "DIFFERS"


def junit_case(test: SamplingTest) -> Case:
    values = f"p {test.p_value:.3g}, worst place {test.worst_p_value:.3g}, ranks {test.rank_p_value:.3g}"
    message = f"{verdict(test)}: {values}, limit {test.alpha:.1e}"
    details = f"{test.num_samples} samples at {test.num_places} places; finds TV {test.detectable_distance:.3f}"
    return Case(f"{test.kind}: {test.name}", "passed" if test.passed else "failed", message, details)
