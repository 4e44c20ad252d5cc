"""The cost model on a GPU against every fixed way, from the first call of a process on.

    python benchmarks/cost_model.py --pair specdec/assets/demo_pair --out results.json

Both models are stand-ins (stand_in.py): the cost of the large shapes, the text and the acceptance of the small pair.
Per batch size, in this order: a plain call, which compiles and captures what any call needs; the cost model's first
call and the next ones, with the draft model alone, with a list of drafters, and with a hostile draft model whose tokens
are never accepted; then plain decoding and each fixed K, warm. Fixed ways come last, so that nothing is captured for
the cost model beforehand. Tokens are compared with the plain ones; the exit status is 1 if any differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Record, prompts_of, timed_generate
from stand_in import SHAPES, inflate
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.batch.rows import Rows
from specdec.draft import Draft
from specdec.drafters.draft_model import DraftModel
from specdec.files.environment import environment

FIXED = (1, 2, 3, 5)
LOOKUP = 5  # its fixed K
BARS = {"of the best": 0.97, "hostile, of plain": 0.98, "first call, of plain's first": 0.95}


class HostileDraft(DraftModel):
    """Takes what a draft model takes, and proposes what the target does not write."""

    name = "hostile"

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        drafted = super().propose(rows, max_tokens).token_ids
        return Draft((drafted + 1) % self._shared_vocab)


class Run:
    """All ways at one batch size."""

    def __init__(self, models: dict[str, PreTrainedModel], ids: Tensor, new_tokens: int, repeats: int):
        self.models, self.ids, self.mask = models, ids, torch.ones_like(ids)
        self.new_tokens, self.repeats = new_tokens, repeats
        self.plain: Tensor | None = None
        self.different = 0

    def call(self, **options: Any) -> dict[str, float]:
        out, whole, behind = timed_generate(
            self.models["target"], self.ids, self.mask, max_new_tokens=self.new_tokens, do_sample=False, **options
        )
        self.plain = out.sequences if self.plain is None else self.plain
        self.different += int((out.sequences != self.plain).any(1).sum())
        new, found = out.speculation.num_new_tokens, out.speculation
        return {
            "tokens_per_second": (new - len(self.ids)) / behind,
            "with_prefill": new / whole,
            "mean_acceptance_length": found.mean_acceptance_length,
            "target_calls": found.num_target_calls,
        }

    def calls(self, make: Callable[[], dict[str, Any]], num_warm_up: int = 0) -> list[dict[str, float]]:
        return [self.call(**make()) for _ in range(num_warm_up + self.repeats)][num_warm_up:]

    def all(self) -> dict[str, Any]:
        draft = self.models["draft"]
        plain_first = self.call()
        policy = {"length_policy": "cost_model"}
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            "cost_model": lambda: {"drafter": draft, **policy},
            "cost_model, list": lambda: {"drafter": [draft, "prompt_lookup", None], **policy},
            "cost_model, hostile": lambda: {"drafter": HostileDraft(draft), **policy},
        }
        first, measured = {}, {}
        for name, make in ways.items():
            first[name] = self.call(**make())
            measured[name] = self.calls(make)
        measured["plain"] = self.calls(dict, 1)
        for k in FIXED:
            measured[f"K={k}"] = self.calls(lambda k=k: {"drafter": draft, "num_speculative_tokens": k}, 1)
        lookup = {"drafter": "prompt_lookup", "num_speculative_tokens": LOOKUP}
        measured[f"lookup K={LOOKUP}"] = self.calls(lambda: lookup, 1)
        return judged(plain_first, first, {name: summary(calls) for name, calls in measured.items()}) | {
            "batch_size": len(self.ids), "different_rows": self.different,
        }  # fmt: skip


def summary(calls: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: round(statistics.median(call[key] for call in calls), 3) for key in calls[0] if key != "tokens_per_second"
    }
    rates = [call["tokens_per_second"] for call in calls]
    return {"tokens_per_second": round(statistics.median(rates), 1), "calls": [round(r, 1) for r in rates], **found}


def judged(plain_first: dict[str, float], first: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """The ratios of the bars, by tokens per second after the prefill, and with it where a first call is meant.

    The list is measured against everything; the draft model alone against what it can choose.
    """
    rates = {name: way["tokens_per_second"] for name, way in measured.items()}
    fixed = {name: rate for name, rate in rates.items() if not name.startswith("cost_model")}
    without_lookup = {name: rate for name, rate in fixed.items() if not name.startswith("lookup")}
    ratios = {
        "cost_model, of the best": rates["cost_model"] / max(without_lookup.values()),
        "list, of the best": rates["cost_model, list"] / max(fixed.values()),
        "hostile, of plain": rates["cost_model, hostile"] / rates["plain"],
        "first call, of plain's first": first["cost_model"]["tokens_per_second"] / plain_first["tokens_per_second"],
        "first call, of plain's first, with prefill": first["cost_model"]["with_prefill"] / plain_first["with_prefill"],
    }
    return {
        "best": max(fixed, key=lambda name: fixed[name]),
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "first_calls": {
            name: round(call["tokens_per_second"], 1) for name, call in {"plain": plain_first, **first}.items()
        },
        "ways": measured,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--target-shape", choices=SHAPES, default="8B")
    parser.add_argument("--draft-shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--batch-sizes", default="1,8,32,64")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    batch_sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    about = {
        **environment(torch.device("cuda"), ["benchmarks/cost_model.py", *sys.argv[1:]]),
        "stand_ins": f"{arguments.target_shape} and {arguments.draft_shape} of Qwen3 from {arguments.pair.name}",
        "dtype": "bfloat16", "context": arguments.context, "new_tokens": arguments.new_tokens, "bars": BARS,
    }  # fmt: skip
    record = Record(arguments.out, about)
    models: dict[str, PreTrainedModel] = {}
    for role, shape in (("target", arguments.target_shape), ("draft", arguments.draft_shape)):
        small = AutoModelForCausalLM.from_pretrained(arguments.pair / role, dtype=torch.float32)
        models[role] = inflate(small, SHAPES[shape], torch.bfloat16, "cuda")
        models[role].generation_config.eos_token_id = None
    ids = prompts_of(arguments.pair, max(batch_sizes), arguments.context)
    different = 0
    for size in batch_sizes:
        found = Run(models, ids[:size], arguments.new_tokens, arguments.repeats).all()
        rates = {name: way["tokens_per_second"] for name, way in found["ways"].items()}
        shown = {"batch_size": size, "best": found["best"], **found["ratios"], **rates}
        record.add("batches", found, shown | {"first_calls": found["first_calls"]})
        different += found["different_rows"]
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
