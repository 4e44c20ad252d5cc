"""What look-ahead embeddings are worth (PaSS): tokens a step by L, target calls against plain decoding, and speed.

    python benchmarks/look_ahead.py
    python benchmarks/look_ahead.py --models FOLDER --look-ahead FOLDER

Token ids are compared with transformers' plain greedy decoding before anything is timed; a method that differs is not.
All methods run interleaved in one process. Small models fall into loops, which are easy to guess; "without loops"
leaves those prompts out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from decode import DEMO_PAIR, RESULTS, numbers, positive
from loops import ends_in_loop
from measure import Result, log_to_stderr, measure, speedup
from methods import PLAIN, Batch, Decoded, Method, Pair, load_pair, transformers_method
from record import describe_pair, environment, markdown

import specdec
from specdec.drafter import Drafter
from specdec.drafters.look_ahead import LookAhead

LOOKUP = "prompt_lookup"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--look-ahead", type=Path, help="the embeddings; by default look_ahead/ beside the target")
    parser.add_argument("--num-prompts", type=positive, default=32)
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--num-speculative-tokens", type=numbers, default=tuple(range(1, 9)), help="L, those used")
    parser.add_argument("--batch-sizes", type=numbers, default=(1, 8))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument(
        "--json", type=Path, help="the record; by default benchmarks/results/look-ahead-<device>-<date>"
    )
    return parser.parse_args(argv)


def methods_of(pair: Pair, drafter: LookAhead, arguments: argparse.Namespace) -> list[Method]:
    found = []
    lengths = [k for k in arguments.num_speculative_tokens if k <= drafter.embeddings.num_tokens]
    for batch_size in arguments.batch_sizes:
        found.append(transformers_method(pair, PLAIN, batch_size, None, arguments.max_new_tokens))
        found.append(ours(pair, "specdec plain", batch_size, None, None, arguments.max_new_tokens))
        found += [ours(pair, "specdec look_ahead", batch_size, k, drafter, arguments.max_new_tokens) for k in lengths]
        found.append(ours(pair, f"specdec {LOOKUP}", batch_size, 5, LOOKUP, arguments.max_new_tokens))
    return found


def ours(
    pair: Pair, name: str, batch_size: int, k: int | None, drafter: Drafter | str | None, max_new_tokens: int
) -> Method:
    def decode(batch: Batch) -> Decoded:
        output = specdec.generate(
            pair.target, batch.input_ids, batch.attention_mask, drafter=drafter, num_speculative_tokens=k,
            do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True,
        )  # fmt: skip
        return Decoded(output.sequences, output.speculation)

    return Method(name, batch_size, True, k, decode)


def describe(result: Result, plain: Result, theirs: Result, straight: list[int]) -> dict:
    """plain: our own plain decoding of the same batches; theirs: transformers'. straight: prompts without a loop."""
    done = result.speculation
    per_row, calls = None, None
    if done is not None and plain.speculation is not None:
        per_row = round(done.mean_acceptance_length, 4)
        calls = round(plain.speculation.num_target_calls / done.num_target_calls, 4)
    spread, own = speedup(result, theirs), speedup(result, plain)
    alone = speedup(result, theirs, straight) if result.method.batch_size == 1 and straight else None
    return {
        "method": result.method.name, "num_speculative_tokens": result.method.num_speculative_tokens,
        "batch_size": result.method.batch_size, "equal": f"{result.num_equal}/{len(result.outputs)}",
        "mean_acceptance_length": per_row, "plain_calls_per_call": calls,
        "acceptance_by_position": None if done is None else [round(x, 4) for x in done.acceptance_by_position],
        "tokens_per_second": result.tokens_per_second(), "foreign_cores": result.foreign_cores,
        "x_transformers_plain": spread and spread.median, "x_specdec_plain": own and own.median,
        "x_transformers_plain_without_loops": alone and alone.median,
    }  # fmt: skip


@torch.no_grad()
def mean_length_without_loops(pair: Pair, drafter: LookAhead, k: int, straight: list[int], max_new: int) -> float:
    """Tokens a step over the prompts whose outputs do not end in a loop."""
    accepted = steps = 0
    for index in straight:
        done = specdec.generate(
            pair.target, pair.prompts[index][None].to(pair.target.device), drafter=drafter, num_speculative_tokens=k,
            do_sample=False, max_new_tokens=max_new, return_dict_in_generate=True,
        ).speculation  # fmt: skip
        accepted, steps = accepted + done.num_accepted_draft_tokens, steps + done.num_spec_steps
    return 1 + accepted / max(steps, 1)


def table(rows: Sequence[dict]) -> str:
    head = ["batch", "method", "L", "equal", "tokens per step", "plain calls / calls", "x transformers", "x our plain"]
    names = ("mean_acceptance_length", "plain_calls_per_call", "x_transformers_plain", "x_specdec_plain")
    body = [
        [
            str(row["batch_size"]), row["method"], str(row["num_speculative_tokens"] or ""), row["equal"],
            *("" if row[name] is None else f"{row[name]:.2f}" for name in names),
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(head, body)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    pair = load_pair(arguments.models, arguments.num_prompts, getattr(torch, arguments.dtype), arguments.device)
    drafter = LookAhead.load(arguments.look_ahead or arguments.models / "look_ahead")
    reference = transformers_method(pair, PLAIN, 1, None, arguments.max_new_tokens)
    results = measure(pair, reference, methods_of(pair, drafter, arguments), arguments.repeats, log_to_stderr)
    straight = [i for i, tokens in enumerate(results[0].outputs) if not ends_in_loop(tokens)]
    rows = []
    for batch_size in arguments.batch_sizes:
        some = [result for result in results if result.method.batch_size == batch_size]
        theirs, plain = some[0], some[1]
        rows += [describe(result, plain, theirs, straight) for result in some]
    largest = max(k for k in arguments.num_speculative_tokens if k <= drafter.embeddings.num_tokens)
    alone = mean_length_without_loops(pair, drafter, largest, straight, arguments.max_new_tokens)
    now = datetime.now(timezone.utc)
    record = {"date": now.isoformat(timespec="seconds")}
    record |= environment(torch.device(arguments.device), "benchmarks/look_ahead.py", argv) | describe_pair(pair)
    record |= {name: getattr(arguments, name) for name in ("dtype", "max_new_tokens", "repeats")}
    record |= {
        "embeddings": drafter.embeddings.shape,
        "prompts_without_loops": len(straight),
        "mean_acceptance_length_without_loops": {str(largest): round(alone, 4)},
        "rows": rows,
    }
    name = f"look-ahead-{arguments.device}-{now:%Y-%m-%d}-{pair.name}.json"
    path = arguments.json or RESULTS / name
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    print(f"\nwithout loops ({len(straight)} prompts), L = {largest}: {alone:.2f} tokens per step\n{path}")
    return 0 if all(result.all_equal for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
