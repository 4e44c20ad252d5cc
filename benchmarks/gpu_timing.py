"""Shared by the single-GPU benchmarks: the record, clocks, prompts, and the library's product in place of ours."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import specdec
from specdec import StepReport
from specdec.bench.latency import synchronise
from specdec.files.loading import read_prompts


class Record:
    """A JSON file that always holds what has been measured so far."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.content = path, about
        path.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def resumed(cls, path: Path, about: dict[str, Any]) -> Record:
        """Continue the record in the file if it was measured on the same GPU with the same versions and models."""
        if not path.exists():
            return cls(path, about)
        content = json.loads(path.read_text())
        for name in ("machine.gpu", "versions", "stand_ins", "dtype", "new_tokens"):
            before, now = content, about
            for part in name.split("."):
                before, now = before.get(part), now.get(part)
            if before != now:
                raise SystemExit(f"{path.name} was measured with {name}={before}, this is {now}; pass another --out")
        content.setdefault("resumed_by", []).append({key: about[key] for key in ("command", "git_sha", "git_dirty")})
        return cls(path, content)

    def add(self, part: str, entry: Any, shown: Any = None) -> None:
        """shown: printed instead of the entry."""
        self.content.setdefault(part, []).append(entry)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        print(part, json.dumps(entry if shown is None else shown), flush=True)


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
    """The library's product in place of ours, to compare speed; its bits depend on the number of rows."""
    parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Stopwatch:
    """Wall time of a generate call, with prefill separate: its report waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.prefilled = device, 0.0

    def __call__(self, report: StepReport) -> None:
        if report.is_prefill:
            synchronise(self.device)
            self.prefilled = time.perf_counter()


def timed_generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Any, float, float]:
    """The output, seconds of the whole call and of the part after the prefill."""
    watch = Stopwatch(model.device)
    synchronise(model.device)
    begin = time.perf_counter()
    out = specdec.generate(model, ids, mask, return_dict_in_generate=True, on_commit=watch, **options)
    synchronise(model.device)
    end = time.perf_counter()
    return out, end - begin, end - watch.prefilled


def prompts_of(pair: Path, count: int, length: int, device: str = "cuda") -> Tensor:
    """[count, length] tokens: each held-out prompt preceded by others."""
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
    return torch.tensor(rows, device=device)
