"""The one-line call, the same call on hand-wrapped models, and transformers, on one pair; see `one_line.py`.

All ways decode the same prompts in the same process, in turns: way by way, round by round. A way is warmed each time it
is entered, since wrapping a model may let go of what the other way keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from call_timing import CallTimes, digest, equal_rows, ratio, share, timed
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.bench.latency import synchronise
from specdec.bench.methods import assistant_settings

ONE_LINE, WRAPPED, TRANSFORMERS = WAYS = ("one line", "wrapped", "transformers")
METHODS = ("plain", "lookup", "draft")
ALMOST = 0.97  # of the wrapped call's speed, the least that a one-line call may have
REFERENCE = (WRAPPED, "plain")  # what all outputs are compared with; the oracle compares it with transformers


class Cell(NamedTuple):
    way: str
    method: str


@dataclass
class Measured:
    """tokens: of each call, [rows][new tokens]; calls of a cell must agree."""

    times: CallTimes
    tokens: list[list[list[int]]] = field(default_factory=list)

    @property
    def hashes(self) -> list[str]:
        return sorted({digest(rows) for rows in self.tokens})


@dataclass(frozen=True)
class Setting:
    """num_speculative_tokens: of drafts, ours and transformers'. rounds: timed calls of each cell."""

    models: dict[str, PreTrainedModel]
    num_speculative_tokens: int
    new_tokens: int
    rounds: int

    def cells(self, batch_size: int) -> list[Cell]:
        """transformers drafts for one prompt only."""
        theirs = ("plain", "draft") if batch_size == 1 else ("plain",)
        return [Cell(way, method) for way in WAYS for method in (theirs if way == TRANSFORMERS else METHODS)]

    @contextmanager
    def entered(self, way: str) -> Iterator[None]:
        with ExitStack() as stack:
            if way == WRAPPED:
                for model in self.models.values():
                    stack.enter_context(specdec.batch_invariant(model))
            elif way == TRANSFORMERS:
                k, constant = self.num_speculative_tokens, {"num_assistant_tokens_schedule": "constant"}
                settings = {"num_assistant_tokens": k, "assistant_confidence_threshold": 0.0, **constant}
                stack.enter_context(assistant_settings(self.models["draft"], **settings))
            yield

    def decode(self, cell: Cell, ids: Tensor, new_tokens: int) -> Tensor:
        """[rows, columns + new_tokens]; every row gets all its tokens."""
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
        if cell.way == TRANSFORMERS:
            if cell.method == "draft":
                options["assistant_model"] = self.models["draft"]
            return self.models["target"].generate(ids, attention_mask=torch.ones_like(ids), **options)

        if cell.method != "plain":
            drafter = self.models["draft"] if cell.method == "draft" else "prompt_lookup"
            options.update(drafter=drafter, num_speculative_tokens=self.num_speculative_tokens)
        return specdec.generate(self.models["target"], ids, torch.ones_like(ids), **options)


def measure(setting: Setting, ids: Tensor, batch_sizes: Sequence[int], add: Callable[[str, dict], None]) -> int:
    """Add an entry for every cell and every ratio. Returns how many rows of ours differ from plain greedy decoding."""
    add("oracle", oracle(setting, ids[:1]))
    return sum(measure_batch(setting, ids[:size], add) for size in batch_sizes)


def measure_batch(setting: Setting, ids: Tensor, add: Callable[[str, dict], None]) -> int:
    found = {cell: Measured(CallTimes(len(ids), setting.new_tokens)) for cell in setting.cells(len(ids))}
    begin = time.perf_counter()
    for number in range(setting.rounds):
        for way in WAYS:
            with setting.entered(way):
                for cell in found:
                    if cell.way == way:
                        run(setting, cell, ids, found[cell], number)

    expected, wrong = found[Cell(*REFERENCE)].tokens[0], 0
    for cell, measured in found.items():
        same = min(equal_rows(tokens, expected) for tokens in measured.tokens)
        if cell.way != TRANSFORMERS:  # whose stock modules have other bits
            wrong += len(ids) - same
        add("decode", {
            "batch_size": len(ids), **cell._asdict(), "new_tokens": setting.new_tokens,
            "num_speculative_tokens": None if cell.method == "plain" else setting.num_speculative_tokens,
            "equal_to_plain": f"{same}/{len(ids)}", "hashes": measured.hashes, **measured.times.summary(),
        })  # fmt: skip
    for entry in ratios({cell: measured.times for cell, measured in found.items()}):
        add("ratios", {"batch_size": len(ids), **entry, "batch_seconds": round(time.perf_counter() - begin, 1)})
    return wrong


