"""The cost of each layout of the KV cache: ragged, repad (EQSPEC) and grouped (EXSPEC) in one loop, in one run.

    python benchmarks/layouts.py --models FOLDER

Token ids are compared with plain decoding, one prompt at a time, before anything is timed. It then measures tokens per
second in interleaved repeats, the share of each stage of a step ("realign" moves keys and values so that rows end
together, "move rows" follows rows that left or took turns), and EXSPEC's grouping rate as a function of its pool.
`specdec bench --layout ragged,repad,grouped` measures the same with groups of 8; here group size and pools can be
chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
import transformers
from pairs import DEMO_PAIR, load_pair, numbers, positive, suite_of, write_record

import specdec
from specdec.batch.layout import LAYOUTS, Grouped, Layout
from specdec.bench.latency import StepClock
from specdec.bench.measure import log_to_stderr, measure, older_objects_left_alone
from specdec.bench.methods import Batch, Decoded, Method, Pair, generate, peers
from specdec.bench.report.record import describe_pair, describe_result, describe_suite
from specdec.bench.report.tables import markdown
from specdec.bench.stages import profile
from specdec.check.settings import greedy_settings
from specdec.files.environment import environment

PROMPTS_PER_PLACE = 2  # of the largest pool
SHOWN = ("draft", "verify", "realign", "move rows")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--num-prompts", type=positive, default=32, help="repeated if the folder has fewer")
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--num-speculative-tokens", type=positive, default=5)
    parser.add_argument("--batch-sizes", type=numbers, default=(1, 8, 32))
    parser.add_argument("--group-size", type=positive, default=8, help="rows per step of the grouped layout")
    parser.add_argument("--pools", type=numbers, default=(8, 16, 32), help="rows of the pool that groups come from")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/layouts-<device>-<date>")
    return parser.parse_args(argv)


def methods_of(pair: Pair, arguments: argparse.Namespace) -> list[Method]:
    k = arguments.num_speculative_tokens

    def method(name: str, batch_size: int) -> Method:
        layout: Layout | str = Grouped(arguments.group_size) if name == Grouped.name else name

        def decode(batch: Batch, clock: StepClock | None = None) -> Decoded:
            return generate(pair, batch, pair.draft, k, arguments.max_new_tokens, clock, {"layout": layout})

        return Method(f"specdec {name}", batch_size, True, k, decode, {"layout": name})

    return [method(name, batch_size) for batch_size in arguments.batch_sizes for name in LAYOUTS]


def grouping_rates(pair: Pair, prompts: Sequence[torch.Tensor], arguments: argparse.Namespace) -> list[dict]:
    """Per pool: the share of steps whose rows already ended together, with all prompts in one continuous run.

    Newcomers are prefilled at once, so that the pool stays full while prompts remain.
    """
    rates = []
    for pool in arguments.pools:
        run = specdec.generate_many(
            pair.target, prompts, drafter=pair.draft, num_speculative_tokens=arguments.num_speculative_tokens,
            max_rows=pool, layout=Grouped(arguments.group_size), max_new_tokens=arguments.max_new_tokens,
            prefill_tokens=pool * max(map(len, prompts)),
        )  # fmt: skip
        num_prompts = sum(1 for _ in run)
        counts = run.speculation
        rates.append(
            {"pool": pool, "group_size": arguments.group_size, "grouping_rate": counts.grouping_rate}
            | {"num_target_calls": counts.num_target_calls, "num_prompts": num_prompts}
            | {"rows_per_call": counts.num_spec_steps / counts.num_target_calls}
        )
    return rates


def load(arguments: argparse.Namespace) -> tuple[Pair, list[torch.Tensor]]:
    """The pair with its prompts, and the prompts of the pools: each only once, as equal ones would group together."""
    own = len(json.loads((arguments.models / "prompts.json").read_text()))
    dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
    wanted = max(arguments.num_prompts, PROMPTS_PER_PLACE * max(arguments.pools))
    pair = load_pair(arguments.models, min(wanted, own), dtype, device)
    times = -(-arguments.num_prompts // len(pair.prompts))
    prompts = (pair.prompts * times)[: arguments.num_prompts]
    return Pair(pair.name, pair.target, pair.draft, prompts), pair.prompts


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")}
    record |= environment(device, ["python", "benchmarks/layouts.py", *argv])
    pair, pooled = load(arguments)
    with greedy_settings(pair.target), older_objects_left_alone():
        suite = suite_of(pair, arguments.max_new_tokens)
        plain = peers(Pair(pair.name, pair.target, None, pair.prompts), arguments.max_new_tokens,
                      arguments.batch_sizes, lookup=False)  # fmt: skip
        results = measure(pair, suite.reference, plain + methods_of(pair, arguments), arguments.repeats, log_to_stderr)
        names = ("device", "dtype", "max_new_tokens", "repeats")
        record |= {name: getattr(arguments, name) for name in names}
        record |= {"models": describe_pair(pair), "suites": [describe_suite(suite)]}
        log_to_stderr("stages and grouping rates")
        record["results"] = []
        for result in results:
            entry = describe_result(result, results, suite)
            if result.method.is_ours and result.is_timed:
                entry["stages"] = profile(pair, result.method, arguments.repeats)
            record["results"].append(entry)
        record["grouping"] = grouping_rates(pair, pooled, arguments)
    print(layout_table([entry for entry in record["results"] if "stages" in entry]))
    grouping = [[str(rate["pool"]), f"{rate['grouping_rate']:.0%}"] for rate in record["grouping"]]
    print("\n" + markdown(["pool", f"steps of {arguments.group_size} rows that needed no realignment"], grouping))
    write_record(record, arguments.json, f"layouts-{arguments.device}", now)
    return 1 if any(result.refused for result in results) else 0


def layout_table(entries: Sequence[dict]) -> str:
    rows = []
    for entry in entries:
        shares = [f"{entry['stages']['share'][stage]:.1%}" for stage in SHOWN]
        speed = f"{median(entry['tokens_per_second']['repeats']):.0f}"
        rows.append([entry["method"], str(entry["batch_size"]), speed, *shares, f"{entry['grouping_rate']:.0%}"])
    return markdown(["layout", "batch", "tokens/s", *SHOWN, "steps without realignment"], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
