"""Continuous scheduling: equality with plain decoding, killed and resumed runs, throughput against static batches.

    python benchmarks/continuous.py --prompts question.jsonl

All prompts go through `generate_many` at 16 rows and are compared with transformers' plain greedy decoding of one
prompt at a time. `specdec generate --out` is killed at three random moments and resumed. Then the same prompts, with
output lengths spread evenly over 16 to 256 tokens: static batches in the order of arrival, each decoded to its end
before the next (finished rows leave, none joins), against continuous batches, in interleaved repeats of one run. The
exit status is 1 if anything is not equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from pairs import DEMO_PAIR, load_pair, positive, write_record
from transformers import AutoTokenizer

import specdec
from specdec.batch.layout import LAYOUTS
from specdec.bench.latency import synchronise
from specdec.bench.measure import log_to_stderr
from specdec.bench.methods import Pair
from specdec.bench.report.record import describe_pair
from specdec.bench.report.tables import markdown
from specdec.check.oracle import run_plain
from specdec.check.settings import greedy_settings
from specdec.files.environment import environment
from specdec.files.loading import encode_prompts, read_prompts

MODES = ("equality", "kill", "throughput")
REPOSITORY = Path(__file__).resolve().parent.parent


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--prompts", type=Path, help="prompts in Spec-Bench's or any other format of specdec generate")
    parser.add_argument("--limit", type=positive, help="only the first prompts")
    parser.add_argument("--max-prompt-tokens", type=positive, default=256, help="longer prompts keep their last ones")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="new tokens of equality and kill")
    parser.add_argument("--lengths", default="16,256", help="fewest and most new tokens of the throughput mode")
    parser.add_argument("--max-rows", type=positive, default=16)
    parser.add_argument("--kv-tokens", type=positive, help="budget of the equality mode, to force preemptions")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="ragged")
    parser.add_argument("--modes", default=",".join(MODES), help="some of " + ",".join(MODES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument(
        "--json", type=Path, help="the record; by default benchmarks/results/continuous-<device>-<date>"
    )
    return parser.parse_args(argv)


def equality(pair: Pair, arguments: argparse.Namespace) -> dict:
    """Every prompt's new tokens against plain decoding alone."""
    run = specdec.generate_many(
        pair.target, pair.prompts, drafter=pair.draft, max_rows=arguments.max_rows, kv_tokens=arguments.kv_tokens,
        max_new_tokens=arguments.max_new_tokens, layout=arguments.layout, in_order=True,
    )  # fmt: skip
    begin = time.perf_counter()
    outputs = [done.token_ids for done in run]
    synchronise(pair.target.device)
    seconds = time.perf_counter() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with greedy_settings(pair.target):
        plain = run_plain(pair.target, pair.prompts, arguments.max_new_tokens)
    equal = sum(ours == theirs for ours, theirs in zip(outputs, plain.outputs, strict=True))
    return {
        "num_prompts": len(outputs),
        "num_equal": equal,
        "tokens_per_second": run.speculation.num_new_tokens / seconds,
        "one_by_one_tokens_per_second": plain.tokens_per_second,
        "peak_kv_tokens": run.peak_kv_tokens,
        "num_preemptions": run.num_preemptions,
        "peak_process_mib": memory,
        "speculation": run.speculation.to_dict(),
    }


