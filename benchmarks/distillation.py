"""Does distillation give a better draft than cross-entropy on as many tokens? All losses, on three kinds of data.

    python benchmarks/pack_corpus.py --tokenizer specdec/assets/demo_pair/target --out demo_tokens.npy
    python benchmarks/distillation.py --text demo_tokens.npy --device cuda --jobs 16

A draft of the pair's own shape starts from random weights and learns the training text by cross-entropy. From there
every arm takes the same number of steps over batches of the same number of tokens, each by `specdec train distill`:
cross-entropy on the text (the baseline, the only arm that may choose the best of several learning rates), cross-entropy
on the target's text, and the four divergences of DistillSpec on the text, on the target's continuations of pieces of
it, and on the draft's own. All are then measured on the pair's held-out prompts in float32.

An arm whose result is already in --work is not trained again, and a killed arm resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec.bench.loops import ends_in_loop
from specdec.bench.report.tables import markdown
from specdec.drafters.training.distill.divergences import NAMES
from specdec.drafters.training.distill.validation import Validation, weighted_mean
from specdec.drafters.training.trainer import read_losses
from specdec.files.environment import environment
from specdec.files.loading import encode_prompts, load_model, read_prompts, resolve_device

DATA = ("fixed", "target", "on-policy")
REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = Path(specdec.__file__).parent / "assets" / "demo_pair"
LABELS = {"fixed": "text", "target": "target's", "on-policy": "draft's own"}


@dataclass(frozen=True)
class Arm:
    loss: str
    data: str
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.data}-{self.learning_rate:g}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare losses and data for distilling a draft model.")
    parser.add_argument("--models", type=Path, default=SHIPPED, help="a folder with target/, draft/ and prompts.json")
    parser.add_argument("--text", type=Path, required=True, help="packed tokens, see pack_corpus.py")
    parser.add_argument("--work", type=Path, default=Path("distillation"), help="where the drafts are trained")
    parser.add_argument("--out", type=Path, help="the JSON record; by default results/<...>.json")
    parser.add_argument("--device", nargs="+", default=["cpu"], help="the arms take turns on them")
    parser.add_argument("--jobs", type=int, default=1, help="arms trained at once")
    parser.add_argument("--losses", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--data", nargs="+", default=DATA, choices=DATA)
    parser.add_argument("--warm-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--warm-learning-rate", type=float, default=3e-3)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="learning rate of every divergence")
    parser.add_argument("--baseline-learning-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--texts", type=int, default=16384, help="continuations that the target writes")
    parser.add_argument("--renew-every", type=int, default=32)
    parser.add_argument("--own-reads", type=int, default=1, help="times that each of a draft's own texts is read")
    parser.add_argument("--num-prompts", type=int, help="held-out prompts, all by default")
    parser.add_argument("--new-tokens", type=int, default=128, help="new tokens per held-out prompt")
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--finished-only", action="store_true", help="train nothing; measure the finished arms")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """The baselines, which every comparison needs, then the longest arms first."""
    arms = [Arm("ce", "fixed", rate) for rate in options.baseline_learning_rates]
    arms += [Arm(loss, data, options.learning_rate) for data in reversed(options.data) for loss in options.losses]
    return arms + ([Arm("ce", "target", options.learning_rate)] if "target" in options.data else [])


def random_draft(options: argparse.Namespace) -> Path:
    """A draft of the pair's shape with random weights and the target's tokenizer."""
    folder = options.work / "random"
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.models / "draft"), dtype="float32")
        AutoTokenizer.from_pretrained(options.models / "target").save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def train(options: argparse.Namespace, arm: Arm, start: Path, out: Path, steps: int, seed: int, device: str) -> None:
    """One run of the command; its output goes to a log next to its result."""
    if (out / "config.json").exists():
        return
    more = [] if arm.data == "fixed" else ["--temperature", "0", "--temperature", "1"]
    values = {
        "target": options.models / "target",
        "draft": start,
        "text": options.text,
        "out": out,
        "loss": arm.loss,
        "data": arm.data,
        "steps": steps,
        "learning-rate": arm.learning_rate,
        "batch-rows": options.batch_rows,
        "row-tokens": options.row_tokens,
        "prompt-tokens": options.row_tokens // 3,
        "texts": options.texts,
        "renew-every": options.renew_every,
        "own-reads": options.own_reads,
        "write-batch": 64 if device == "cpu" else 8192,
        "checkpoint-every": 1000,
        "seed": seed,
        "device": device,
        "precision": "float32" if device == "cpu" else "bfloat16",
    }
    command = [sys.executable, "-m", "specdec", "train", "distill", *more]
    command += [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{arm.name} failed; the end of {log}:\n{log.read_text()[-2000:]}")
    print(f"{arm.name}: done", flush=True)


def measure(options: argparse.Namespace, folders: dict[str, Path]) -> dict[str, dict]:
    """name -> measurements, with each prompt's own, all in float32."""
    device = resolve_device(options.device[0])
    target = load_model(options.models / "target", "target", device, "float32")
    tokenizer = AutoTokenizer.from_pretrained(options.models / "target")
    prompts = encode_prompts(tokenizer, read_prompts(options.models / "prompts.json", options.num_prompts))
    validation = Validation(target, prompts, options.new_tokens, options.num_speculative_tokens)
    texts = [row[counted].tolist() for row, counted in zip(*vars(validation.greedy).values(), strict=True)]
    loops = np.array([ends_in_loop(text) for text in texts])
    weights = np.array([len(text) for text in texts]) * ~loops
    found = {}
    for name, folder in folders.items():
        draft = load_model(folder, "draft", device, "float32")
        greedy, sampled = validation.greedy_agreement_by_prompt(draft), validation.sampled_acceptance_by_prompt(draft)
        found[name] = {
            "greedy_agreement": weighted_mean(greedy, validation.greedy),
            "greedy_agreement_without_loops": float(np.average(greedy, weights=weights)) if weights.any() else None,
            "sampled_acceptance": weighted_mean(sampled, validation.sampled),
            "greedy_acceptance_length": validation.acceptance_length(draft, 0.0),
            "sampled_acceptance_length": validation.acceptance_length(draft, 1.0),
            "greedy_by_prompt": [round(value, 5) for value in greedy],
            "sampled_by_prompt": [round(value, 5) for value in sampled],
        }
    return {"drafts": found, "looping_share": float(loops.mean()), "num_prompts": len(prompts)}


