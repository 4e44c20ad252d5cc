"""What the scripts here share: the folder of a trained pair, where records go, arguments that are numbers."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec.bench.methods import Pair

RESULTS = Path(__file__).resolve().parent / "results"
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
