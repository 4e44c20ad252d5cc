"""Repeated work: accepted draft tokens a step and tokens/s of the suffix drafter's memory, against prompt lookup.

    python benchmarks/memory.py                     # the shipped pair on the CPU

Two kinds of work, one request after another in batches of --max-rows. `questions`: each of the pair's prompts is asked
several times and sampled, as for rollouts. `edits`: source files of Python's own library are changed turn by turn, an
identifier renamed at a time, and continued greedily after each change from the same place. Every run starts with an
empty memory, so the first round and the first turn show what a memory costs where it knows nothing.

The exit status is 1 if greedy tokens are not those of plain decoding.
"""

from __future__ import annotations

import argparse
import keyword
import random
import re
import statistics
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pairs import CLOCKS, DEMO_PAIR, add_clock, load_pair, positive, write_record
from torch import Tensor
from transformers import AutoTokenizer

import specdec
from specdec.bench.latency import synchronise
from specdec.bench.measure import log_to_stderr
from specdec.bench.methods import Pair
from specdec.bench.report.tables import markdown
from specdec.drafter import Drafter
from specdec.files.environment import environment

FILES = (
    "textwrap",
    "shlex",
    "fnmatch",
    "bisect",
    "colorsys",
    "sched",
    "glob",
    "stat",
    "calendar",
    "queue",
    "cmd",
    "csv",
)
DRAFTERS: dict[str, Callable[[], Drafter | str | None]] = {
    "none": lambda: None,
    "prompt_lookup": lambda: "prompt_lookup",
    "suffix, own text": lambda: specdec.Suffix(learn=False),
    "suffix": lambda: specdec.Suffix(),
}


@dataclass(frozen=True)
class Work:
    """requests: prompts in their order. num_first: how many belong to the first round, before which nothing is known.
    options: of `generate_many`."""

    name: str
    requests: list[Tensor]
    num_first: int
    options: dict[str, Any]


def questions(pair: Pair, rounds: int, temperature: float) -> Work:
    options = {"do_sample": True, "temperature": temperature, "seed": 0, "top_k": 0}
    return Work(f"questions at {temperature:g}", pair.prompts * rounds, len(pair.prompts), options)


def edits(models: Path, turns: int, prompt_tokens: int) -> Work:
    """Turn t of every file, then turn t + 1."""
    tokenizer = AutoTokenizer.from_pretrained(models / "target")
    library = Path(sysconfig.get_paths()["stdlib"])
    histories = [versions((library / f"{name}.py").read_text(), turns, name) for name in FILES]
    requests = [
        torch.tensor(tokenizer(history[turn], verbose=False).input_ids[:prompt_tokens])
        for turn in range(turns)
        for history in histories
    ]
    return Work("edits", requests, len(FILES), {"do_sample": False})


def versions(source: str, turns: int, seed: str) -> list[str]:
    """A file after 0, 1, ... changes: in each an identifier has another name everywhere."""
    names = sorted({name for name in re.findall(r"\b[a-z_]{4,}\b", source[:2000]) if not keyword.iskeyword(name)})
    chosen = random.Random(seed).sample(names, turns - 1)
    found = [source]
    for name in chosen:
        found.append(re.sub(rf"\b{name}\b", f"new_{name}", found[-1]))
    return found


def decode(pair: Pair, work: Work, drafter: Drafter | str | None, arguments: argparse.Namespace) -> tuple[list, float]:
    """Every request's completion, and the seconds."""
    k = {} if drafter is None else {"num_speculative_tokens": arguments.num_speculative_tokens}
    clock = CLOCKS[arguments.clock]
    begin = clock()
    run = specdec.generate_many(
        pair.target, work.requests, drafter=drafter, max_rows=arguments.max_rows, in_order=True, eos_token_id=None,
        max_new_tokens=arguments.max_new_tokens, **k, **work.options,
    )  # fmt: skip
    done = list(run)
    synchronise(pair.target.device)
    return done, clock() - begin


def measured(pair: Pair, work: Work, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By drafter; repeats are interleaved, and each makes its drafter anew."""
    found: dict[str, dict[str, Any]] = {name: {"tokens_per_second": []} for name in DRAFTERS}
    plain: list[list[int]] = []
    for repeat in range(arguments.repeats + 1):  # the first warms up
        for name, made in DRAFTERS.items():
            done, seconds = decode(pair, work, made(), arguments)
            ids = [one.token_ids for one in done]
            plain = plain or ids
            entry = found[name]
            entry |= {"num_equal": sum(map(list.__eq__, ids, plain)) if not work.options["do_sample"] else None}
            entry |= counts("", done) | counts("_at_first", done[: work.num_first])
            entry |= counts("_later", done[work.num_first :])
            if repeat:
                entry["tokens_per_second"].append(sum(map(len, ids)) / seconds)
        log_to_stderr(f"{work.name}, repeat {repeat} of {arguments.repeats}")
    return found


def counts(suffix: str, done: Sequence[specdec.Completion]) -> dict[str, float]:
    """Of steps after the prompts': what a row drafts and accepts in each."""
    steps = sum(one.num_steps for one in done)
    return {
        f"drafted_per_step{suffix}": sum(one.num_draft_tokens for one in done) / steps,
        f"accepted_per_step{suffix}": sum(one.num_accepted_draft_tokens for one in done) / steps,
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = []
    for work, by_name in results.items():
        lookup = by_name["prompt_lookup"]
        for name, entry in by_name.items():
            speed, baseline = (statistics.median(one["tokens_per_second"]) for one in (entry, lookup))
            cells = [f"{entry[f'accepted_per_step{when}']:.2f}" for when in ("_at_first", "_later", "")]
            more = entry["accepted_per_step"] / lookup["accepted_per_step"]
            rows.append([work, name, *cells, f"{more:.2f}", f"{speed:.0f}", f"{speed / baseline:.2f}"])
    head = ["work", "drafter", "accepted a step, first", "later", "all", "x lookup", "tokens/s", "x lookup"]
    return markdown(head, rows)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--prompts", type=positive, default=32, help="how many questions")
    parser.add_argument("--rounds", type=positive, default=8, help="how often each is asked")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.3, 0.7])
    parser.add_argument("--turns", type=positive, default=6, help="versions of each file")
    parser.add_argument("--prompt-tokens", type=positive, default=384, help="of each file")
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    parser.add_argument("--num-speculative-tokens", type=positive, default=8)
    parser.add_argument("--max-rows", type=positive, default=8)
    parser.add_argument("--repeats", type=positive, default=3)
    add_clock(parser)
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/memory-<device>-<date>")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    pair = load_pair(arguments.models, arguments.prompts, getattr(torch, arguments.dtype), device)

    works = [questions(pair, arguments.rounds, temperature) for temperature in arguments.temperatures]
    works.append(edits(arguments.models, arguments.turns, arguments.prompt_tokens))
    results = {work.name: measured(pair, work, arguments) for work in works}
    given = {name: value for name, value in vars(arguments).items() if name not in ("models", "json")}
    now = datetime.now(timezone.utc)
    record = {
        "date": now.isoformat(timespec="seconds"),
        **environment(device, ["python", "benchmarks/memory.py", *argv]),
        "models": pair.name,
        "settings": given,
        "num_requests": {work.name: len(work.requests) for work in works},
        "results": results,
    }
    write_record(record, arguments.json, f"memory-{arguments.device}", now)
    print(table(results))
    num_edits = len(works[-1].requests)
    return 0 if all(entry["num_equal"] == num_edits for entry in results["edits"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
