"""Greedy decoding: `specdec bench` on a folder with a pair, its record kept in benchmarks/results.

    python benchmarks/decode.py --device cpu

transformers' plain, assisted and prompt-lookup generation against ours, in one run. Token ids are compared before
anything is timed; the exit status is 1 if one of our methods is not equal. Definitions: docs/reading-the-report.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import transformers
from pairs import DEMO_PAIR, numbers, positive, write_record

from specdec.bench.measure import log_to_stderr
from specdec.bench.report.tables import all_tables, markdown, summary
from specdec.bench.run import BenchPlan, Subject, run
from specdec.bench.suite import read_questions
from specdec.check.ways import PLAIN, ways
from specdec.cli.common import load_models

DRAFTERS = (PLAIN, "draft_model", "prompt_lookup")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--num-prompts", type=positive, default=16, help="number of prompts, from the first")
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--num-speculative-tokens", type=numbers, default=(3, 5, 7), help="K of our methods: 3,5,7")
    parser.add_argument("--batch-sizes", type=numbers, default=(1, 8), help="prompts decoded together: 1,8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="also show where the time of our methods goes")
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/<device>-<date>.json")
    arguments = parser.parse_args(argv)
    if not (arguments.models / "prompts.json").is_file():
        parser.error(f"--models {arguments.models} holds no prompts.json; pass a folder with target/ and draft/ too")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    now, ks, sizes = datetime.now(timezone.utc), arguments.num_speculative_tokens, arguments.batch_sizes
    folder = arguments.models
    models = load_models(str(folder / "target"), str(folder / "draft"), ["prompt_lookup"], arguments.device,
                         arguments.dtype)  # fmt: skip
    subject = Subject(folder.resolve().name, models.target, models.draft, models.tokenizer, models.drafters())
    questions = read_questions(folder / "prompts.json", arguments.num_prompts)
    plan = BenchPlan(ways(DRAFTERS, ks, sizes), sizes, ks, arguments.max_new_tokens, arguments.repeats, arguments.seed,
                profiling=arguments.profile)  # fmt: skip
    record = run(subject, questions, plan, ["python", "benchmarks/decode.py", *argv], log_to_stderr)
    for title, table in all_tables(record):
        print(f"\n{title}\n\n{markdown(*table)}")
    print("\n" + "\n".join(summary(record)))
    write_record(record, arguments.json, arguments.device, now)
    ours = [entry for entry in record["results"] if entry["is_ours"]]
    return 0 if all(entry["num_equal"] == entry["num_prompts"] for entry in ours) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
