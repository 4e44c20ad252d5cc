"""Every way to call, by the same models, prompts and drafter: none may be slower than `generate`; see `one_line.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from call_timing import digest, equal_rows, ratio, timed
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.bench.latency import synchronise

FACES = ("generate", "generate_many", "engine", "custom_generate")
Drafting = dict[str, Any]


def decode(face: str, target: PreTrainedModel, ids: Tensor, new_tokens: int, drafting: Drafting) -> list[list[int]]:
    """The new tokens of every row. drafting: drafter and num_speculative_tokens, or nothing."""
    mask, rows = torch.ones_like(ids), ids.tolist()
    if face == "generate":
        out = specdec.generate(target, ids, mask, max_new_tokens=new_tokens, do_sample=False, **drafting)
        return out[:, ids.shape[1] :].tolist()
    if face == "custom_generate":
        loop = specdec.speculative(**drafting)
        out = target.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, custom_generate=loop
        )
        return out[:, ids.shape[1] :].tolist()
    if face == "generate_many":
        completions = specdec.generate_many(
            target, rows, max_rows=len(rows), in_order=True, max_new_tokens=new_tokens, do_sample=False, **drafting
        )
        return [done.token_ids for done in completions]
    return by_engine(target, rows, new_tokens, drafting)


def by_engine(target: PreTrainedModel, rows: list[list[int]], new_tokens: int, drafting: Drafting) -> list[list[int]]:
    """All requests at once, then steps until they are finished."""
    with specdec.Engine(target, max_rows=len(rows), **drafting) as engine:
        names = [engine.add_request(specdec.Request(row, max_new_tokens=new_tokens, do_sample=False)) for row in rows]
        found: dict[Any, list[int]] = {name: [] for name in names}
        while not engine.is_finished:
            for event in engine.step():
                found[event.id] += event.token_ids
    return [found[name] for name in names]


def measure(
    models: dict[str, PreTrainedModel], ids: Tensor, batch_sizes: Sequence[int], k: int, new_tokens: int, rounds: int,
    add: Callable[[dict], None],
) -> int:  # fmt: skip
    """Add an entry for every face, drafter and batch size. Returns how many rows are not `generate`'s plain ones."""
    drafters = {"plain": {}, "draft": {"drafter": models["draft"], "num_speculative_tokens": k}}
    wrong = 0
    for batch_size in batch_sizes:
        rows, expected = ids[:batch_size], None
        for method, drafting in drafters.items():
            faces = [face for face in FACES if drafting or face != "custom_generate"]  # which needs a drafter
            calls = {face: partial(decode, face, models["target"], rows, new_tokens, drafting) for face in faces}
            tokens = {face: call() for face, call in calls.items()}
            expected = expected or tokens["generate"]
            seconds: dict[str, list[float]] = {face: [] for face in faces}
            for _ in range(rounds):
                for face, call in calls.items():
                    took, tokens[face] = timed(call, partial(synchronise, ids.device))
                    seconds[face].append(took)
            speeds = {face: batch_size * new_tokens / statistics.median(took) for face, took in seconds.items()}
            for face in faces:
                same = equal_rows(tokens[face], expected)
                wrong += batch_size - same
                add({
                    "batch_size": batch_size, "face": face, "method": method, "new_tokens": new_tokens,
                    "tokens_per_second_with_prefill": round(speeds[face], 1),
                    "over_generate": ratio(speeds[face], speeds["generate"]),
                    "equal_to_plain": f"{same}/{batch_size}", "hash": digest(tokens[face]),
                    "seconds": [round(one, 5) for one in seconds[face]],
                })  # fmt: skip
    return wrong


def table(entries: Sequence[dict]) -> str:
    """Tokens per second with the prefill, and over `generate`."""
    lines = [
        "| batch | method | face | tokens/s with the prefill | over generate | equal |",
        "|--:|---|---|--:|--:|--:|",
    ]
    for e in entries:
        speed = f"{e['tokens_per_second_with_prefill']} | {e['over_generate']}"
        lines.append(f"| {e['batch_size']} | {e['method']} | {e['face']} | {speed} | {e['equal_to_plain']} |")
    return "\n".join(lines)
