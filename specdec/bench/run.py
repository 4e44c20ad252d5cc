"""A whole run: suites, methods, equality, time, and its record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.bench.latency import RowTimes
from specdec.bench.measure import Result, measure, older_objects_left_alone
from specdec.bench.methods import Method, Pair, our_methods, peers
from specdec.bench.report.record import FORMAT, describe_pair, describe_result, describe_suite
from specdec.bench.roofline import bytes_read, measured_bandwidth
from specdec.bench.spec_bench import write_answers
from specdec.bench.stages import profile
from specdec.bench.suite import Question, Suite, ask, of_length
from specdec.bench.sweeps import forced_acceptance
from specdec.check.equivalence import check_prompts
from specdec.check.oracle import is_exact, oracle_of
from specdec.check.referee import name_of
from specdec.check.settings import greedy_settings
from specdec.check.ways import PLAIN as NO_DRAFTER
from specdec.check.ways import Way, generate_options
from specdec.errors import ConfigError
from specdec.files.environment import environment
from specdec.network.base import evaluating
from specdec.network.invariant.swap import is_batch_invariant
from specdec.network.memory import footprint
from specdec.network.refusals import check_model
from specdec.options.speculation import speculative_config


@dataclass(frozen=True)
class BenchPlan:
    """ways: our methods, run at every batch size. rates: forced acceptances to sweep. context_lengths: prompt lengths
    to sweep.
    with_peers: whether transformers' speculating methods run too; its plain decoding always does. repeats: timed runs
    of every method. profiling: also run with a clock around the stages. exact: as in `generate`. max_prompt_tokens: see
    `suite.ask`.
    """

    ways: Sequence[Way]
    batch_sizes: Sequence[int]
    ks: Sequence[int]
    max_new_tokens: int
    repeats: int
    seed: int = 0
    rates: Sequence[float] = ()
    context_lengths: Sequence[int] = ()
    with_peers: bool = True
    profiling: bool = True
    exact: bool = True
    max_prompt_tokens: int | None = None


@dataclass(frozen=True)
class Subject:
    """The models to measure. name: of the models, without a path. drafters: the `drafter=` for each name."""

    name: str
    target: PreTrainedModel
    draft: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    drafters: Mapping[str, PreTrainedModel | str]


def run(
    subject: Subject,
    questions: Sequence[Question],
    plan: BenchPlan,
    command: Sequence[str],
    log: Callable[[str], None],
    answers: Path | None = None,
) -> dict:
    """Returns the record. command: as typed, for the record. answers: a folder for Spec-Bench's files.

    Raises SpecDecError, before anything is decoded, if something cannot be measured.
    """
    model = subject.target
    check_model(model)
    check_plan(plan)
    check_ways(subject, plan)
    torch.manual_seed(plan.seed)

    record = {"format": FORMAT, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    record |= environment(model.device, command)
    bandwidth = measured_bandwidth(model.device) if model.device.type == "cuda" else None

    with greedy_settings(model), evaluating(model), older_objects_left_alone():
        log(f"decoding {len(questions)} questions plainly, one by one")
        with oracle_of(model, plan.exact):
            suite = ask(model, subject.tokenizer, questions, plan.max_new_tokens, plan.max_prompt_tokens)
            suites = [suite]
            suites += [of_length(suite, length, model, plan.max_new_tokens) for length in plan.context_lengths]
        pairs = [Pair(subject.name, model, subject.draft, one.prompts) for one in suites]
        for pair in pairs:
            check_suite(pair, subject, plan)

        entries = []
        for one, pair in zip(suites, pairs, strict=True):
            log(f"{one.name}: {len(one.prompts)} prompts")
            rates = plan.rates if one is suite else ()
            methods = methods_of(subject, pair, one, replace(plan, rates=rates))
            results = measure(pair, one.reference, methods, plan.repeats, log)
            entries += [entry_of(result, results, one, pair, plan, bandwidth, log) for result in results]
            if answers is not None and one is suite:
                write_answers(answers, one, results, subject.tokenizer)

    return record | {
        **{name: getattr(plan, name) for name in ("seed", "repeats", "max_new_tokens")},
        "device": model.device.type,
        "batch_invariant": is_batch_invariant(model),
        "exact": is_exact(model, plan.exact),
        "dtype": name_of(model.dtype),
        "models": describe_pair(pairs[0]),
        "memory_bandwidth_bytes_per_s": bandwidth,
        "suites": [describe_suite(one) for one in suites],
        "results": entries,
    }


def check_plan(plan: BenchPlan) -> None:
    for name in ("max_new_tokens", "repeats"):
        if getattr(plan, name) < 1:
            raise ConfigError(f"{name}={getattr(plan, name)} must be at least 1")
    for rate in plan.rates:
        if not 0 <= rate <= 1 or math.isnan(rate):
            raise ConfigError(f"acceptance rate {rate} is not a probability; choose 0 to 1")


def check_ways(subject: Subject, plan: BenchPlan) -> None:
    """Raise the errors that `generate` would raise for any of our methods, early and once."""
    for way in plan.ways:
        if way.drafter != NO_DRAFTER and way.drafter not in subject.drafters:
            raise ConfigError(f"drafter {way.drafter!r} is not available; pass --draft FOLDER, or leave it out")
        config = speculative_config(
            subject.drafters.get(way.drafter), way.num_speculative_tokens, **generate_options(way)
        )
        if config.drafter.learns:
            raise ConfigError(
                f"drafter {way.drafter!r} remembers rows that have ended, and a benchmark decodes each prompt several "
                "times; write suffix:learn=false"
            )


def check_suite(pair: Pair, subject: Subject, plan: BenchPlan) -> None:
    for way in plan.ways:
        config = speculative_config(
            subject.drafters.get(way.drafter), way.num_speculative_tokens, **generate_options(way)
        )
        check_prompts(pair.target, pair.prompts, config, way.batch_size, plan.max_new_tokens)


def methods_of(subject: Subject, pair: Pair, suite: Suite, plan: BenchPlan) -> list[Method]:
    length = plan.max_new_tokens
    found = peers(pair, length, plan.batch_sizes) if plan.with_peers else plain_peers(pair, length, plan.batch_sizes)
    found += our_methods(pair, plan.ways, subject.drafters, length, plan.exact)
    return found + forced_acceptance(pair, suite.reference, plan.rates, plan.ks, plan.batch_sizes, length, plan.exact)


def plain_peers(pair: Pair, max_new_tokens: int, batch_sizes: Sequence[int]) -> list[Method]:
    return peers(replace(pair, draft=None), max_new_tokens, batch_sizes, lookup=False)


def entry_of(
    result: Result,
    results: Sequence[Result],
    suite: Suite,
    pair: Pair,
    plan: BenchPlan,
    bandwidth: float | None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    entry = describe_result(result, results, suite)
    if result.method.is_ours and result.is_timed:
        if plan.profiling:
            log(f"stages of {result.method.label}")
            entry["stages"] = profile(pair, result.method, 1)
        if bandwidth is not None and result.observed is not None:
            ideal = least_seconds(result, result.observed.rows, pair, bandwidth)
            entry["roofline_ratio"] = ideal * entry["tokens_per_second"]["median"] / entry["num_new_tokens"]
    return entry


def least_seconds(result: Result, rows: Sequence[RowTimes], pair: Pair, bandwidth: float) -> float:
    """The roofline of all calls of a run."""
    assert result.speculation is not None
    lengths = [len(prompt) for prompt in pair.prompts]
    num_calls = len(result.seconds[0])
    draft = pair.draft if result.speculation.num_draft_calls else None
    per_token = footprint(pair.target).kv_per_token
    return bytes_read(pair.target, draft, result.speculation, num_calls, rows, lengths, per_token) / bandwidth
