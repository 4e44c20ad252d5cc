"""Is this revision as fast as an earlier one? The same calls in alternating processes on one machine, tokens compared.

Every process imports specdec from one checkout, decodes the same prompts by the same calls, and reports tokens per
second of each. Processes of both revisions alternate (A B A B A B), so a machine that drifts drifts for both. The
record holds the median ratio of each setting (after / before) and a 95 % bootstrap interval over pairs of processes and
repeats. Tokens must be equal in both, or nothing is reported.

    python benchmarks/revisions.py --before f0de3e7 --pair specdec/assets/demo_pair --out results.json
    python benchmarks/revisions.py --before FOLDER --pair PAIR --device cuda --shapes 8B,0.6B --out results.json

FOLDER is a checkout, for a machine without git (`device_pack.py --revision`). With --shapes the models are stand-ins
(stand_in.py) of these shapes in bfloat16 within `batch_invariant`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
SETTINGS = {"plain": {}, "draft": {"drafter": "draft"}, "lookup": {"drafter": "prompt_lookup"}}


def main() -> int:
    arguments = parsed()
    if arguments.worker is not None:
        worker(arguments)
        return 0

    with tempfile.TemporaryDirectory() as folder:
        before = checkout_of(arguments.before, Path(folder))
        found: dict[str, list[dict]] = {"before": [], "after": []}
        for number in range(arguments.rounds):
            for name, checkout in (("before", before), ("after", HERE)):
                found[name].append(run_worker(checkout))
                print(f"round {number + 1}, {name}: {found[name][-1]['shown']}", flush=True)

    sys.path.insert(0, str(HERE))
    import torch

    from specdec.files.environment import environment

    record = {
        **environment(torch.device(arguments.device), ["benchmarks/revisions.py", *sys.argv[1:]]),
        "before": arguments.before,
        "settings": [compared(key, found) for key in found["after"][0]["tokens_per_second"]],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    for entry in record["settings"]:
        low, high = entry["interval"]
        speeds = f"{entry['before']:9.1f} -> {entry['after']:9.1f} tokens/s"
        other = "" if entry["is_equal"] else "  OTHER TOKENS"
        print(f"{entry['setting']:>16}  {speeds}  ratio {entry['ratio']:.3f} ({low:.3f} to {high:.3f}){other}")
    return int(not all(entry["is_equal"] for entry in record["settings"]))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a git revision, or a folder that holds a checkout")
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", help="target,draft: stand-ins of these shapes, on a GPU")
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of stand-ins")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--methods", default="plain,draft,lookup")
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=8, help="decoded per repeat, in batches")
    parser.add_argument("--repeats", type=int, default=3, help="within each process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each revision")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def checkout_of(before: str, folder: Path) -> Path:
    if Path(before).is_dir():
        return Path(before).resolve()
    archive = subprocess.run(["git", "archive", before], cwd=HERE, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def run_worker(checkout: Path) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(checkout)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(key: str, found: dict[str, list[dict]]) -> dict[str, Any]:
    """One setting in all processes: medians, their ratio and its interval."""
    speeds = {name: [run["tokens_per_second"][key] for run in runs] for name, runs in found.items()}
    hashes = {name: sorted({run["hashes"][key] for run in runs}) for name, runs in found.items()}

    def median(name: str, rounds: list[int]) -> float:
        return statistics.median(speed for index in rounds for speed in speeds[name][index])

    everything = list(range(len(speeds["after"])))
    draw = random.Random(0)
    ratios = []
    for _ in range(2000):
        rounds = draw.choices(everything, k=len(everything))
        resampled = {
            name: statistics.median(
                speed for index in rounds for speed in draw.choices(runs[index], k=len(runs[index]))
            )
            for name, runs in speeds.items()
        }
        ratios.append(resampled["after"] / resampled["before"])
    ratios.sort()
    before, after = median("before", everything), median("after", everything)
    return {
        "setting": key,
        "is_equal": hashes["before"] == hashes["after"] and len(hashes["after"]) == 1,
        "hashes": hashes,
        "before": before,
        "after": after,
        "ratio": after / before,
        "interval": [ratios[49], ratios[1949]],
        "speeds": speeds,
    }


def worker(arguments: argparse.Namespace) -> None:
    """Decode with the specdec of one checkout; the last line of output is the result."""
    checkout = arguments.worker
    sys.path[:0] = [str(checkout), str(checkout / "benchmarks")]
    import torch

    import specdec

    assert Path(specdec.__file__).resolve().is_relative_to(checkout.resolve()), specdec.__file__
    models, ids, mask = loaded(arguments)
    tokens_per_second, hashes = defaultdict(list), {}
    batches = [int(size) for size in arguments.batch_sizes.split(",")]
    methods = arguments.methods.split(",")

    def decode(method: str, batch: int) -> float:
        chosen = dict(SETTINGS[method])
        if chosen.get("drafter") == "draft":
            chosen["drafter"] = models["draft"]
        if chosen:
            chosen["num_speculative_tokens"] = arguments.num_speculative_tokens
        seconds, outputs = 0.0, []
        for first in range(0, max(arguments.prompts, batch), batch):
            rows = slice(first, first + batch)
            begin = time.perf_counter()
            out = specdec.generate(
                models["target"], ids[rows], mask[rows], max_new_tokens=arguments.new_tokens, eos_token_id=None,
                pad_token_id=0, **chosen,
            )  # fmt: skip
            outputs.append(out[:, ids.shape[1] :].cpu())
            seconds += time.perf_counter() - begin
        tokens = torch.cat(outputs)
        hashes[f"{method} batch {batch}"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        return tokens.numel() / seconds

    for batch in batches:
        for method in methods:
            decode(method, batch)  # warm
    for _ in range(arguments.repeats):
        for batch in batches:
            for method in methods:
                tokens_per_second[f"{method} batch {batch}"].append(decode(method, batch))

    shown = {key: round(statistics.median(values), 1) for key, values in tokens_per_second.items()}
    print(json.dumps({"tokens_per_second": tokens_per_second, "hashes": hashes, "shown": shown}))


def loaded(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any, Any]:
    """The pair, and prompts as [rows, columns] with their mask."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import specdec

    count = max(arguments.prompts, *(int(size) for size in arguments.batch_sizes.split(",")))
    models = {}
    for role, number in (("target", 0), ("draft", 1)):
        model = AutoModelForCausalLM.from_pretrained(arguments.pair / role, dtype=torch.float32)
        if arguments.shapes:
            from stand_in import SHAPES, inflate

            model = inflate(model, SHAPES[arguments.shapes.split(",")[number]], torch.bfloat16, arguments.device)
            specdec.make_batch_invariant(model)
        models[role] = model.to(arguments.device).eval()
    if arguments.shapes:
        from gpu_timing import prompts_of

        ids = prompts_of(arguments.pair, count, arguments.context, arguments.device)
        return models, ids, torch.ones_like(ids)

    prompts = json.loads((arguments.pair / "prompts.json").read_text())
    texts = [prompt if isinstance(prompt, str) else prompt["prompt"] for prompt in prompts][:count]
    tokenizer = AutoTokenizer.from_pretrained(arguments.pair / "target", padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = tokenizer(texts, return_tensors="pt", padding=True).to(arguments.device)
    return models, encoded["input_ids"], encoded["attention_mask"]


if __name__ == "__main__":
    sys.exit(main())
