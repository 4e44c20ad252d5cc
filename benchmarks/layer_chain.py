"""Layers of a large model's shape as the short forward runs them: our products against the library's, part by part.

    python benchmarks/layer_chain.py --out layers.json      # one GPU, about a minute

Random weights, a few layers in one captured graph, prefills and steps alike. Attention runs both ways it has (splits
merged in registers and in memory), whose bits must agree; the norms, rotation and activation are held against a copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_timing import copy_bandwidth, library_linears
from stand_in import SHAPES, Shape
from torch import Tensor

from specdec.files.environment import environment
from specdec.kernels.attention import ragged_attention as attention
from specdec.kernels.attention.ragged_attention import ragged_attention
from specdec.kernels.attention.rotary_write import HeadNorm, rotary_write
from specdec.kernels.linear.gated import silu_mul
from specdec.kernels.linear.in_order_linear import in_order_linears
from specdec.kernels.linear.norms import add_rms_norm

CELLS = "1x512,8x512,32x512,1x1,8x1,32x1,8x6,32x6"
CONTEXT = 512  # tokens cached before a step; a prefill (columns >= CONTEXT) starts from nothing
LAYERS = {"8B": 8, "0.6B": 14}  # of a step: more than the cache holds
PREFILL_LAYERS = 4
DEVICE, DTYPE = "cuda", torch.bfloat16
Linears = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


class Chain:
    """Layers without the embedding and the head, over caches of their own."""

    def __init__(self, shape: Shape, num_layers: int, rows: int, width: int):
        self.shape, self.rows, self.width = shape, rows, width
        hidden, dim, heads, kv = shape.hidden_size, shape.head_dim, shape.num_heads, shape.num_kv_heads
        sizes = {
            "qkv": ((heads * dim, kv * dim, kv * dim), hidden),
            "o": ((hidden,), heads * dim),
            "gate_up": ((shape.intermediate_size,) * 2, hidden),
            "down": ((hidden,), shape.intermediate_size),
        }
        self.layers = [
            {name: [randn(out, size_in) / size_in**0.5 for out in outs] for name, (outs, size_in) in sizes.items()}
            for _ in range(num_layers)
        ]
        cached = 0 if width >= CONTEXT else CONTEXT
        self.caches = [[randn(rows, cached + width, kv, dim) for _ in range(2)] for _ in range(num_layers)]
        self.cos, self.sin = randn(cached + width, dim), randn(cached + width, dim)
        self.starts = torch.full((rows,), cached, device=DEVICE)
        ends = cached + 1 + torch.arange(width, device=DEVICE, dtype=torch.int32)
        spans = torch.stack([torch.zeros_like(ends), ends, torch.zeros_like(ends)], -1)
        self.spans = spans.expand(rows, -1, -1).contiguous()
        self.norm, self.head_norm = randn(hidden), HeadNorm(randn(dim), randn(dim), 1e-6)
        self.x, self.residual = randn(rows, width, hidden), randn(rows, width, hidden)

    def __call__(self, linears: Linears) -> Tensor:
        hidden, added = self.residual, self.x
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            normed, hidden = add_rms_norm(added, hidden, self.norm, 1e-6)
            query = self.rotated(linears(normed, layer["qkv"], [None] * 3), keys, values)
            added = linears(self.attended(query, keys, values).flatten(2), layer["o"], [None])
            normed, hidden = add_rms_norm(added, hidden, self.norm, 1e-6)
            added = linears(silu_mul(linears(normed, layer["gate_up"], [None] * 2)), layer["down"], [None])
        return added

    def rotated(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return rotary_write(qkv, self.starts, self.cos, self.sin, keys, values, self.head_norm)

    def attended(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        key, value = keys.transpose(1, 2), values.transpose(1, 2)
        return ragged_attention(query.transpose(1, 2), key, value, self.spans, self.shape.head_dim**-0.5)


def replayed_us(call: Callable[[], Any], num_replays: int = 7) -> float:
    """Median microseconds of the call, captured."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times = []
    for _ in range(num_replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def timed_parts(chain: Chain, linears: Linears, copy: float) -> dict[str, Any]:
    """Each part of a layer alone: microseconds, and what it reaches of TFLOP/s or of a copy's bandwidth."""
    layer, (keys, values) = chain.layers[0], chain.caches[0]
    tokens, found = chain.rows * chain.width, {}
    for name, weights in layer.items():
        x = randn(tokens, weights[0].shape[1])
        us = (
            replayed_us(lambda x=x, weights=weights: [linears(x, weights, [None] * len(weights)) for _ in range(4)]) / 4
        )
        tflop = 2e-12 * tokens * sum(weight.numel() for weight in weights)
        found[name] = {"us": us, "tflop_s": tflop / us * 1e6}
    hidden = chain.x
    qkv = randn(chain.rows, chain.width, sum(map(len, layer["qkv"])))
    gate_up = randn(chain.rows, chain.width, sum(map(len, layer["gate_up"])))
    moved = {
        "norm": (lambda: add_rms_norm(hidden, chain.residual, chain.norm, 1e-6), 4 * hidden.nbytes),
        "rotation": (lambda: chain.rotated(qkv, keys, values), 2 * qkv.nbytes),
        "activation": (lambda: silu_mul(gate_up), 1.5 * gate_up.nbytes),
    }
    for name, (call, num_bytes) in moved.items():
        us = replayed_us(call)
        found[name] = {"us": us, "of_a_copy": num_bytes / us * 1e6 / copy}
    return found


def timed_attention(chain: Chain) -> dict[str, Any]:
    """Microseconds with splits merged in registers, in memory, and of the library's causal attention in a prefill."""
    keys, values = chain.caches[0]
    query = randn(chain.rows, chain.width, chain.shape.num_heads, chain.shape.head_dim)
    outputs, found = [], {}
    for name, filling in (("registers", 1), ("memory", 1 << 30)):
        with mock.patch.object(attention, "FILLING_PROGRAMS", filling):
            outputs.append(chain.attended(query, keys, values))
            found[f"{name}_us"] = replayed_us(lambda: chain.attended(query, keys, values))
    found["same_bits"] = torch.equal(*outputs)
    if chain.width >= CONTEXT:
        operands = [x.transpose(1, 2).contiguous() for x in (query, keys, values)]
        found["library_us"] = replayed_us(
            lambda: F.scaled_dot_product_attention(*operands, is_causal=True, enable_gqa=True)
        )
    return found


def measured(model: str, rows: int, width: int, copy: float) -> dict[str, Any]:
    num_layers = PREFILL_LAYERS if width >= CONTEXT else LAYERS[model]
    chain = Chain(SHAPES[model], num_layers, rows, width)
    entry: dict[str, Any] = {"model": model, "rows": rows, "width": width, "layers": num_layers}
    weight_bytes = sum(weight.nbytes for layer in chain.layers for weights in layer.values() for weight in weights)
    for name, linears in (("ours", in_order_linears), ("library", library_linears)):
        us = replayed_us(lambda linears=linears: chain(linears))
        entry[name] = {"layer_us": us / num_layers, "weights_of_a_copy": weight_bytes / us * 1e6 / copy}
        if width >= CONTEXT:
            entry[name]["parts"] = timed_parts(chain, linears, copy)
    return {**entry, "attention": timed_attention(chain)}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8B,0.6B", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--cells", default=CELLS, help="rows x width")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    copy = copy_bandwidth()
    record = environment(torch.device("cuda"), ["benchmarks/layer_chain.py", *argv])
    record |= {"dtype": "bfloat16", "copy_tb_s": copy / 1e12, "cells": []}
    for model in arguments.models.split(","):
        for cell in arguments.cells.split(","):
            rows, width = map(int, cell.split("x"))
            entry = measured(model, rows, width, copy)
            record["cells"].append(entry)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
            ours, library = entry["ours"], entry["library"]
            print(
                f"{model} {cell}: {ours['layer_us']:.1f} us a layer, library {library['layer_us']:.1f}, weights at "
                f"{ours['weights_of_a_copy']:.2f} of a copy, attention {entry['attention']}",
                flush=True,
            )
            torch.cuda.empty_cache()
    return int(not all(entry["attention"]["same_bits"] for entry in record["cells"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
