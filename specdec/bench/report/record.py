"""The JSON record of a run: every figure with its interval, and the raw times. Contains no path of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from specdec.bench.loops import ends_in_loop
from specdec.bench.measure import Observed, Result
from specdec.bench.methods import ASSISTED, ASSISTED_K, PLAIN, Pair
from specdec.bench.report.statistics import Estimate, percentiles, rate, speedup
from specdec.bench.suite import Suite
from specdec.engine.metrics import acceptance_length

FORMAT = 1


def describe_model(model: PreTrainedModel) -> dict:
    config = model.config.get_text_config(decoder=True)
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "model_type": config.model_type,
        "num_parameters": model.num_parameters(),
        **{name: getattr(config, name, None) for name in (*sizes, "vocab_size")},
    }


def describe_pair(pair: Pair) -> dict:
    return {
        "name": pair.name,
        "target": describe_model(pair.target),
        "draft": None if pair.draft is None else describe_model(pair.draft),
    }


def describe_suite(suite: Suite) -> dict:
    lengths = [len(prompt) for prompt in suite.prompts]
    loops = [ends_in_loop(tokens) for tokens in suite.reference]
    return {
        "name": suite.name,
        "num_prompts": len(lengths),
        "prompt_tokens": {"min": min(lengths), "mean": fmean(lengths), "max": max(lengths)},
        "num_new_tokens": sum(map(len, suite.reference)),
        "num_shortened": suite.num_shortened,
        "num_looping": sum(loops),
        "categories": suite.categories,
        "digest": suite.digest,
    }


def describe_result(result: Result, results: Sequence[Result], suite: Suite) -> dict:
    """One entry of the record. Speedups are None if there is nothing to compare with, or nothing was timed."""
    method = result.method
    entry: dict[str, Any] = {
        "suite": suite.name,
        "method": method.name,
        "is_ours": method.is_ours,
        "batch_size": method.batch_size,
        "num_speculative_tokens": method.num_speculative_tokens,
        "options": dict(method.options),
        "num_equal": result.num_equal,
        "num_prompts": len(result.outputs),
        "timed": result.is_timed,
        "num_new_tokens": sum(len(tokens) for tokens in result.outputs),
        "tokens_per_second": None,
        "foreign_cores": result.foreign_cores,
    }

    for name, kind, k in (("plain", PLAIN, None), ("assisted", ASSISTED, ASSISTED_K)):
        baseline = find(results, kind, k, method.batch_size)
        entry[f"speedup_over_{name}"] = speedup_of(result, baseline)

    if result.is_timed:
        timing = result.timing
        seconds = [[round(call, 6) for call in repeat] for repeat in result.seconds]
        entry["tokens_per_second"] = asdict(rate(timing))
        entry["calls"] = {"seconds": seconds, "num_new_tokens": [int(count) for count in timing.tokens]}

    if result.failure:
        entry["failure"] = result.failure
    entry |= {} if result.speculation is None else result.speculation.to_dict()
    entry |= {} if result.observed is None else describe_rows(result, result.observed)

    looping = [ends_in_loop(tokens) for tokens in suite.reference]
    entry["without_loops"] = part(result, results, [i for i, loops in enumerate(looping) if not loops])
    entry["categories"] = {
        name: part(result, results, [i for i, asked in enumerate(suite.asked) if asked.category == name])
        for name in suite.categories
    }
    return entry


def describe_rows(result: Result, observed: Observed) -> dict:
    """Latencies in milliseconds, from the start of the call of a row's batch, by the clock inside the calls."""
    first = [1e3 * row.first_token for row in observed.rows]
    last = [1e3 * row.last_token for row in observed.rows]
    found: dict[str, Any] = {
        "time_to_first_token_ms": percentiles(first),
        "latency_ms": percentiles(last),
        "peak_memory_mib": observed.peak_memory_mib,
        "rows": {"first_token_ms": rounded(first), "last_token_ms": rounded(last)},
    }
    if observed.num_target_forwards is not None:
        found["num_target_calls"] = observed.num_target_forwards
    return found


def part(result: Result, results: Sequence[Result], prompts: Sequence[int]) -> dict | None:
    """For some of the prompts: speedup, known at batch 1, and acceptance length. None without prompts."""
    if not prompts:
        return None
    observed = result.observed
    counted = [] if observed is None else [observed.rows[i] for i in prompts]
    steps = sum(row.num_steps for row in counted)
    gained = [row.num_step_tokens for row in counted if row.num_step_tokens is not None]
    plain = find(results, PLAIN, None, result.method.batch_size)
    return {
        "num_prompts": len(prompts),
        "speedup_over_plain": speedup_of(result, plain, prompts) if result.method.batch_size == 1 else None,
        "mean_acceptance_length": acceptance_length(sum(gained), steps) if gained else None,
    }


def speedup_of(result: Result, baseline: Result | None, prompts: Sequence[int] | None = None) -> dict | None:
    if baseline is None or not result.is_timed or not baseline.is_timed:
        return None
    ours, theirs = (one.timing if prompts is None else one.timing_of(prompts) for one in (result, baseline))
    return asdict(speedup(ours, theirs))


def find(results: Sequence[Result], name: str, k: int | None, batch_size: int) -> Result | None:
    wanted = (name, k, batch_size)
    for result in results:
        if (result.method.name, result.method.num_speculative_tokens, result.method.batch_size) == wanted:
            return result
    return None


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def label_of(entry: dict) -> str:
    """The name that distinguishes an entry from the others of its suite."""
    k = entry["num_speculative_tokens"]
    return f"{entry['method']}{'' if k is None else f' K={k}'}, batch {entry['batch_size']}"


def median_of(spread: dict | Estimate | None) -> float | None:
    if spread is None:
        return None
    return spread.median if isinstance(spread, Estimate) else spread["median"]
