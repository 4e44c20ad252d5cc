"""Shared by the scripts here: a trained pair and its prompts, clocks, paths of records, numeric arguments."""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec.bench.methods import Pair
from specdec.bench.suite import Asked, Suite
from specdec.check.oracle import run_batched, run_plain
from specdec.network.invariant.swap import is_batch_invariant
from specdec.policies.costs import HostClock

RESULTS = Path(__file__).resolve().parent / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DEMO_PAIR = Path(specdec.__file__).resolve().parent / "assets" / "demo_pair"


def load_pair(folder: Path, num_prompts: int, dtype: torch.dtype, device: torch.device) -> Pair:
    """The pair in `folder`: target/ (with the tokenizer), draft/, and prompts.json, of which the first are used."""
    prompts = json.loads((folder / "prompts.json").read_text())
    if len(prompts) < num_prompts:
        raise ValueError(
            f"{folder.name}/prompts.json holds {len(prompts)} prompts, fewer than num_prompts={num_prompts}"
        )
    target, draft = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=dtype).eval().to(device)
        for role in ("target", "draft")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    ids = [torch.tensor(tokenizer(prompt).input_ids) for prompt in prompts[:num_prompts]]
    return Pair(folder.resolve().name, target, draft, ids)


def suite_of(pair: Pair, max_new_tokens: int) -> Suite:
    """The pair's prompts as they stand, with plain decoding's answers. Call this within `greedy_settings`.

    transformers decodes them one by one; with a batch-invariant target in one batch, where rows do not affect each
    other.
    """
    if is_batch_invariant(pair.target):
        reference = run_batched(pair.target, pair.prompts, max_new_tokens).outputs
    else:
        reference = run_plain(pair.target, pair.prompts, max_new_tokens).outputs
    return Suite("prompts", pair.prompts, [Asked(index, None, 0) for index in range(len(pair.prompts))], reference)


def add_clock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall",
        help="cpu: CPU time of this process, for one thread on a shared machine",
    )  # fmt: skip


def check_clock(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.clock == "cpu" and (arguments.device != "cpu" or torch.get_num_threads() > 1):
        parser.error("--clock cpu is for --device cpu with one thread; set OMP_NUM_THREADS=1")


def cost_clock(name: str) -> HostClock | None:
    """The same clock for a cost model; None keeps the device's own."""
    return None if name == "wall" else HostClock(CLOCKS[name])


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def write_record(record: dict, path: Path | None, stem: str, now: datetime) -> None:
    """To `path`, by default results/<stem>-<date>.json."""
    path = path or RESULTS / f"{stem}-{now:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
