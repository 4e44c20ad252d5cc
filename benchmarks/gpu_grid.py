"""The grid of `gpu_decode.py`: methods, batch sizes and contexts as cells that are measured once and kept.

Our methods run batch-invariant and must equal plain decoding token for token before they are timed; plain decoding
itself equals transformers' own on the same swapped model (method `oracle`). Peers run the stock modules, whose bfloat16
tokens may differ. A cell that does not fit in the device's memory says so in its record.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_timing import Record, timed_generate
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import specdec
from specdec import Speculation
from specdec.bench.latency import synchronise
from specdec.bench.methods import assistant_settings
from specdec.bench.roofline import weight_bytes
from specdec.bench.stages import own_methods
from specdec.engine.target import Target
from specdec.errors import SpecDecError

OURS = ("oracle", "plain", "draft", "lookup")
PEERS = ("peer_plain", "peer_static", "peer_assisted", "peer_lookup")
METHODS = (*OURS, *PEERS)
DRAFTING = ("draft", "lookup", "peer_assisted", "peer_lookup")
ONE_ROW = ("oracle", "peer_assisted", "peer_lookup")  # transformers speculates only for one prompt at a time
LOOKUP_K = 5
STATIC_CONTEXT = 1024  # compiling a static cache takes a minute or two, so only for contexts up to this


@dataclass(frozen=True)
class Cell:
    """num_speculative_tokens: None if nothing is drafted."""

    method: str
    batch_size: int
    context: int
    num_speculative_tokens: int | None = None


def select(
    methods: Sequence[str], batch_sizes: Sequence[int], contexts: Sequence[int], draft_lengths: Sequence[int]
) -> list[Cell]:
    """The cells, short contexts first; draft lengths are for our draft model, other drafters draft LOOKUP_K tokens.

    Raises ValueError for an unknown method.
    """
    unknown = set(methods) - set(METHODS)
    if unknown:
        raise ValueError(f"unknown methods {sorted(unknown)}; choose among {', '.join(METHODS)}")
    cells = []
    for context in sorted(set(contexts)):
        for method in (name for name in METHODS if name in methods):
            if method == "peer_static" and context > STATIC_CONTEXT:
                continue
            for batch_size in (1,) if method in ONE_ROW else sorted(set(batch_sizes)):
                ks = draft_lengths if method == "draft" else (LOOKUP_K,) if method in DRAFTING else (None,)
                cells += [Cell(method, batch_size, context, k) for k in ks]
    return cells


def missing(cells: Sequence[Cell], measured: Sequence[dict]) -> list[Cell]:
    """The cells that are not yet in the record."""
    done = [Cell(**{name: entry[name] for name in Cell.__dataclass_fields__}) for entry in measured]
    return [cell for cell in cells if cell not in done]


class Traffic(NamedTuple):
    """Bytes that a forward of a model reads: its weights, and bytes per row and cached token."""

    weights: int
    kv_per_token: int


def traffic(model: PreTrainedModel) -> Traffic:
    config = model.config
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return Traffic(weight_bytes(model), cached * model.dtype.itemsize)


def bytes_moved(target: Traffic, draft: Traffic | None, speculation: Speculation, mean_length: float) -> float:
    """The fewest bytes that the steps of a generation had to read after its prefill."""
    rows = speculation.num_spec_steps / max(speculation.num_target_calls, 1)
    total = speculation.num_target_calls * (target.weights + rows * mean_length * target.kv_per_token)
    if draft is not None:
        total += speculation.num_draft_calls * (draft.weights + rows * mean_length * draft.kv_per_token)
    return total


class EventClock:
    """Device time of a step's stages, by events that nothing waits for.

    draft: the drafter's proposal. verify: the target's forward. commit: acceptance, up to the report's copy to the
    host. host_gap: between these, when the device waits for the host's next launch. Work launched ahead, within a
    commit, counts towards its own stage.
    """

    STAGES = ("draft", "verify", "commit", "host_gap")

    def __init__(self, event: Callable[[], Any]):
        """event: makes an event recorded at this moment, with `elapsed_time` like torch's."""
        self.event = event
        self.marks: list[tuple[str, Any]] = []

    def mark(self, stage: str) -> None:
        self.marks.append((stage, self.event()))

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            drafting = [(*place, self.stage("draft")) for name in ("propose", "begin") for place in own_methods(name)]
            verifying = [(Target, "forward", self.stage("verify")), (Target, "commit", self.stage("commit"))]
            for owner, name, timed in [*drafting, *verifying]:
                stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
            yield

    def stage(self, name: str) -> Callable[[Callable], Callable]:
        def timing(original: Callable) -> Callable:
            def timed(*arguments: Any) -> Any:
                self.mark(name)
                result = original(*arguments)
                self.mark("host_gap")
                return result

            return timed

        return timing

    def ms_per_step(self) -> dict[str, float]:
        """Times between the first and the last mark; the events must have completed."""
        total = dict.fromkeys(self.STAGES, 0.0)
        for (stage, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            total[stage] += begin.elapsed_time(end)
        steps = max(sum(stage == "commit" for stage, _ in self.marks), 1)
        return {stage: round(ms / steps, 4) for stage, ms in total.items()}


def cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Grid:
    """Measures cells. prompts: [rows, context] token ids of a context. bandwidth: of a copy, bytes per second."""

    def __init__(
        self, models: dict[str, PreTrainedModel], prompts: Callable[[int], Tensor], bandwidth: float, new_tokens: int,
        repeats: int, event: Callable[[], Any] = cuda_event,
    ):  # fmt: skip
        self.models, self.prompts, self.bandwidth = models, prompts, bandwidth
        self.new_tokens, self.repeats, self.event = new_tokens, repeats, event
        self.num_different = 0
        self._plain: dict[tuple[int, int], Tensor] = {}

    def run(self, cells: Sequence[Cell], record: Record, deadline: float = math.inf) -> None:
        """Add each cell to the record as soon as it is measured; begin none after the deadline."""
        for cell in cells:
            if time.perf_counter() > deadline:
                return
            ids = self.prompts(cell.context)[: cell.batch_size]
            measure = {"oracle": self._oracle, **dict.fromkeys(OURS[1:], self._ours)}.get(cell.method, self._peer)
            begin = time.perf_counter()
            try:
                entry = measure(cell, ids)
            except (torch.OutOfMemoryError, SpecDecError) as error:
                entry = {"not_served": f"{type(error).__name__}: {error}"[:400]}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            record.add("grid", {**asdict(cell), **entry, "cell_seconds": round(time.perf_counter() - begin, 1)})

    def _options(self, cell: Cell) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": False}
        if cell.method == "draft":
            options.update(drafter=self.models["draft"], num_speculative_tokens=cell.num_speculative_tokens)
        elif cell.method == "lookup":
            options.update(drafter="prompt_lookup", num_speculative_tokens=cell.num_speculative_tokens)
        return options

    def _plain_output(self, ids: Tensor) -> Tensor:
        if ids.shape not in self._plain:
            options = self._options(Cell("plain", *ids.shape))
            self._plain[ids.shape] = timed_generate(self.models["target"], ids, torch.ones_like(ids), **options)[
                0
            ].sequences
        return self._plain[ids.shape]

    def _count(self, found: Tensor, expected: Tensor) -> str:
        same = int((found == expected).all(1).sum()) if found.shape == expected.shape else 0
        self.num_different += len(expected) - same
        return f"{same}/{len(expected)}"

    def _ours(self, cell: Cell, ids: Tensor) -> dict[str, Any]:
        target, mask, options = self.models["target"], torch.ones_like(ids), self._options(cell)
        plain = self._plain_output(ids)
        first, first_seconds, _ = timed_generate(target, ids, mask, **options)
        equal = self._count(first.sequences, plain)
        entry: dict[str, Any] = {"equal_to_plain": equal, "first_call_seconds": round(first_seconds, 2)}
        if first.sequences.shape != plain.shape or not torch.equal(first.sequences, plain):
            return entry  # a wrong output is not timed
        runs = [timed_generate(target, ids, mask, **options) for _ in range(self.repeats)]
        speculation, new = first.speculation, first.speculation.num_new_tokens
        whole, behind = (statistics.median(run[i] for run in runs) for i in (1, 2))
        draft = traffic(self.models["draft"]) if cell.method == "draft" else None
        moved = bytes_moved(traffic(target), draft, speculation, cell.context + self.new_tokens / 2)
        clock = EventClock(self.event)
        with clock.installed():
            timed_generate(target, ids, mask, **options)
        return {
            **entry, "new_tokens": new, "repeats": self.repeats,
            "tokens_per_second": round((new - len(ids)) / behind, 1),
            "tokens_per_second_with_prefill": round(new / whole, 1),
            "spread_seconds": [round(pick(run[2] for run in runs), 4) for pick in (min, max)],
            "prefill_seconds": round(whole - behind, 3),
            "step_ms": round(1e3 * behind / max(speculation.num_target_calls, 1), 3),
            "mean_acceptance_length": round(speculation.mean_acceptance_length, 3),
            "stage_ms": clock.ms_per_step(), "gb_moved": round(moved / 1e9, 2),
            "roofline_ratio": round(moved / self.bandwidth / behind, 3),
        }  # fmt: skip

    def _oracle(self, cell: Cell, ids: Tensor, num_prompts: int = 2) -> dict[str, Any]:
        """Compares plain decoding in one batch with transformers' own on the swapped model, one prompt at a time."""
        ids = self.prompts(cell.context)[:num_prompts]
        found = self._plain_output(ids)
        options = {"max_new_tokens": self.new_tokens, "do_sample": False}
        expected = [
            self.models["target"].generate(row[None], attention_mask=torch.ones_like(row[None]), **options)[0]
            for row in ids
        ]
        return {"equal_to_transformers": self._count(found, torch.stack(expected))}

    def _peer(self, cell: Cell, ids: Tensor) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if cell.method == "peer_static":
            options["cache_implementation"] = "static"  # which transformers compiles by itself
        elif cell.method == "peer_assisted":
            options["assistant_model"] = self.models["draft"]
        elif cell.method == "peer_lookup":
            options["prompt_lookup_num_tokens"] = cell.num_speculative_tokens
        k = cell.num_speculative_tokens
        constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
        with assistant_settings(self.models["draft"], num_assistant_tokens=k, **constant):
            return self._timed_peers(cell, ids, options)

    def _timed_peers(self, cell: Cell, ids: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        first_seconds = sum(self._timed_peer(ids, self.new_tokens, **options)[1:])
        runs = [self._timed_peer(ids, self.new_tokens, **options) for _ in range(self.repeats)]
        prefill, behind = (statistics.median(run[i] for run in runs) for i in (1, 2))
        if cell.method in DRAFTING:  # its first step ends with more than the first token
            whole = prefill + behind
            prefill = statistics.median(
                sum(self._timed_peer(ids, 1, **options)[1:]) for _ in range(self.repeats)
            )  # fmt: skip
            behind = whole - prefill
        new = runs[0][0]
        if cell.method == "peer_static":
            torch.compiler.reset()
            vars(self.models["target"]).pop("_cache", None)  # transformers keeps it for the next call
        return {
            "first_call_seconds": round(first_seconds, 2), "new_tokens": new, "repeats": self.repeats,
            "tokens_per_second": round((new - len(ids)) / behind, 1),
            "tokens_per_second_with_prefill": round(new / (prefill + behind), 1),
            "prefill_seconds": round(prefill, 3),
        }  # fmt: skip

    def _timed_peer(self, ids: Tensor, new_tokens: int, **options: Any) -> tuple[int, float, float]:
        """New tokens, seconds until the first decision to go on, seconds from there."""
        watch = FirstStep()
        synchronise(ids.device)
        begin = time.perf_counter()
        out = self.models["target"].generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([watch]), **options,
        )  # fmt: skip
        synchronise(ids.device)
        end = time.perf_counter()
        return out[:, ids.shape[1] :].numel(), watch.seconds - begin, end - watch.seconds


class FirstStep(StoppingCriteria):
    """Records when the first step had its token; never stops."""

    seconds = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        if not self.seconds:
            synchronise(input_ids.device)
            self.seconds = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run_grid(cells: Sequence[Cell], grid: Grid, record: Record, deadline: float = math.inf) -> int:
    """Measure all missing cells: peers on the stock modules, ours on the swapped ones. Returns the wrong rows."""
    left = missing(cells, record.content.get("grid", []))
    grid.run([cell for cell in left if cell.method in PEERS], record, deadline)
    ours = [cell for cell in left if cell.method in OURS]
    if ours:
        with specdec.batch_invariant(grid.models["target"]), specdec.batch_invariant(grid.models["draft"]):
            grid.run(ours, record, deadline)
    return grid.num_different


def table(entries: Sequence[dict]) -> str:
    """Tokens per second after the prefill, one line per method and context, one column per batch size."""
    sizes = sorted({entry["batch_size"] for entry in entries})
    lines: dict[tuple, dict[int, str]] = {}
    for entry in entries:
        if entry["method"] == "oracle":
            continue
        k = entry["num_speculative_tokens"]
        name = entry["method"] + (f", K = {k}" if k else "")
        found = entry.get("tokens_per_second", "does not fit" if "not_served" in entry else "differs")
        lines.setdefault((entry["context"], name), {})[entry["batch_size"]] = str(found)
    head = ["| context | method | " + " | ".join(f"batch {size}" for size in sizes) + " |"]
    head.append("|--:|---|" + "--:|" * len(sizes))
    return "\n".join(head + [
        f"| {context} | {name} | " + " | ".join(found.get(size, "") for size in sizes) + " |"
        for (context, name), found in lines.items()
    ])  # fmt: skip
