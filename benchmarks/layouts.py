"""What a layout of the KV cache costs: ragged, repad (EQSPEC) and grouped (EXSPEC) in one loop, in one run.

    python benchmarks/layouts.py --models FOLDER

Token ids are compared with plain decoding one prompt at a time before anything is timed. Then tokens per second in
interleaved repeats, the share of each stage of a step ("realign" moves keys and values so that rows end together, "move
rows" follows rows that left or took turns), and EXSPEC's grouping rate as a function of its pool.
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
from decode import DEMO_PAIR, RESULTS, numbers, positive
from measure import log_to_stderr, measure
from methods import PLAIN, Batch, Decoded, Method, Pair, load_pair, transformers_method
from record import describe_pair, describe_result, environment, markdown
from stages import profile

import specdec
from specdec.layout import LAYOUTS, Grouped


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
    parser.add_argument("--pools", type=numbers, default=(8, 16, 32, 48), help="rows of the pool that groups come from")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/layouts-<device>-<date>")
    return parser.parse_args(argv)


def methods_of(pair: Pair, arguments: argparse.Namespace) -> list[Method]:
    found = []
    for batch_size in arguments.batch_sizes:
        for name in LAYOUTS:
            layout = Grouped(arguments.group_size) if name == "grouped" else name

            def decode(batch: Batch, layout: object = layout) -> Decoded:
                output = specdec.generate(
                    pair.target, batch.input_ids, batch.attention_mask, drafter=pair.draft, do_sample=False,
                    num_speculative_tokens=arguments.num_speculative_tokens, layout=layout,
                    max_new_tokens=arguments.max_new_tokens, return_dict_in_generate=True,
                )  # fmt: skip
                return Decoded(output.sequences, output.speculation)

            found.append(Method(f"specdec {name}", batch_size, True, arguments.num_speculative_tokens, decode))
    return found


def grouping_rates(pair: Pair, arguments: argparse.Namespace) -> list[dict]:
    """Per pool: the share of steps whose rows ended together already, all prompts in one continuous run."""
    rates = []
    for pool in arguments.pools:
        run = specdec.generate_many(
            pair.target, pair.prompts, drafter=pair.draft, num_speculative_tokens=arguments.num_speculative_tokens,
            max_rows=pool, layout=Grouped(arguments.group_size), max_new_tokens=arguments.max_new_tokens,
        )  # fmt: skip
        num_prompts = sum(1 for _ in run)
        counts = run.speculation
        rates.append(
            {"pool": pool, "group_size": arguments.group_size, "grouping_rate": counts.grouping_rate}
            | {"num_target_calls": counts.num_target_calls, "num_prompts": num_prompts}
            | {"rows_per_call": counts.num_spec_steps / counts.num_target_calls}
        )
    return rates


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")} | environment(device, "benchmarks/layouts.py", argv)
    own = len(json.loads((arguments.models / "prompts.json").read_text()))
    count = min(arguments.num_prompts, own)
    pair = load_pair(arguments.models, count, getattr(torch, arguments.dtype), device)
    times = -(-arguments.num_prompts // len(pair.prompts))
    pair = Pair(pair.name, pair.target, pair.draft, (pair.prompts * times)[: arguments.num_prompts])
    reference = transformers_method(pair, PLAIN, 1, None, arguments.max_new_tokens)
    peers = [transformers_method(pair, PLAIN, size, None, arguments.max_new_tokens) for size in arguments.batch_sizes]
    results = measure(pair, reference, peers + methods_of(pair, arguments), arguments.repeats, log_to_stderr)
    names = ("device", "dtype", "max_new_tokens", "repeats")
    record |= {name: getattr(arguments, name) for name in names} | describe_pair(pair)
    record["results"] = [describe_result(result, results) for result in results]
    log_to_stderr("profiling")
    equal = [result for result in results if result.method.is_ours and not result.refused]
    record["profile"] = [profile(pair, result.method, arguments.repeats) for result in equal]
    record["grouping"] = grouping_rates(pair, arguments)
    print(layout_table(record["profile"], equal))
    grouping = [[str(rate["pool"]), f"{rate['grouping_rate']:.0%}"] for rate in record["grouping"]]
    print("\n" + markdown(["pool", f"steps of {arguments.group_size} rows that needed no realignment"], grouping))
    path = arguments.json or RESULTS / f"layouts-{arguments.device}-{now:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(result.refused for result in results) else 0


def layout_table(profiles: Sequence[dict], results: Sequence) -> str:
    rows = []
    for shares, result in zip(profiles, results, strict=True):
        speeds = sorted(result.tokens_per_second())
        share = shares["share"]
        cells = [f"{share[stage]:.1%}" for stage in ("draft", "verify", "realign", "move rows")]
        steps = result.speculation.grouping_rate
        rows.append([result.method.name, str(result.method.batch_size), f"{speeds[len(speeds) // 2]:.0f}", *cells])
        rows[-1].append(f"{steps:.0%}")
    header = ["layout", "batch", "tokens/s", "draft", "verify", "realign", "move rows", "steps without realignment"]
    return markdown(header, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
