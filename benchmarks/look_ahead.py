"""What look-ahead embeddings gain (PaSS): tokens per step by L, target calls against plain decoding, and speed.

    python benchmarks/look_ahead.py --models FOLDER --look-ahead FOLDER

Token ids are compared with transformers' plain greedy decoding first; a method that differs is not timed. All methods
run interleaved in one process. Small models fall into loops, which are easy to guess; "without loops" leaves those
prompts out. The exit status is 1 if any is not equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from pairs import DEMO_PAIR, load_pair, numbers, positive, suite_of, write_record

import specdec
from specdec.bench.latency import StepClock
from specdec.bench.measure import Result, log_to_stderr, measure, older_objects_left_alone
from specdec.bench.methods import PLAIN, Batch, Decoded, Method, Pair, generate, transformers_method
from specdec.bench.report.record import describe_pair, describe_result, describe_suite, find
from specdec.bench.report.statistics import speedup
from specdec.bench.report.tables import cell, markdown
from specdec.bench.suite import Suite
from specdec.check.settings import greedy_settings
from specdec.drafter import Drafter
from specdec.drafters.look_ahead import LookAhead
from specdec.files.environment import environment

LOOKUP = "prompt_lookup"
LOOKUP_K = 5
OUR_PLAIN = "specdec plain"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--look-ahead", type=Path, help="the embeddings; by default look_ahead/ next to the target")
    parser.add_argument("--num-prompts", type=positive, default=32)
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument(
        "--num-speculative-tokens", type=numbers, help="L, the number of embeddings used; by default every possible L"
    )
    parser.add_argument("--batch-sizes", type=numbers, default=(1, 8))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument(
        "--json", type=Path, help="the record; by default benchmarks/results/look-ahead-<device>-<pair>-<date>"
    )
    return parser.parse_args(argv)


def methods_of(pair: Pair, drafter: LookAhead, lengths: Sequence[int], arguments: argparse.Namespace) -> list[Method]:
    def ours(name: str, batch_size: int, k: int | None, drafter: Drafter | str | None) -> Method:
        def decode(batch: Batch, clock: StepClock | None = None) -> Decoded:
            return generate(pair, batch, drafter, k, arguments.max_new_tokens, clock)

        return Method(name, batch_size, True, k, decode)

    found = []
    for batch_size in arguments.batch_sizes:
        found.append(transformers_method(pair, PLAIN, batch_size, None, arguments.max_new_tokens))
        found.append(ours(OUR_PLAIN, batch_size, None, None))
        found += [ours("specdec look_ahead", batch_size, k, drafter) for k in lengths]
        found.append(ours(f"specdec {LOOKUP}", batch_size, LOOKUP_K, LOOKUP))
    return found


def lengths_of(drafter: LookAhead, asked: Sequence[int] | None) -> Sequence[int]:
    """Raises ConfigError if more embeddings are requested than exist."""
    most = drafter.embeddings.num_tokens
    lengths = range(1, most + 1) if asked is None else asked
    if max(lengths) > most:
        raise specdec.ConfigError(f"--num-speculative-tokens {max(lengths)} exceeds the {most} look-ahead embeddings")
    return lengths


def describe(result: Result, results: Sequence[Result], suite: Suite) -> dict:
    """The harness's entry, plus the speed relative to our own plain decoding. plain_calls_per_call: target calls
    without prefill.
    """
    entry = describe_result(result, results, suite)
    plain = find(results, OUR_PLAIN, None, result.method.batch_size)
    assert plain is not None
    timed = result.is_timed and plain.is_timed
    entry["speedup_over_specdec_plain"] = asdict(speedup(result.timing, plain.timing)) if timed else None
    entry["plain_calls_per_call"] = None
    if result.speculation is not None and plain.speculation is not None:
        calls = plain.speculation.num_target_calls / max(result.speculation.num_target_calls, 1)
        entry["plain_calls_per_call"] = calls
    return entry


def table(entries: Sequence[dict]) -> str:
    header = ("batch", "method", "L", "equal", "tokens per step", "without loops", "plain calls / calls",
              "x transformers", "x without loops", "x our plain")  # fmt: skip
    rows = []
    for entry in entries:
        straight = entry["without_loops"] or {}
        rows.append(
            (
                str(entry["batch_size"]),
                entry["method"],
                cell(entry["num_speculative_tokens"], "d"),
                f"{entry['num_equal']}/{entry['num_prompts']}",
                cell(entry.get("mean_acceptance_length")),
                cell(straight.get("mean_acceptance_length")),
                cell(entry["plain_calls_per_call"]),
                cell(entry["speedup_over_plain"]),
                cell(straight.get("speedup_over_plain")),
                cell(entry["speedup_over_specdec_plain"]),
            )
        )
    return markdown(header, rows)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")}
    record |= environment(device, ["python", "benchmarks/look_ahead.py", *argv])
    drafter = LookAhead.load(arguments.look_ahead or arguments.models / "look_ahead")
    lengths = lengths_of(drafter, arguments.num_speculative_tokens)
    pair = load_pair(arguments.models, arguments.num_prompts, getattr(torch, arguments.dtype), device)
    with greedy_settings(pair.target), older_objects_left_alone():
        suite = suite_of(pair, arguments.max_new_tokens)
        methods = methods_of(pair, drafter, lengths, arguments)
        results = measure(pair, suite.reference, methods, arguments.repeats, log_to_stderr)
    record |= {name: getattr(arguments, name) for name in ("device", "dtype", "max_new_tokens", "repeats")}
    record |= {"models": describe_pair(pair), "suites": [describe_suite(suite)], "embeddings": drafter.embeddings.shape}
    record["results"] = [describe(result, results, suite) for result in results]
    looping = record["suites"][0]["num_looping"]
    print(table(record["results"]))
    print(f"\n{looping} of {len(pair.prompts)} continuations end in a loop")
    write_record(record, arguments.json, f"look-ahead-{arguments.device}-{pair.name}", now)
    return 0 if all(result.all_equal for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
