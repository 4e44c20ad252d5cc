"""The cost model is not slower than plain decoding: tokens per second of one over the other, by drafter and batch size.

    python benchmarks/guarantee.py

Both by the same engine, from the 33rd step on and until the first row ends, with the pair's draft, with a draft of
random weights, and with prompt lookup on sampled text, which repeats little. `cost_model` begins without any knowledge
each time. The exit status is 1 where it has less than 0.97 of plain decoding's speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from pairs import (
    CLOCKS,
    DEMO_PAIR,
    add_clock,
    check_clock,
    cost_clock,
    load_pair,
    numbers,
    positive,
    write_record,
)
from transformers import AutoModelForCausalLM

import specdec
from specdec.bench.latency import synchronise
from specdec.bench.measure import ForeignLoad, log_to_stderr, older_objects_left_alone
from specdec.bench.methods import Batch, Pair, batch_of
from specdec.bench.record import describe_pair
from specdec.bench.statistics import estimate
from specdec.bench.tables import cell, markdown
from specdec.cost_model import CostModel, Knowledge
from specdec.environment import environment
from specdec.oracle import greedy_settings

FIRST_STEPS = 32
LEAST = 0.97  # of plain decoding's speed


def cases(pair: Pair, seed: int) -> list[tuple[str, Any, dict]]:
    """Name, drafter and how to decode."""
    assert pair.draft is not None
    torch.manual_seed(seed)
    random_draft = AutoModelForCausalLM.from_config(pair.draft.config).to(pair.draft.device, pair.draft.dtype).eval()
    greedy = {"do_sample": False}
    sampled = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": seed}
    return [
        ("draft", pair.draft, greedy),
        ("random draft", random_draft, greedy),
        ("prompt_lookup, sampled text", "prompt_lookup", sampled),
    ]


def compare(
    pair: Pair, batch_size: int, drafter: Any, decoding: dict, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Speeds of both, one a repeat. Interleaved, each first in every other repeat; the first of all is a warm-up."""
    repeated = Pair(pair.name, pair.target, pair.draft, (pair.prompts * batch_size)[:batch_size])
    batch = batch_of(repeated, range(batch_size))
    speeds: dict[str, list[float]] = {"plain": [], "cost_model": []}
    for repeat in range(arguments.repeats + 1):
        for way in ("plain", "cost_model")[:: 1 if repeat % 2 else -1]:
            options = dict(decoding)
            if way == "cost_model":
                policy = CostModel(clock=cost_clock(arguments.clock), knowledge=Knowledge())
                options |= {"drafter": drafter, "length_policy": policy}
            speed = speed_behind_first_steps(pair, batch, options, arguments.max_new_tokens, CLOCKS[arguments.clock])
            if repeat:
                speeds[way].append(speed)
    return speeds


def speed_behind_first_steps(
    pair: Pair, batch: Batch, options: dict[str, Any], max_new_tokens: int, clock: Callable[[], float]
) -> float:
    """Tokens per second behind the first steps, while the batch is full: plain decoding ends all rows at once, drafts
    one after the other. Where there are fewer than twice as many steps, behind the first half of them."""
    times, tokens, is_full = [], [], True

    def on_commit(report: specdec.StepReport) -> None:
        nonlocal is_full
        if is_full:
            times.append(clock())
            tokens.append(int(report.num_committed.sum()))
        is_full = is_full and not report.finished.any()

    specdec.generate(
        pair.target, batch.input_ids, batch.attention_mask, max_new_tokens=max_new_tokens, eos_token_id=None,
        on_commit=on_commit, **options,
    )  # fmt: skip
    synchronise(batch.input_ids.device)
    skipped = min(FIRST_STEPS, (len(times) - 1) // 2)  # times[0] is prefill's
    return sum(tokens[skipped + 1 :]) / (times[-1] - times[skipped])


def describe(name: str, batch_size: int, speeds: dict[str, list[float]], foreign_cores: float) -> dict:
    """over_plain: repeat by repeat."""
    ratios = [ours / plain for ours, plain in zip(speeds["cost_model"], speeds["plain"], strict=True)]
    found = {key: asdict(estimate(values)) for key, values in (speeds | {"over_plain": ratios}).items()}
    return {"drafter": name, "batch_size": batch_size, **found, "foreign_cores": foreign_cores}


def table(entries: Sequence[dict]) -> str:
    header = ("drafter", "batch", "plain tokens/s", "cost_model tokens/s", "over plain (95 %)")
    rows = [
        (
            entry["drafter"],
            str(entry["batch_size"]),
            cell(entry["plain"], ".0f"),
            cell(entry["cost_model"], ".0f"),
            cell(entry["over_plain"], ".3f", spread=True),
        )
        for entry in entries
    ]
    return markdown(header, rows)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--num-prompts", type=positive, default=24, help="how many; a larger batch repeats them")
    parser.add_argument("--max-new-tokens", type=positive, default=160)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--batch-sizes", type=numbers, default=(1, 8, 32, 64))
    add_clock(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/guarantee-<device>-<date>")
    arguments = parser.parse_args(argv)
    check_clock(parser, arguments)
    if arguments.max_new_tokens < 2:
        parser.error("--max-new-tokens 1 leaves no step behind prefill; pass 2 or more")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")}
    record |= environment(device, ["python", "benchmarks/guarantee.py", *argv])
    pair = load_pair(arguments.models, arguments.num_prompts, getattr(torch, arguments.dtype), device)
    entries = []
    with greedy_settings(pair.target), older_objects_left_alone():
        ours = cases(pair, arguments.seed)
        for batch_size in arguments.batch_sizes:
            for name, drafter, decoding in ours:
                load = ForeignLoad()
                speeds = compare(pair, batch_size, drafter, decoding, arguments)
                entries.append(describe(name, batch_size, speeds, load.cores()))
                log_to_stderr(f"batch {batch_size}, {name}: {entries[-1]['over_plain']['median']:.3f}")
    names = ("device", "clock", "dtype", "seed", "max_new_tokens", "repeats")
    record |= {name: getattr(arguments, name) for name in names}
    record |= {"models": describe_pair(pair), "guarantee": entries}
    print(table(entries))
    write_record(record, arguments.json, f"guarantee-{arguments.device}", now)
    return 0 if all(entry["over_plain"]["median"] >= LEAST for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
