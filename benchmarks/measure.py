"""Equality first, then time: interleaved repeats, and ratios paired within a repeat."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from methods import Batch, Decoded, Method, Pair, batches, new_tokens, total

from specdec import Speculation


@dataclass
class Result:
    """What one method did.

    outputs: new tokens per prompt, as the check run wrote them. num_equal: prompts whose outputs were the
    reference's in the check run and in every timed run. seconds: [repeat][batch], empty if it was not timed.
    foreign_cores: [repeat], cores that other processes kept busy meanwhile; a quiet machine shows about 0.
    """

    method: Method
    outputs: list[list[int]]
    num_equal: int
    speculation: Speculation | None
    seconds: list[list[float]] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)

    @property
    def all_equal(self) -> bool:
        return self.num_equal == len(self.outputs)

    @property
    def refused(self) -> bool:
        """Ours and wrong: its speed means nothing."""
        return self.method.is_ours and not self.all_equal

    def tokens_per_second(self, prompts: Sequence[int] | None = None) -> list[float]:
        """One figure per repeat, over all prompts or, at batch 1, over the chosen ones."""
        if prompts is None:
            num_tokens = sum(len(tokens) for tokens in self.outputs)
            return [num_tokens / sum(repeat) for repeat in self.seconds]
        if self.method.batch_size != 1:
            raise ValueError(f"the time of single prompts is known at batch 1, not at {self.method.batch_size}")
        num_tokens = sum(len(self.outputs[i]) for i in prompts)
        return [num_tokens / sum(repeat[i] for i in prompts) for repeat in self.seconds]


def measure(
    pair: Pair, reference_method: Method, methods: Sequence[Method], num_repeats: int, log: Callable[[str], None]
) -> list[Result]:
    """Check every method's token ids against the reference method's, which also warms it up; then time them.

    Methods of ours that are not equal are not timed. Each repeat runs every method once, starting at another one.
    """
    reference, _, _ = run(pair, reference_method)
    results = []
    for method in methods:
        outputs, _, speculation = run(pair, method)
        results.append(Result(method, outputs, count_equal(outputs, reference), speculation))
        log(f"{method.label}: {results[-1].num_equal}/{len(outputs)} equal{', NOT TIMED' * results[-1].refused}")
    timed = [result for result in results if not result.refused]
    for repeat in range(num_repeats):
        start = repeat * len(timed) // num_repeats
        for result in timed[start:] + timed[:start]:
            if result.refused:
                continue
            others = ForeignLoad()
            outputs, seconds, _ = run(pair, result.method)
            result.num_equal = min(result.num_equal, count_equal(outputs, reference))
            result.seconds.append(seconds)
            result.foreign_cores.append(others.cores())
            log(f"repeat {repeat + 1}/{num_repeats}, {result.method.label}: {sum(seconds):.2f} s")
    for result in results:
        if result.refused:
            result.seconds.clear()
    return results


@torch.no_grad()
def run(pair: Pair, method: Method) -> tuple[list[list[int]], list[float], Speculation | None]:
    """New tokens per prompt, seconds per batch, and our statistics; inputs are on the device before the clock runs."""
    outputs, seconds, statistics_ = [], [], []
    gc.collect()
    for batch in batches(pair, method.batch_size):
        decoded, elapsed = timed_decode(method, batch)
        outputs += new_tokens(decoded, batch, pair.eos_ids)
        seconds.append(elapsed)
        if decoded.speculation is not None:
            statistics_.append(decoded.speculation)
    return outputs, seconds, total(statistics_) if statistics_ else None


class ForeignLoad:
    """Cores that processes other than this one keep busy, from its making on."""

    def __init__(self):
        self.begin = self._read()

    def cores(self) -> float:
        wall, busy, own = (now - then for now, then in zip(self._read(), self.begin, strict=True))
        return max(0.0, (busy - own) / max(wall, 1e-9))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: wall clock, all cores busy, this process busy."""
        machine = psutil.cpu_times()
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "guest", 0.0)
        return time.perf_counter(), busy - getattr(machine, "guest_nice", 0.0), time.process_time()


def timed_decode(method: Method, batch: Batch) -> tuple[Decoded, float]:
    """The method's result and its seconds, prefill included."""
    synchronise(batch.input_ids.device)
    begin = time.perf_counter()
    decoded = method.decode(batch)
    synchronise(batch.input_ids.device)
    return decoded, time.perf_counter() - begin


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_equal(outputs: Sequence[list[int]], reference: Sequence[list[int]]) -> int:
    """Prompts with the same token ids, of all; a missing prompt is an error, not a match."""
    return sum(ours == theirs for ours, theirs in zip(outputs, reference, strict=True))


@dataclass(frozen=True)
class Spread:
    """The median of repeats with its range."""

    median: float
    min: float
    max: float
    repeats: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """None without values."""
        return Spread(statistics.median(values), min(values), max(values), tuple(values)) if values else None


def speedup(result: Result, baseline: Result, prompts: Sequence[int] | None = None) -> Spread | None:
    """Tokens per second over the baseline's, repeat by repeat; the median of these ratios."""
    ours, theirs = result.tokens_per_second(prompts), baseline.tokens_per_second(prompts)
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)]) if ours else None


def log_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
