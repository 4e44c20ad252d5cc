"""Decoding of a large shape on one GPU: step times against the memory's bandwidth, tokens per second against peers.

The models are stand-ins (stand_in.py): the cost of the large shape, the text and the acceptance of the small pair. All
our methods run batch-invariant in bfloat16; tokens are compared with transformers' own generate on the same swapped
model before anything is reported. Every part is written to the record as soon as it is measured.

    python benchmarks/gpu_decode.py --pair specdec/assets/demo_pair --out results.json
    python benchmarks/gpu_decode.py --pair specdec/assets/demo_pair --parts grid --methods plain,draft --out grid.json

The grid (`gpu_grid.py`) resumes where the record ends: a cell that is already in --out is not measured again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_grid import METHODS, Grid, run_grid, select, table
from gpu_timing import Record, copy_bandwidth, library_linears, milliseconds, prompts_of, timed_generate
from stand_in import SHAPES, agreement, inflate
from torch import Tensor
from torch.autograd import DeviceType
from transformers import AutoModelForCausalLM, PreTrainedModel

import specdec
from specdec.files.environment import environment
from specdec.kernels.persistent.step import is_faster
from specdec.network.captured.graphs import row_bucket, slot_bucket
from specdec.network.invariant import layers as invariant_layers
from specdec.network.invariant.network import InvariantForward, InvariantNetwork

PARTS = ("copy", "agreement", "steps", "oracle", "tokens", "profile", "peers")
GRID = "grid"  # not part of a call that names no parts


def step_bytes(forward: InvariantForward, model: PreTrainedModel, rows: int, context: int) -> int:
    """The bytes a step must read: weights without the embeddings, and the keys and values of the context."""
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    layer = forward.cache.layers[0]
    return weights + len(forward.layers) * 2 * rows * context * layer.keys[0, 0].nbytes


@torch.no_grad()
def step_times(
    name: str, model: PreTrainedModel, cells: Sequence[tuple[int, int]], context: int, add: Callable
) -> None:
    """cells: (rows, width). A draft model is also timed with its one-launch step, where it uses that."""
    ways = ("in order", "library") if name == "target" else ("in order", "library", "one launch")
    for arithmetic in ways:
        replaced = library_linears if arithmetic == "library" else invariant_layers.in_order_linears
        with mock.patch.object(invariant_layers, "in_order_linears", replaced):
            most, is_exact = row_bucket(max(rows for rows, _ in cells)), arithmetic != "one launch"
            forward = InvariantForward(model, most, context + 256, must_be_exact=is_exact)
            for rows, width in cells:
                if not is_exact and not is_faster(rows * width, slot_bucket(context + width)):
                    continue  # it would take the layer-by-layer path
                ids = torch.randint(3, 2000, (rows, width), device="cuda")
                starts = torch.full((rows,), context, device="cuda")
                used = context + width
                ms = milliseconds(lambda f=forward, i=ids, s=starts, u=used: f.graphs.replay(f, i, s, u, ()))
                needed = step_bytes(forward, model, rows, context)
                add({
                    "model": name, "linears": arithmetic, "rows": rows, "width": width, "context": context,
                    "ms": round(ms, 3), "gb_s": round(needed / ms / 1e6),
                })  # fmt: skip
            del forward
            torch.cuda.empty_cache()


def tokens_per_second(
    models: dict[str, PreTrainedModel], ids: Tensor, mask: Tensor, batch_sizes: Sequence[int],
    draft_lengths: Sequence[int], new_tokens: int, repeats: int, add: Callable,
) -> None:  # fmt: skip
    target = models["target"]
    for batch in batch_sizes:
        rows, row_mask = ids[:batch], mask[:batch]
        settings: list[tuple[str, dict[str, Any]]] = [("plain", {})]
        for k in draft_lengths:
            settings.append((f"draft model, K={k}", {"drafter": models["draft"], "num_speculative_tokens": k}))
        settings.append(("prompt lookup, K=5", {"drafter": "prompt_lookup", "num_speculative_tokens": 5}))
        plain = None
        for name, options in settings:
            runs = [
                timed_generate(target, rows, row_mask, max_new_tokens=new_tokens, do_sample=False, **options)
                for _ in range(repeats + 1)
            ]
            out = runs[0][0]
            plain = out.sequences if plain is None else plain
            new = out.speculation.num_new_tokens
            whole, behind = (statistics.median(run[i] for run in runs[1:]) for i in (1, 2))
            # A step that ends the batch early leaves fewer columns.
            same = out.sequences.shape == plain.shape and (out.sequences == plain).all(1).sum().item()
            add({
                "method": name, "batch_size": batch, "new_tokens": new, "equal_to_plain": f"{int(same)}/{batch}",
                "first_call_seconds": round(runs[0][1], 2), "tokens_per_second": round((new - batch) / behind, 1),
                "tokens_per_second_with_prefill": round(new / whole, 1),
                "step_ms": round(1e3 * behind / max(out.speculation.num_target_calls, 1), 3),
                "mean_acceptance_length": round(out.speculation.mean_acceptance_length, 3),
            })  # fmt: skip


def oracle_agreement(
    models: dict[str, PreTrainedModel], ids: Tensor, num_prompts: int, new_tokens: int, k: int
) -> dict[str, Any]:
    """Compares transformers' own generate on the swapped model, one prompt at a time, with ours in one batch."""
    ids = ids[:num_prompts]
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    expected = [
        models["target"].generate(row[None], attention_mask=torch.ones_like(row[None]), **options)[0] for row in ids
    ]
    ours = specdec.generate(models["target"], ids, drafter=models["draft"], num_speculative_tokens=k, **options)
    equal = sum(torch.equal(want, got[: len(want)]) for want, got in zip(expected, ours, strict=True))
    return {"prompts": num_prompts, "new_tokens": new_tokens, "K": k, "equal": equal}


