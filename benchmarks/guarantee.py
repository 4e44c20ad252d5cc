"""The cost model is not slower than plain decoding: tokens per second of one over the other, by drafter and batch size.

    python benchmarks/guarantee.py
    python benchmarks/guarantee.py --batch-sizes 32 --drafters random --json part.json
    python benchmarks/guarantee.py --merge part.json other.json --json whole.json

Both run on the same engine, measured from the 33rd step until the first row ends, with the pair's draft, with a draft
of random weights, and with prompt lookup on sampled text, which repeats little. `cost_model` starts without any
knowledge each time. As a control, plain decoding is measured twice in each repeat: its second time over its first is
the noise of the measurement itself. The record is written after every repeat. The exit status is 1 if the cost model
has less than 0.97 of plain decoding's speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
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
from specdec.bench.report.record import describe_pair
from specdec.bench.report.statistics import estimate
from specdec.bench.report.tables import cell, markdown
from specdec.check.settings import greedy_settings
from specdec.files.environment import environment
from specdec.policies.cost_model import CostModel, Knowledge

FIRST_STEPS = 32
LEAST = 0.97  # of plain decoding's speed
WAYS = ("plain", "cost_model", "control")  # control: plain again
DRAFTERS = {"draft": "draft", "random": "random draft", "lookup": "prompt_lookup, sampled text"}


def cases(pair: Pair, seed: int, drafters: Sequence[str] = tuple(DRAFTERS)) -> list[tuple[str, Any, dict]]:
    """Name, drafter and how to decode."""
    assert pair.draft is not None
    torch.manual_seed(seed)
    random_draft = AutoModelForCausalLM.from_config(pair.draft.config).to(pair.draft.device, pair.draft.dtype).eval()
    greedy = {"do_sample": False}
    sampled = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": seed}
    found = {"draft": (pair.draft, greedy), "random": (random_draft, greedy), "lookup": ("prompt_lookup", sampled)}
    return [(DRAFTERS[name], *found[name]) for name in drafters]


def compare(
    pair: Pair, batch_size: int, drafter: Any, decoding: dict, arguments: argparse.Namespace
) -> Iterator[dict[str, list[float]]]:
    """Yields, after every repeat, the speeds of all ways, one per repeat. Interleaved, with the order reversed in every
    other repeat; the first repeat is a warm-up."""
    repeated = Pair(pair.name, pair.target, pair.draft, (pair.prompts * batch_size)[:batch_size])
    batch = batch_of(repeated, range(batch_size))
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(arguments.repeats + 1):
        for way in WAYS[:: 1 if repeat % 2 else -1]:
            options = dict(decoding)
            if way == "cost_model":
                policy = CostModel(clock=cost_clock(arguments.clock), knowledge=Knowledge())
                options |= {"drafter": drafter, "length_policy": policy}
            speed = speed_behind_first_steps(pair, batch, options, arguments.max_new_tokens, CLOCKS[arguments.clock])
            if repeat:
                speeds[way].append(speed)
        if repeat:
            yield speeds


def speed_behind_first_steps(
    pair: Pair, batch: Batch, options: dict[str, Any], max_new_tokens: int, clock: Callable[[], float]
) -> float:
    """Tokens per second after the first steps, while the batch is full: plain decoding ends all rows at once, drafts
    one after the other. If there are fewer than twice as many steps, only the first half is skipped."""
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
    """over_plain: against the mean of the two plain runs around it; control_over_plain: the second against the first.
    Repeat by repeat."""
    plain, ours, control = (np.array(speeds[way]) for way in WAYS)
    ratios = {"over_plain": ours / (0.5 * (plain + control)), "control_over_plain": control / plain}
    found = {key: asdict(estimate([float(x) for x in values])) for key, values in (speeds | ratios).items()}
    return {"drafter": name, "batch_size": batch_size, **found, "foreign_cores": foreign_cores}


def table(entries: Sequence[dict]) -> str:
    header = ("drafter", "batch", "plain tokens/s", "cost_model tokens/s", "over plain (95 %)", "plain over plain")
    rows = [
        (
            entry["drafter"],
            str(entry["batch_size"]),
            cell(entry["plain"], ".0f"),
            cell(entry["cost_model"], ".0f"),
            cell(entry["over_plain"], ".3f", spread=True),
            cell(entry["control_over_plain"], ".3f", spread=True),
        )
        for entry in entries
    ]
    return markdown(header, rows)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument(
        "--num-prompts", type=positive, default=24, help="number of prompts; a larger batch repeats them"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=160)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--batch-sizes", type=numbers, default=(1, 8, 32, 64))
    parser.add_argument("--drafters", nargs="+", choices=tuple(DRAFTERS), default=tuple(DRAFTERS))
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing; merge the cells of these records")
    add_clock(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/guarantee-<device>-<date>")
    arguments = parser.parse_args(argv)
    check_clock(parser, arguments)
    if arguments.max_new_tokens < 2:
        parser.error("--max-new-tokens 1 leaves no step after the prefill; pass 2 or more")
    return arguments


def merged(paths: Sequence[Path]) -> dict:
    """One record of the cells of several, each with its run's settings; if a cell occurs twice, the last one counts."""
    runs = [json.loads(path.read_text()) for path in paths]
    cells = {(entry["batch_size"], entry["drafter"]): entry for run in runs for entry in run["guarantee"]}
    settings = [{key: value for key, value in run.items() if key != "guarantee"} for run in runs]
    order = list(DRAFTERS.values())
    keys = sorted(cells, key=lambda key: (key[0], order.index(key[1])))
    return {"date": max(run["date"] for run in runs), "runs": settings, "guarantee": [cells[key] for key in keys]}


def measure(arguments: argparse.Namespace, argv: Sequence[str], now: datetime) -> dict:
    """The record, which is also written after every repeat."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    device = torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")}
    record |= environment(device, ["python", "benchmarks/guarantee.py", *argv])
    pair = load_pair(arguments.models, arguments.num_prompts, getattr(torch, arguments.dtype), device)
    names = ("device", "clock", "dtype", "seed", "max_new_tokens", "repeats")
    record |= {name: getattr(arguments, name) for name in names}
    entries: list[dict] = []
    record |= {"models": describe_pair(pair), "guarantee": entries}
    with greedy_settings(pair.target), older_objects_left_alone():
        ours = cases(pair, arguments.seed, arguments.drafters)
        for batch_size in arguments.batch_sizes:
            for name, drafter, decoding in ours:
                load, place = ForeignLoad(), len(entries)
                for speeds in compare(pair, batch_size, drafter, decoding, arguments):
                    entries[place:] = [describe(name, batch_size, speeds, load.cores())]
                    write_record(record, arguments.json, f"guarantee-{arguments.device}", now)
                log_to_stderr(f"batch {batch_size}, {name}: {entries[-1]['over_plain']['median']:.3f}")
    return record


def main(argv: Sequence[str]) -> int:
    arguments, now = parse_arguments(argv), datetime.now(timezone.utc)
    if arguments.merge:
        record = merged(arguments.merge)
        write_record(record, arguments.json, f"guarantee-{arguments.device}", now)
    else:
        record = measure(arguments, argv, now)
    print(table(record["guarantee"]))
    return 0 if all(entry["over_plain"]["median"] >= LEAST for entry in record["guarantee"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
