"""Greedy decoding: ours against transformers' plain, assisted and prompt-lookup generation, in one run.

    python benchmarks/decode.py --device cpu

Every method's token ids are compared with plain decoding of one prompt at a time before anything is timed. The exit
status is 1 if one of our methods is not equal; it is then not timed. Definitions: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from measure import log_to_stderr, measure
from methods import PLAIN, all_methods, load_pair, transformers_method
from record import best_of, describe_pair, describe_result, environment, speed_table, stage_table
from stages import profile

import specdec

RESULTS = Path(__file__).resolve().parent / "results"
QUIET_CORES = 0.2
DEMO_PAIR = Path(specdec.__file__).resolve().parent / "assets" / "demo_pair"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--num-prompts", type=positive, default=16, help="how many of the prompts, from the first")
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--num-speculative-tokens", type=numbers, default=(3, 5, 7), help="K of ours: 3,5,7")
    parser.add_argument("--batch-sizes", type=numbers, default=(1, 8), help="each divides the number of prompts: 1,8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="also show where the time of our methods goes")
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/<device>-<date>.json")
    arguments = parser.parse_args(argv)
    for batch_size in arguments.batch_sizes:
        if arguments.num_prompts % batch_size:
            parser.error(f"--num-prompts {arguments.num_prompts} is no multiple of batch size {batch_size}")
    if not (arguments.models / "prompts.json").is_file():
        parser.error(f"--models {arguments.models} holds no prompts.json; pass a folder with target/ and draft/ too")
    return arguments


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(arguments.seed)
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")} | environment(device, "benchmarks/decode.py", argv)
    pair = load_pair(arguments.models, arguments.num_prompts, getattr(torch, arguments.dtype), device)
    methods = all_methods(pair, arguments.max_new_tokens, arguments.num_speculative_tokens, arguments.batch_sizes)
    reference = transformers_method(pair, PLAIN, 1, None, arguments.max_new_tokens)
    results = measure(pair, reference, methods, arguments.repeats, log_to_stderr)
    names = ("device", "dtype", "seed", "max_new_tokens", "repeats")
    record |= {name: getattr(arguments, name) for name in names} | describe_pair(pair)
    record["results"] = [describe_result(result, results) for result in results]
    print(speed_table(record["results"]))
    if arguments.profile:
        fastest = best_of(results, key=lambda result: (result.method.name, result.method.batch_size))
        log_to_stderr("profiling the fastest K of each of our methods")
        record["profile"] = [profile(pair, result.method, arguments.repeats) for result in fastest]
        if fastest:
            print("\n" + stage_table(record["profile"]))
    path = arguments.json or RESULTS / f"{arguments.device}-{now:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    busiest = max((cores for result in results for cores in result.foreign_cores), default=0.0)
    if busiest > QUIET_CORES:
        log_to_stderr(
            f"other processes kept up to {busiest:.1f} cores busy while this ran; repeat it on a quiet machine"
        )
    wrong = [result.method.label for result in results if result.refused]
    for label in wrong:
        log_to_stderr(f"NOT EQUAL to plain decoding, not timed: {label}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
