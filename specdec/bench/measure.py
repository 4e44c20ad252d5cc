"""Equality first, then time: interleaved repeats, and ratios paired within a repeat."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch

from specdec.bench.latency import RowTimes, StepClock, synchronise
from specdec.bench.memory import PeakMemory
from specdec.bench.methods import Batch, Decoded, Method, Pair, batches, new_tokens, total
from specdec.bench.report.statistics import Timing
from specdec.engine.metrics import Speculation

Clock = Callable[[], float]  # seconds
# What a decoding loop raises where it does not serve a model, an option or a length.
PEER_ERRORS = (
    AttributeError, AssertionError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Observed:
    """A separate run with a clock inside the calls; the timed runs have none.

    rows: times of each prompt. num_target_forwards: for a peer, all forwards of the target; None for our methods, see
    `Speculation`. peak_memory_mib: None if the system does not report it.
    """

    rows: list[RowTimes]
    num_target_forwards: int | None
    peak_memory_mib: float | None


@dataclass
class Result:
    """The results of one method.

    outputs: new tokens per prompt, as the check run wrote them. num_equal: prompts whose outputs were the
    reference's in the check run and in every timed run. seconds: [repeat][call], empty if it was not timed; a call
    decodes one batch. foreign_cores: [repeat], cores that other processes kept busy meanwhile; a quiet machine shows
    about 0. failure: what a peer raised, which then has no outputs and is not timed; empty for all others.
    """

    method: Method
    outputs: list[list[int]]
    num_equal: int
    speculation: Speculation | None
    seconds: list[list[float]] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)
    observed: Observed | None = None
    failure: str = ""

    @property
    def all_equal(self) -> bool:
        return self.num_equal == len(self.outputs)

    @property
    def refused(self) -> bool:
        """One of our methods and not equal, or a peer that failed: it has no speed that means anything."""
        return bool(self.failure) or (self.method.is_ours and not self.all_equal)

    def fail(self, error: Exception, log: Callable[[str], None]) -> None:
        """Note that a peer raised, and go on with the others."""
        self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        log(f"{self.method.label}: FAILED, {self.failure}")

    @property
    def is_timed(self) -> bool:
        return bool(self.seconds)

    @property
    def timing(self) -> Timing:
        size = self.method.batch_size
        counts = [len(tokens) for tokens in self.outputs]
        calls = [sum(counts[first : first + size]) for first in range(0, len(counts), size)]
        return Timing.of(self.seconds, calls)

    def timing_of(self, prompts: Sequence[int]) -> Timing:
        """The timing of some of the prompts; single prompts have their own time only at batch 1."""
        if self.method.batch_size != 1:
            raise ValueError(f"the time of single prompts is known at batch 1, not at {self.method.batch_size}")
        return self.timing.only(prompts)


def measure(
    pair: Pair,
    reference: Sequence[list[int]],
    methods: Sequence[Method],
    num_repeats: int,
    log: Callable[[str], None],
    clock: Clock = time.perf_counter,
) -> list[Result]:
    """Check every method's token ids against the reference, which also warms it up; then time and observe it.

    reference: for each prompt, the new tokens of transformers' plain greedy decoding of it alone. Our methods that are
    not equal are not timed. Each repeat runs every method once, starting with another one. clock: of timed runs.
    """
    results = [checked(pair, reference, method, log) for method in methods]
    timed = [result for result in results if not result.refused]
    for repeat in range(num_repeats):
        start = repeat * len(timed) // num_repeats
        for result in timed[start:] + timed[:start]:
            if result.refused:
                continue
            with going_on(result, log):
                time_once(pair, reference, result, clock)
                log(f"repeat {repeat + 1}/{num_repeats}, {result.method.label}: {sum(result.seconds[-1]):.2f} s")
    for result in results:
        if not result.refused:
            with going_on(result, log):
                result.observed = observe(pair, result.method)
        if result.refused:
            result.seconds.clear()
    return results


@contextmanager
def going_on(result: Result, log: Callable[[str], None]) -> Iterator[None]:
    """An error of a peer is its result. One of ours is a bug, and ends the run."""
    try:
        yield
    except PEER_ERRORS as error:
        if result.method.is_ours:
            raise
        result.fail(error, log)


def checked(pair: Pair, reference: Sequence[list[int]], method: Method, log: Callable[[str], None]) -> Result:
    result = Result(method, [[] for _ in reference], 0, None)
    with going_on(result, log):
        result.outputs, _, result.speculation = run(pair, method)
    if result.failure:
        return result
    outputs, result.num_equal = result.outputs, count_equal(result.outputs, reference)
    log(f"{method.label}: {result.num_equal}/{len(outputs)} equal{', NOT TIMED' * result.refused}")
    return result


def time_once(pair: Pair, reference: Sequence[list[int]], result: Result, clock: Clock = time.perf_counter) -> None:
    """Time one repeat. Outputs are checked here too, as a method may differ in a later run."""
    others = ForeignLoad()
    outputs, seconds, _ = run(pair, result.method, clock)
    result.num_equal = min(result.num_equal, count_equal(outputs, reference))
    result.seconds.append(seconds)
    result.foreign_cores.append(others.cores())


@contextmanager
def older_objects_left_alone() -> Iterator[None]:
    """Garbage collections inside visit only new objects, so a collection before every run costs little."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@torch.no_grad()
def run(
    pair: Pair, method: Method, clock: Clock = time.perf_counter
) -> tuple[list[list[int]], list[float], Speculation | None]:
    """New tokens per prompt, seconds per batch, our statistics. Inputs are on the device before the clock starts."""
    outputs, seconds, statistics = [], [], []
    gc.collect()
    for batch in batches(pair, method.batch_size):
        decoded, elapsed = timed_decode(method, batch, clock)
        outputs += new_tokens(decoded, batch, pair.eos_ids)
        seconds.append(elapsed)
        if decoded.speculation is not None:
            statistics.append(decoded.speculation)
    return outputs, seconds, total(statistics) if statistics else None


@torch.no_grad()
def observe(pair: Pair, method: Method) -> Observed:
    """Decode everything once more with a clock inside."""
    gc.collect()
    rows: list[RowTimes] = []
    num_forwards = 0

    def count(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1

    # A hook on the model would disable our short forward, so only peers are counted with one.
    hook = None if method.is_ours else pair.target.register_forward_pre_hook(count)
    peak = PeakMemory(pair.target.device)
    try:
        for batch in batches(pair, method.batch_size):
            clock = StepClock(pair.target.device)
            clock.begin()
            decoded = method.decode(batch, clock)
            rows += clock.rows(new_tokens(decoded, batch, pair.eos_ids))
    finally:
        if hook is not None:
            hook.remove()
    return Observed(rows, None if method.is_ours else num_forwards, peak.mib())


class ForeignLoad:
    """Cores that other processes keep busy, counted from construction."""

    def __init__(self) -> None:
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


def timed_decode(method: Method, batch: Batch, clock: Clock = time.perf_counter) -> tuple[Decoded, float]:
    """The method's result, and its seconds including prefill."""
    synchronise(batch.input_ids.device)
    begin = clock()
    decoded = method.decode(batch)
    synchronise(batch.input_ids.device)
    return decoded, clock() - begin


def count_equal(outputs: Sequence[list[int]], reference: Sequence[list[int]]) -> int:
    """Prompts with the same token ids, of all; a missing prompt is an error, not a match."""
    return sum(ours == theirs for ours, theirs in zip(outputs, reference, strict=True))


def log_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