def gain(found: dict, baseline: dict, key: str) -> dict[str, float]:
    """Points over the baseline: mean over prompts, and the 95 % interval of a paired bootstrap over prompts."""
    difference = 100 * (np.array(found[key]) - np.array(baseline[key]))
    random = np.random.default_rng(0)
    means = difference[random.integers(len(difference), size=(2000, len(difference)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"points": float(difference.mean()), "low": float(low), "high": float(high)}


def compare(options: argparse.Namespace, arms: list[Arm]) -> dict:
    """The measurements of all arms, and the gain of each over the baseline with the best greedy agreement."""
    folders = {"warm start": options.work / "warm"} | {arm.name: options.work / arm.name for arm in arms}
    measured = measure(options, folders | {"the pair's own draft": options.models / "draft"})
    drafts = measured["drafts"]
    baselines = [arm.name for arm in arms if (arm.loss, arm.data) == ("ce", "fixed")]
    best = {
        key: max(baselines, key=lambda name: drafts[name][value])
        for key, value in (("greedy_by_prompt", "greedy_agreement"), ("sampled_by_prompt", "sampled_acceptance"))
    }
    for found in drafts.values():
        found["greedy_gain"] = gain(found, drafts[best["greedy_by_prompt"]], "greedy_by_prompt")
        found["sampled_gain"] = gain(found, drafts[best["sampled_by_prompt"]], "sampled_by_prompt")
    for found in drafts.values():
        del found["greedy_by_prompt"], found["sampled_by_prompt"]
    for arm in arms:
        losses = read_losses(options.work / arm.name / "training" / "losses.jsonl")
        drafts[arm.name]["last_loss"] = float(np.mean(losses[-20:]))
    return measured | {"baselines": {"greedy": best["greedy_by_prompt"], "sampled": best["sampled_by_prompt"]}}


def table(record: dict, arms: list[Arm]) -> str:
    header = ("loss", "data", "rate", "greedy agreement", "points", "without loops", "1 - TVD at T = 1", "points",
              "tokens/step greedy", "T = 1")  # fmt: skip
    rows = [("warm start", "", "", *cells(record["drafts"]["warm start"]))]
    rows += [(arm.loss, LABELS[arm.data], f"{arm.learning_rate:g}", *cells(record["drafts"][arm.name])) for arm in arms]
    rows.append(("the pair's own", "", "", *cells(record["drafts"]["the pair's own draft"])))
    return markdown(header, rows)


def cells(found: dict) -> tuple[str, ...]:
    def points(gain: dict) -> str:
        return f"{gain['points']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})"

    without = found["greedy_agreement_without_loops"]
    return (
        f"{found['greedy_agreement']:.3f}",
        points(found["greedy_gain"]),
        "-" if without is None else f"{without:.3f}",
        f"{found['sampled_acceptance']:.3f}",
        points(found["sampled_gain"]),
        f"{found['greedy_acceptance_length']:.2f}",
        f"{found['sampled_acceptance_length']:.2f}",
    )


def train_all(options: argparse.Namespace, arms: list[Arm]) -> None:
    warm, out = Arm("ce", "fixed", options.warm_learning_rate), options.work / "warm"
    train(options, warm, random_draft(options), out, options.warm_steps, options.seed, options.device[0])

    def run(arm: Arm, device: str) -> None:  # with another seed, or the baseline would read the warm start's rows again
        train(options, arm, options.work / "warm", options.work / arm.name, options.steps, options.seed + 1, device)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, arms, cycle(options.device)))


def main() -> None:
    options = parse(sys.argv[1:])
    arms = arms_of(options)
    if not options.finished_only:
        train_all(options, arms)
    arms = [arm for arm in arms if (options.work / arm.name / "config.json").exists()]
    device = resolve_device(options.device[0])
    record = {
        **environment(device, ["python", "benchmarks/distillation.py", *sys.argv[1:]]),
        "models": options.models.name,
        "tokens_per_arm": options.steps * options.batch_rows * options.row_tokens,
        "tokens_of_the_warm_start": options.warm_steps * options.batch_rows * options.row_tokens,
        "settings": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        **compare(options, arms),
    }
    results = REPOSITORY / "benchmarks" / "results"
    out = options.out or results / f"distillation-{device.type}-{date.today()}-{options.models.name}.json"
    out.write_text(json.dumps(record, indent=1, default=list) + "\n")
    print(table(record, arms))
    print(f"\nrecord: {out.name}")


if __name__ == "__main__":
    main()
