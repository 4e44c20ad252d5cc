"""What a decode or verify step takes on a CPU, in milliseconds and bytes of weights a second, against the memory's own.

    python benchmarks/cpu_step.py --model FOLDER --out step.json      # a few minutes

The native step, torch's operations and the model's own modules take turns over the same tokens after the same cached
text; logits are compared first. Next to a model on disk stands a random one of SmolLM2-135M's shape. A step reads every
weight of a product once; the embedding is looked up. The memory's speed is the best of three: a copy (bytes read and
written), a dot product, and the native product of one token with weights larger than any cache.

Other processes take the processor away from steps: the least time is what the step takes, the median what it took here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specdec.bench.measure import ForeignLoad
from specdec.errors import ConfigError
from specdec.files.environment import environment
from specdec.files.output_file import write_atomically
from specdec.network.base import Network
from specdec.network.fused import FusedNetwork
from specdec.network.native.build import library
from specdec.network.native.calls import WRITE, Linear, Native
from specdec.network.native.network import NativeNetwork
from specdec.network.stock import StockNetwork

CELLS = ((1, 1), (1, 6), (8, 1), (8, 6))  # rows, columns
NETWORKS = {"native": NativeNetwork, "torch": FusedNetwork, "modules": StockNetwork}
SMOLLM2 = dict(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
    vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192, rms_norm_eps=1e-5,
)  # fmt: skip
MEMORY_BYTES = 2**29  # of the operands that the memory's speed is measured with
# Sums in another order, relative to the largest logit.
TOLERANCE = 1e-4


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if library() is None:
        raise ConfigError("there is no native step to measure: see the log line before this one")
    models: dict[str, Callable[[], PreTrainedModel]] = {}
    if options.model is not None:
        models[options.model.resolve().parent.name] = lambda: load(options.model)
    if not options.model_alone:
        models["random, SmolLM2-135M's shape"] = smollm2

    cells = []
    memory = memory_speeds(options.repeats)
    for name, make in models.items():
        model = make().eval()
        cells += measure(name, model, options)
    again = memory_speeds(options.repeats)
    memory = {way: max(speed, again[way]) for way, speed in memory.items()}

    record = {
        "format": "cpu-step-1",
        **environment(torch.device("cpu"), [Path(__file__).name, *sys.argv[1:]]),
        "context": options.context,
        "memory_gb_per_s": memory,
        "cells": cells,
    }
    print(table(record))
    if options.out is not None:
        write_atomically(options.out, json.dumps(record, indent=1) + "\n")
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint, loaded in float32")
    parser.add_argument("--model-alone", action="store_true", help="without the random model of SmolLM2-135M's shape")
    parser.add_argument("--repeats", type=int, default=50, help="steps of each network and cell")
    parser.add_argument("--context", type=int, default=256, help="tokens of each row cached before the step")
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    return parser.parse_args(arguments)


def smollm2() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.inference_mode()
def measure(name: str, model: PreTrainedModel, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per cell and network."""
    weights = step_bytes(model)
    num_rows, num_columns = map(max, zip(*CELLS, strict=True))
    slots = options.context + num_columns
    networks = {kind: make(model, num_rows, slots) for kind, make in NETWORKS.items()}
    ids = torch.randint(model.config.vocab_size, (num_rows, slots), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([slots])
    for row in range(num_rows):
        networks["native"].prefill_columns(ids[row : row + 1], lengths, row, 0, options.context)
    for network in networks.values():
        if network is not networks["native"]:
            network.prefill_columns(ids[:1], lengths, 0, 0, 1)  # allocates its cache
            network.cache.copy_from(networks["native"].cache)

    entries = []
    for rows, width in CELLS:
        starts = torch.full((rows,), options.context)
        tokens = ids[:rows, options.context : options.context + width]
        steps = {kind: step_of(network, tokens, starts, options.context + width) for kind, network in networks.items()}
        check(name, {kind: step() for kind, step in steps.items()})
        load, times = ForeignLoad(), timed(steps, options.repeats)
        for kind, seconds in times.items():
            least, middle = min(seconds), statistics.median(seconds)
            entries.append(
                {
                    "model": name, "network": kind, "rows": rows, "width": width, "bytes": weights,
                    "least_ms": round(1e3 * least, 3), "median_ms": round(1e3 * middle, 3),
                    "gb_per_s": round(weights / least / 1e9, 2), "foreign_cores": round(load.cores(), 2),
                }
            )  # fmt: skip
    return entries


def step_bytes(model: PreTrainedModel) -> int:
    """Of the weights that a step reads in full: those of all products."""
    return sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))


def step_of(network: Network, tokens: Tensor, starts: Tensor, used_slots: int) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with network.running():
            return network.forward(tokens, starts, used_slots).logits

    return step


def check(name: str, logits: dict[str, Tensor]) -> None:
    expected = logits["modules"]
    for kind, values in logits.items():
        difference = ((values - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name}: logits of the {kind} step differ from the modules' by {difference:.1e}")


def timed(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, by turns."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(repeats):
        for kind, step in steps.items():
            begin = time.perf_counter()
            step()
            times[kind].append(time.perf_counter() - begin)
    return times


def memory_speeds(repeats: int) -> dict[str, float]:
    """Gigabytes a second, the best of the repeats."""
    native, inputs = Native(), 1024
    weights = torch.empty(MEMORY_BYTES // 4, dtype=torch.float32)
    native.large_pages(weights)
    weights.fill_(0.5)
    other = torch.empty_like(weights)
    native.large_pages(other)
    other.fill_(0.25)
    x, outputs = torch.ones(1, inputs), weights.numel() // inputs
    out, structure = torch.empty(1, outputs), Linear(weights.data_ptr(), None, inputs, outputs)
    ways = {
        "copy, read and written": (2, lambda: other.copy_(weights)),
        "dot product": (2, lambda: torch.dot(weights, other)),
        "native product of one token": (1, lambda: native.linear(structure, x, out, WRITE)),
    }
    times = timed({way: call for way, (_, call) in ways.items()}, repeats)
    return {way: round(times_read * MEMORY_BYTES / min(times[way]) / 1e9, 1) for way, (times_read, _) in ways.items()}


def table(record: dict[str, Any]) -> str:
    machine, memory = record["machine"], record["memory_gb_per_s"]
    best = max(memory.values())
    lines = [
        f"{machine['processor']}, {machine['num_threads']} threads, {record['context']} tokens cached; memory: "
        + ", ".join(f"{way} {speed} GB/s" for way, speed in memory.items()),
        "",
        "| model | rows x columns | network | least ms | median ms | GB/s of weights | of the memory's |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for cell in record["cells"]:
        lines.append(
            f"| {cell['model']} | {cell['rows']} x {cell['width']} | {cell['network']} | {cell['least_ms']:.2f} | "
            f"{cell['median_ms']:.2f} | {cell['gb_per_s']:.1f} | {cell['gb_per_s'] / best:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
