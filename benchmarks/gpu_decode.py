"""Decoding of a large shape on one GPU: step times against the memory's bandwidth, tokens per second against peers.

The models are stand-ins (stand_in.py): the cost of the large shape, the text and the acceptance of the small pair. All
of ours run batch-invariant in bfloat16; tokens are compared with transformers' own generate on the same swapped model
before anything is reported. Every part is written to the record as soon as it is measured.

    python benchmarks/gpu_decode.py --pair specdec/assets/demo_pair --out results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from stand_in import SHAPES, agreement, inflate
from torch import Tensor
from torch.autograd import DeviceType
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import specdec
from specdec import StepReport, invariant_network
from specdec.environment import environment
from specdec.invariant_network import InvariantForward
from specdec.loading import read_prompts
from specdec.step_graphs import row_bucket

PARTS = ("copy", "agreement", "steps", "oracle", "tokens", "profile", "peers")


class Record:
    """A JSON file that always holds what has been measured so far."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.content = path, about
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, entry: Any) -> None:
        self.content.setdefault(part, []).append(entry)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        print(part, json.dumps(entry), flush=True)


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median device time of one call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3


def library_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """The library's product in place of ours, for the comparison of speed; its bits depend on the rows."""
    parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def step_bytes(forward: InvariantForward, model: PreTrainedModel, rows: int, context: int) -> int:
    """What a step must at least read: weights without the embeddings, and the keys and values of the context."""
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    layer = forward.cache.layers[0]
    return weights + len(forward.layers) * 2 * rows * context * layer.keys[0, 0].nbytes


@torch.no_grad()
def step_times(
    name: str, model: PreTrainedModel, cells: Sequence[tuple[int, int]], context: int, add: Callable
) -> None:
    """cells: (rows, width)."""
    for arithmetic in ("in order", "library"):
        replaced = library_linears if arithmetic == "library" else invariant_network.in_order_linears
        with mock.patch.object(invariant_network, "in_order_linears", replaced):
            forward = InvariantForward(model, row_bucket(max(rows for rows, _ in cells)), context + 256)
            for rows, width in cells:
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


class Stopwatch:
    """Wall time of a generate call, the prefill apart: its report waits for the device."""

    def __init__(self) -> None:
        self.prefilled = 0.0

    def __call__(self, report: StepReport) -> None:
        if report.is_prefill:
            torch.cuda.synchronize()
            self.prefilled = time.perf_counter()


def timed_generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Any, float, float]:
    """The output, seconds of everything and of everything behind the prefill."""
    watch = Stopwatch()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out = specdec.generate(model, ids, mask, return_dict_in_generate=True, on_commit=watch, **options)
    torch.cuda.synchronize()
    end = time.perf_counter()
    return out, end - begin, end - watch.prefilled


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
    """Tokens of transformers' own generate on the swapped model, one prompt at a time, against ours in one batch."""
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
    """Where a generate call's time goes behind its prefill: the share in which the device runs something, by kernel."""
    options: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}
    if k:
        options.update(drafter=models["draft"], num_speculative_tokens=k)
    timed_generate(models["target"], ids[:batch], mask[:batch], **options)
    # The first step behind the prefill begins at a mark.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        timed_generate(models["target"], ids[:batch], mask[:batch], **options)
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in trace.events()
        if event.device_type == DeviceType.CUDA
    )
    # The prefill's kernels come first: behind it, each step ends in one copy to the host.
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
    """transformers' own generate, behind its prefill by difference to one new token."""
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


def prompts_of(pair: Path, count: int, length: int) -> Tensor:
    """[count, length] tokens: each held-out prompt with others before it."""
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    encoded = [tokenizer(prompt.text)["input_ids"] for prompt in read_prompts(pair / "prompts.json")]
    rows = []
    for row in range(count):
        ids: list[int] = []
        index = row
        while len(ids) < length:
            ids = encoded[index % len(encoded)] + ids
            index += 1
        rows.append(ids[-length:])
    return torch.tensor(rows, device="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--target-shape", choices=SHAPES, default="8B")
    parser.add_argument("--draft-shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--num-speculative-tokens", default="3,5")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    batch_sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    draft_lengths = [int(k) for k in arguments.num_speculative_tokens.split(",")]
    record = Record(arguments.out, {
        **environment(torch.device("cuda"), ["benchmarks/gpu_decode.py", *sys.argv[1:]]),
        "stand_ins": f"{arguments.target_shape} and {arguments.draft_shape} of Qwen3 from {arguments.pair.name}",
        "dtype": "bfloat16", "context": arguments.context,
    })  # fmt: skip
    if "copy" in parts:
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


if __name__ == "__main__":
    main()
