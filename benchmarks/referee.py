"""The referee against corruptions planted in an engine's outputs, and the cost of certifying relative to generating.

python benchmarks/referee.py --dtype bfloat16

transformers' plain greedy outputs, one prompt at a time and in padded batches, are certified unchanged, then with each
row corrupted in each of several ways. In float32 no unchanged output may differ; in half precision only ties may. The
exit status is 1 if a corruption is not called a bug, or an honest row is.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from pairs import DEMO_PAIR, load_pair, positive, write_record

from specdec.bench.measure import log_to_stderr
from specdec.bench.methods import Pair
from specdec.bench.report.record import describe_pair
from specdec.bench.report.tables import markdown
from specdec.check.certify import certify
from specdec.check.oracle import run_batched, run_plain
from specdec.check.outputs import OutputRow
from specdec.check.settings import greedy_settings
from specdec.files.environment import environment

Ids = list[int]
Corrupt = Callable[[random.Random, Ids, Sequence[Ids], int], Ids]


def swapped(rng: random.Random, ids: Ids, others: Sequence[Ids], vocab_size: int) -> Ids:
    """One token exchanged for another."""
    place = rng.randrange(len(ids))
    return [*ids[:place], (ids[place] + 1 + rng.randrange(vocab_size - 1)) % vocab_size, *ids[place + 1 :]]


def shifted(rng: random.Random, ids: Ids, others: Sequence[Ids], vocab_size: int) -> Ids:
    """As if the first token had been taken for part of the prompt."""
    return [*ids[1:], ids[0]]


def of_another_row(rng: random.Random, ids: Ids, others: Sequence[Ids], vocab_size: int) -> Ids:
    return list(rng.choice([other for other in others if other != ids]))


def truncated(rng: random.Random, ids: Ids, others: Sequence[Ids], vocab_size: int) -> Ids:
    return ids[: rng.randrange(1, len(ids))]


CORRUPTIONS: tuple[Corrupt, ...] = (swapped, shifted, of_another_row, truncated)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--num-prompts", type=positive, default=40)
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--batch-size", type=positive, default=8, help="of transformers' padded batches")
    parser.add_argument("--repeats", type=positive, default=3, help="of the certificate's timing")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/referee-<...>-<date>")
    return parser.parse_args(argv)


def rows_of(prompts: Sequence[torch.Tensor], completions: Sequence[Ids]) -> list[OutputRow]:
    pairs = zip(prompts, completions, strict=True)
    return [OutputRow(prompt.tolist(), list(ids), f"row {index}") for index, (prompt, ids) in enumerate(pairs)]


def honest(pair: Pair, name: str, outputs: list[Ids], seconds: float, arguments: argparse.Namespace) -> dict:
    """Verdicts on unchanged outputs, and the certificate's time as a share of the time to generate them."""
    certificates = [
        certify(pair.target, rows_of(pair.prompts, outputs), arguments.max_new_tokens) for _ in range(arguments.repeats)
    ]
    took = [certificate.seconds for certificate in certificates]
    return {
        "outputs": name,
        "verdicts": dict(Counter(row.kind for row in certificates[0].rows)),
        "seconds_of_generating": seconds,
        "seconds_of_certifying": took,
        "share": statistics.median(took) / seconds,
    }


def planted(pair: Pair, outputs: list[Ids], corrupt: Corrupt, arguments: argparse.Namespace) -> dict:
    """Each row corrupted once; rows that the corruption leaves unchanged (a shifted loop) are left out."""
    rng = random.Random(f"{corrupt.__name__} {arguments.seed}")
    changed = [corrupt(rng, ids, outputs, pair.target.config.vocab_size) for ids in outputs]
    kept = [index for index, ids in enumerate(changed) if ids != outputs[index]]
    rows = rows_of([pair.prompts[index] for index in kept], [changed[index] for index in kept])
    verdicts = Counter(row.kind for row in certify(pair.target, rows, arguments.max_new_tokens).rows)
    return {"corruption": corrupt.__name__, "num_rows": len(kept), "verdicts": dict(verdicts)}


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")}
    record |= environment(device, ["python", "benchmarks/referee.py", *argv])
    pair = load_pair(arguments.models, arguments.num_prompts, getattr(torch, arguments.dtype), device)
    names = ("device", "dtype", "max_new_tokens", "batch_size", "repeats", "seed")
    record |= {name: getattr(arguments, name) for name in names} | {"models": describe_pair(pair)}
    with greedy_settings(pair.target):
        log_to_stderr("transformers generates, one prompt at a time and in batches")
        alone = run_plain(pair.target, pair.prompts, arguments.max_new_tokens)
        size, batched, seconds = arguments.batch_size, [], 0.0
        for first in range(0, len(pair.prompts), size):
            run = run_batched(pair.target, pair.prompts[first : first + size], arguments.max_new_tokens)
            batched, seconds = batched + run.outputs, seconds + run.seconds
    log_to_stderr("the referee judges")
    record["honest"] = [
        honest(pair, "one at a time", alone.outputs, alone.seconds, arguments),
        honest(pair, f"batches of {size}", batched, seconds, arguments),
    ]
    record["planted"] = [planted(pair, alone.outputs, corrupt, arguments) for corrupt in CORRUPTIONS]
    print(summary(record))
    write_record(record, arguments.json, f"referee-{arguments.device}-{arguments.dtype}", now)
    found = all(entry["verdicts"] == {"bug": entry["num_rows"]} for entry in record["planted"])
    return 0 if found and not any("bug" in entry["verdicts"] for entry in record["honest"]) else 1


def summary(record: dict) -> str:
    rows = [
        [f"transformers, {entry['outputs']}", verdicts(entry["verdicts"]), f"{entry['share']:.1%}"]
        for entry in record["honest"]
    ]
    rows += [[entry["corruption"].replace("_", " "), verdicts(entry["verdicts"]), "-"] for entry in record["planted"]]
    return markdown(["rows", "verdicts", "time of certifying / generating"], rows)


def verdicts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