def profiled(
    models: dict[str, PreTrainedModel], ids: Tensor, mask: Tensor, batch: int, k: int | None
) -> dict[str, Any]:
    """Where a generate call's time goes after its prefill: the share in which the device runs something, by kernel."""
    options: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}
    if k:
        options.update(drafter=models["draft"], num_speculative_tokens=k)
    timed_generate(models["target"], ids[:batch], mask[:batch], **options)
    # The first step after the prefill begins at a mark.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        timed_generate(models["target"], ids[:batch], mask[:batch], **options)
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in trace.events()
        if event.device_type == DeviceType.CUDA
    )
    # The prefill's kernels come first; after it, each step ends in one copy to the host.
    copies = [index for index, span in enumerate(spans) if "Memcpy DtoH" in span[2]]
    first = next(index for index, span in enumerate(spans) if "commit" in span[2])
    first = next(index for index in copies if index > first) + 1
    begin, end, busy, reached = spans[first][0], spans[-1][1], 0.0, spans[first][0]
    by_name: defaultdict[str, float] = defaultdict(float)
    for start, stop, name in spans[first:]:
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
        by_name[name[:60]] += stop - start
    top = sorted(by_name.items(), key=lambda item: -item[1])[:14]
    return {
        "batch_size": batch, "K": k, "busy_share": round(busy / (end - begin), 4),
        "share_by_kernel": {name: round(time / (end - begin), 4) for name, time in top},
    }  # fmt: skip