def kill(pair: Pair, arguments: argparse.Namespace, num_kills: int = 3) -> dict:
    """The command, killed a random moment after it has written a random number of rows, then run to its end."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.models / "target")
    texts = [tokenizer.decode(prompt) for prompt in pair.prompts]
    moments, environment_ = random.Random(0), {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryDirectory() as folder:
        prompts, out = Path(folder) / "prompts.jsonl", Path(folder) / "out.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        command = [sys.executable, "-m", "specdec", "generate", "--target", str(arguments.models / "target"), "--draft"]
        command += [str(arguments.models / "draft"), "--prompts", str(prompts), "--out", str(out), "--device"]
        command += [arguments.device, "--batch-size", str(arguments.max_rows), "--dtype", arguments.dtype]
        command += ["--max-new-tokens", str(arguments.max_new_tokens)]
        counts = [0]
        for least in sorted(moments.sample(range(1, len(texts)), num_kills)):
            process = subprocess.Popen(command, env=environment_, stderr=subprocess.DEVNULL)
            while process.poll() is None and num_lines(out) < max(least, counts[-1] + 1):
                time.sleep(0.005)
            time.sleep(moments.random() / 10)
            process.kill()
            process.wait()
            counts.append(num_lines(out))
            log_to_stderr(f"killed with {counts[-1]} of {len(texts)} rows written")
        subprocess.run(command, env=environment_, check=True, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    encoded = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    expected = specdec.generate_many(
        pair.target, encoded, max_rows=arguments.max_rows, max_new_tokens=arguments.max_new_tokens, in_order=True
    )
    rows.sort(key=lambda row: row["index"])
    each_once = [row["index"] for row in rows] == list(range(len(texts)))
    equal = sum(row["completion_ids"] == done.token_ids for row, done in zip(rows, expected, strict=False))
    return {"rows_when_killed": counts[1:], "num_rows": len(rows), "every_row_once": each_once, "num_equal": equal}


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def throughput(pair: Pair, arguments: argparse.Namespace) -> dict:
    """Tokens per second, static and continuous."""
    least, most = map(int, arguments.lengths.split(","))
    lengths = [random.Random(i).randint(least, most) for i in range(len(pair.prompts))]
    options: dict[str, Any] = dict(
        drafter=pair.draft, max_rows=arguments.max_rows, eos_token_id=None, layout=arguments.layout
    )

    def static() -> list[list[int]]:
        outputs = []
        for first in range(0, len(lengths), arguments.max_rows):
            part = slice(first, first + arguments.max_rows)
            run = specdec.generate_many(
                pair.target, pair.prompts[part], max_new_tokens=lengths[part], in_order=True, **options
            )
            outputs += [done.token_ids for done in run]
        return outputs

    def continuous(order: str) -> list[list[int]]:
        run = specdec.generate_many(
            pair.target, pair.prompts, max_new_tokens=lengths, in_order=True, order=order, **options
        )
        return [done.token_ids for done in run]

    ways = {"static": static} | {order: lambda order=order: continuous(order) for order in ("arrival", "longest_first")}
    outputs, seconds = {}, {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):  # the first checks and warms up
        for name, way in ways.items():
            begin = time.perf_counter()
            result = way()
            synchronise(pair.target.device)
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
            else:
                outputs[name] = result
        log_to_stderr(f"throughput, repeat {repeat} of {arguments.repeats}")
    num_tokens = sum(lengths)
    ratios = {
        name: [a / b for a, b in zip(seconds["static"], seconds[name], strict=True)]
        for name in ways
        if name != "static"
    }
    return {
        "lengths": [least, most],
        "num_tokens": num_tokens,
        "num_equal": {
            name: sum(a == b for a, b in zip(outputs["static"], outputs[name], strict=True)) for name in ways
        },
        "tokens_per_second": {name: [num_tokens / one for one in seconds[name]] for name in ways},
        "speedup_over_static": {name: statistics.median(values) for name, values in ratios.items()},
        "speedups": ratios,
    }


def load(arguments: argparse.Namespace, device: torch.device) -> Pair:
    own = len(json.loads((arguments.models / "prompts.json").read_text()))
    count = min(arguments.limit or own, own)
    pair = load_pair(arguments.models, count, getattr(torch, arguments.dtype), device)
    if arguments.prompts is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.models / "target")
        ids = encode_prompts(tokenizer, read_prompts(arguments.prompts, arguments.limit))
        pair = Pair(pair.name, pair.target, pair.draft, ids)
    return Pair(pair.name, pair.target, pair.draft, [ids[-arguments.max_prompt_tokens :] for ids in pair.prompts])


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")} | environment(
        device, ["python", "benchmarks/continuous.py", *argv]
    )
    pair = load(arguments, device)
    names = ("device", "dtype", "max_rows", "max_new_tokens", "max_prompt_tokens", "layout", "repeats")
    record |= {name: getattr(arguments, name) for name in names} | {"models": describe_pair(pair)}
    num_prompts, sound = len(pair.prompts), []
    for mode in arguments.modes.split(","):
        log_to_stderr(f"{mode}: {num_prompts} prompts")
        result = record[mode] = {"equality": equality, "kill": kill, "throughput": throughput}[mode](pair, arguments)
        equal = result["num_equal"]
        sound += [count == num_prompts for count in (equal.values() if isinstance(equal, dict) else [equal])]
        sound.append(result.get("every_row_once", True))
    print(summary(record))
    write_record(record, arguments.json, f"continuous-{arguments.device}", now)
    return 0 if all(sound) else 1


def summary(record: dict) -> str:
    rows = []
    if found := record.get("equality"):
        rows.append(["equal to plain, one by one", f"{found['num_equal']} of {found['num_prompts']}"])
        rows.append(["tokens in the cache, at most", str(found["peak_kv_tokens"])])
        rows.append(["preemptions", str(found["num_preemptions"])])
    if found := record.get("kill"):
        rows.append(["rows when killed", ", ".join(map(str, found["rows_when_killed"]))])
        rows.append(["every row once", f"{found['every_row_once']}, {found['num_equal']} equal"])
    if found := record.get("throughput"):
        for name, speedup in found["speedup_over_static"].items():
            rows.append([f"continuous, {name}, over static batches", f"{speedup:.2f}x"])
    return markdown(["what", "result"], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