def run(setting: Setting, cell: Cell, ids: Tensor, measured: Measured, number: int) -> None:
    """A warm call and a timed one of all tokens, and the round's calls for one token, which are warmed too."""
    call, wait = partial(setting.decode, cell, ids), partial(synchronise, ids.device)
    if cell.way != TRANSFORMERS or number == 0:  # transformers keeps nothing between calls
        measured.tokens.append(new_ones(call(setting.new_tokens), ids))
        call(1)
    seconds, out = timed(partial(call, setting.new_tokens), wait)
    measured.tokens.append(new_ones(out, ids))
    measured.times.whole.append(seconds)
    for _ in range(share(number, setting.rounds)):
        measured.times.prefill.append(timed(partial(call, 1), wait)[0])


def new_ones(out: Tensor, ids: Tensor) -> list[list[int]]:
    return out[:, ids.shape[1] :].tolist()


def ratios(times: dict[Cell, CallTimes]) -> list[dict[str, Any]]:
    """Of each method: the one-line call over the wrapped one, and over transformers' own by the same method or plain.

    prefill_over_plain_ms: by how much the drafter lengthens the one-line call's prefill.
    """
    entries, plain = [], times[Cell(ONE_LINE, "plain")]
    for method in METHODS:
        ours, wrapped = times[Cell(ONE_LINE, method)], times[Cell(WRAPPED, method)]
        theirs = times.get(Cell(TRANSFORMERS, method), times[Cell(TRANSFORMERS, "plain")])
        entries.append({
            "method": method,
            "over_wrapped": ratio(ours.after_prefill, wrapped.after_prefill),
            "over_wrapped_with_prefill": ratio(ours.with_prefill, wrapped.with_prefill),
            "over_transformers": ratio(ours.after_prefill, theirs.after_prefill),
            "over_transformers_with_prefill": ratio(ours.with_prefill, theirs.with_prefill),
            "prefill_over_plain_ms": round(1e3 * (median(ours.prefill) - median(plain.prefill)), 2),
        })  # fmt: skip
    return entries


def oracle(setting: Setting, ids: Tensor) -> dict[str, Any]:
    """Whether our plain decoding is transformers' own `generate` on the batch-invariant model."""
    with setting.entered(WRAPPED):
        ours = setting.decode(Cell(*REFERENCE), ids, setting.new_tokens)
        theirs = setting.decode(Cell(TRANSFORMERS, "plain"), ids, setting.new_tokens)
    same = equal_rows(ours.tolist(), theirs.tolist())
    return {"equal_to_transformers_on_wrapped": f"{same}/{len(ids)}", "new_tokens": setting.new_tokens}


def slower(record: dict[str, Any]) -> list[str]:
    """Where the one-line call is below ALMOST of the wrapped one: "batch N method ratio / ratio with prefill"."""
    pairs = [(e, e["over_wrapped"], e["over_wrapped_with_prefill"]) for e in record.get("ratios", [])]
    return [
        f"batch {entry['batch_size']} {entry['method']} {after} / {whole}"
        for entry, after, whole in pairs
        if whole < ALMOST or (after is not None and after < ALMOST)
    ]


def table(record: dict[str, Any]) -> str:
    """Tokens per second after the prefill / with it, prefill in ms (median, worst), and ratios of the one-line call."""
    speeds = {(e["batch_size"], e["way"], e["method"]): e for e in record.get("decode", [])}
    head = "| batch | method | " + " | ".join(WAYS) + " | over wrapped | over transformers | prefill ms, one line |"
    lines = [head, "|--:|---|" + "--:|" * 6]
    for entry in record.get("ratios", []):
        batch, method = entry["batch_size"], entry["method"]
        cells = [speed(speeds.get((batch, way, method))) for way in WAYS]
        ours = speeds[batch, ONE_LINE, method]
        pairs = [f"{entry[name]} / {entry[f'{name}_with_prefill']}" for name in ("over_wrapped", "over_transformers")]
        prefill = f"{ours['prefill_ms']} ({ours['worst_prefill_ms']})"
        lines.append("| " + " | ".join([str(batch), method, *cells, *pairs, prefill]) + " |")
    return "\n".join(lines)


def speed(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{entry['tokens_per_second']} / {entry['tokens_per_second_with_prefill']}"