def peer(model: PreTrainedModel, ids: Tensor, mask: Tensor, new_tokens: int, **options: Any) -> dict[str, Any]:
    """transformers' own generate, after its prefill by the difference from generating one new token."""
    seconds = []
    for count in (1, new_tokens):
        for _ in range(2):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, **options)
            torch.cuda.synchronize()
            took = time.perf_counter() - begin
        seconds.append(took)
    new = len(ids) * (out.shape[1] - ids.shape[1] - 1)
    return {
        "batch_size": len(ids), "tokens_per_second": round(new / (seconds[1] - seconds[0]), 1),
        "step_ms": round(1e3 * len(ids) * (seconds[1] - seconds[0]) / new, 2),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--target-shape", choices=SHAPES, default="8B")
    parser.add_argument("--draft-shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"also {GRID}")
    parser.add_argument("--batch-sizes", help="by default 1,8,32; for the grid 1,8,32,64")
    parser.add_argument("--num-speculative-tokens", help="by default 3,5; for the grid 1,3,5,7")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--contexts", default="512,4096,16384", help="of the grid")
    parser.add_argument("--methods", default=",".join(METHODS), help="of the grid")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after this time the grid begins no further cell"
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-ahead", action="store_true", help="launch nothing before a step's report is read")
    parser.add_argument("--out", type=Path, required=True)
    arguments, begin = parser.parse_args(), time.perf_counter()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - {*PARTS, GRID}:
        parser.error(f"unknown parts {sorted(unknown)}; choose among {', '.join(PARTS)}, {GRID}")
    if arguments.no_ahead:
        InvariantNetwork.runs_ahead = False  # type: ignore[assignment,method-assign]
    is_grid = GRID in parts
    batch_sizes = numbers(arguments.batch_sizes or ("1,8,32,64" if is_grid else "1,8,32"))
    draft_lengths = numbers(arguments.num_speculative_tokens or ("1,3,5,7" if is_grid else "3,5"))
    cells = select(arguments.methods.split(","), batch_sizes, numbers(arguments.contexts), draft_lengths)
    about = {
        **environment(torch.device("cuda"), ["benchmarks/gpu_decode.py", *sys.argv[1:]]),
        "stand_ins": f"{arguments.target_shape} and {arguments.draft_shape} of Qwen3 from {arguments.pair.name}",
        "dtype": "bfloat16", "context": arguments.context, "new_tokens": arguments.new_tokens,
    }  # fmt: skip
    record = (Record.resumed if is_grid else Record)(arguments.out, about)
    if "copy" in parts or (is_grid and "copy" not in record.content):
        record.add("copy", {"gb_s": round(copy_bandwidth() / 1e9)})
    torch.cuda.empty_cache()
    ids = prompts_of(arguments.pair, max(*batch_sizes, 8), arguments.context)
    mask = torch.ones_like(ids)
    models: dict[str, PreTrainedModel] = {}
    for role, shape in (("target", arguments.target_shape), ("draft", arguments.draft_shape)):
        small = AutoModelForCausalLM.from_pretrained(arguments.pair / role, dtype=torch.float32)
        models[role] = inflate(small, SHAPES[shape], torch.bfloat16, "cuda")
        models[role].generation_config.eos_token_id = None
        if "agreement" in parts:
            record.add("agreement", {"model": role, **agreement(small.cuda(), models[role], list(ids[:8]))})
    if "peers" in parts:
        for batch in batch_sizes:
            got = peer(models["target"], ids[:batch], mask[:batch], 32)
            record.add("peers", {"method": "transformers plain, stock modules", **got})
        got = peer(models["target"], ids[:1], mask[:1], 64, assistant_model=models["draft"])
        record.add("peers", {"method": "transformers assisted, stock modules", **got})
    different = 0
    if is_grid:
        prompts = cache(lambda context: prompts_of(arguments.pair, max(*batch_sizes, 2), context))
        bandwidth = 1e9 * record.content["copy"][-1]["gb_s"]
        grid = Grid(models, prompts, bandwidth, arguments.new_tokens, arguments.repeats)
        different = run_grid(cells, grid, record, begin + arguments.seconds)
        print(table(record.content.get(GRID, [])))
    if not set(parts) & {"steps", "oracle", "tokens", "profile"}:
        return int(different > 0)
    with specdec.batch_invariant(models["target"]), specdec.batch_invariant(models["draft"]):
        if "steps" in parts:
            cells = [(1, 1), (8, 1), (32, 1), (1, 6), (8, 6), (32, 4), (32, 6)]
            step_times("target", models["target"], cells, arguments.context, lambda e: record.add("steps", e))
            cells = [(1, 1), (1, 2), (8, 1), (32, 1)]
            step_times("draft", models["draft"], cells, arguments.context, lambda e: record.add("steps", e))
        if "oracle" in parts:
            record.add("oracle", oracle_agreement(models, ids, 8, 64, 5))
        if "tokens" in parts:
            tokens_per_second(
                models, ids, mask, batch_sizes, draft_lengths, arguments.new_tokens, arguments.repeats,
                lambda e: record.add("tokens", e),
            )  # fmt: skip
        if "profile" in parts:
            for batch, k in ((1, None), (1, 5), (8, 5), (batch_sizes[-1], 3)):
                record.add("profile", profiled(models, ids, mask, batch, k))
    return int(different > 0)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
