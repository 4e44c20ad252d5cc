"""Length policies against each other, and against an oracle, on held-out prompts.

    python benchmarks/policies.py

Fixed K, `confidence`, `acceptance_head`, `disco` and `cost_model` over sweeps of their settings, in interleaved repeats
of one run, with an oracle that drafts exactly the tokens that will be accepted. Each kind's setting is chosen on every
other prompt and judged on the rest. Outputs are compared with transformers' plain greedy decoding first; the exit
status is 1 if any is not equal. The record is rewritten after every repeat.

With --target-shape and --draft-shape the models are stand-ins (`stand_in.py`): the cost of the large shapes, the text
and the acceptance of the small pair.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from pairs import (
    CLOCKS,
    DEMO_PAIR,
    add_clock,
    check_clock,
    cost_clock,
    load_pair,
    numbers,
    positive,
    suite_of,
    write_record,
)
from policy_table import judged, plot_calibration, table
from policy_ways import KINDS, MOST, THRESHOLDS, Way, agreement, all_ways
from stand_in import SHAPES
from stand_in_pair import StandIns, stand_ins

from specdec import StepReport
from specdec.bench.latency import StepClock, synchronise
from specdec.bench.measure import ForeignLoad, Result, checked, log_to_stderr, older_objects_left_alone, time_once
from specdec.bench.methods import Batch, Decoded, Method, Pair, batches, generate
from specdec.bench.report.record import describe_pair, describe_suite
from specdec.bench.report.statistics import rate
from specdec.bench.suite import Suite
from specdec.check.settings import greedy_settings
from specdec.files.environment import environment
from specdec.policies.fixed import Fixed

HEADS_ON_STAND_INS = (
    "trained for the small pair; they see the stand-in's hidden states mapped back to the small draft's"
)


class BehindPrefill:
    """A clock that stops from the beginning of a call until its prompts are cached."""

    def __init__(self, name: str, device: torch.device):
        self.running, self.device = CLOCKS[name], device
        self.excluded = self.begun = 0.0

    def __call__(self) -> float:
        return self.running() - self.excluded

    def begin(self) -> None:
        self.begun = self.running()

    def on_commit(self, report: StepReport) -> None:
        if report.is_prefill:
            synchronise(self.device)
            self.excluded += self.running() - self.begun


def method_of(pair: Pair, way: Way, batch_size: int, max_new_tokens: int, watch: BehindPrefill | None = None) -> Method:
    def decode(batch: Batch, clock: StepClock | None = None) -> Decoded:
        if watch is not None:
            clock = watch
            watch.begin()
        if way.make is None:
            return generate(pair, batch, None, None, max_new_tokens, clock)
        policy = {"length_policy": way.make(batch.prompt_indices)}
        return generate(pair, batch, pair.draft, way.most, max_new_tokens, clock, policy)

    return Method(way.name, batch_size, True, None, decode)


class Comparison:
    """Ways at several batch sizes; `entries` and `wrong` (methods with differing outputs) cover the measurements so
    far.
    """

    def __init__(self, pair: Pair, suite: Suite, ways: Sequence[Way], arguments: argparse.Namespace):
        self.pair, self.suite, self.ways, self.arguments = pair, suite, ways, arguments
        self.watch = BehindPrefill(arguments.clock, pair.target.device) if arguments.exclude_prefill else None
        self.results: dict[int, list[Result]] = {}  # by batch size

    @property
    def entries(self) -> list[dict]:
        """Entries of each kind at its best setting."""
        return [entry for results in self.results.values() for entry in judged(self.ways, results)]

    @property
    def every_way(self) -> list[dict]:
        """Entries of each setting, over all prompts, including those that it was chosen on."""
        return [
            {"way": way.name, "batch_size": size, "tokens_per_second": asdict(rate(result.timing))}
            | {"speculation": result.speculation.to_dict()}
            for size, results in self.results.items()
            for way, result in zip(self.ways, results, strict=True)
            if result.is_timed
        ]

    @property
    def wrong(self) -> list[str]:
        return [result.method.label for results in self.results.values() for result in results if result.refused]

    def repeats(self, batch_size: int) -> Iterator[None]:
        """Checks every way's tokens, which also warms it up, then times them all; yields after every repeat."""
        new, num_repeats = self.arguments.max_new_tokens, self.arguments.repeats
        methods = [method_of(self.pair, way, batch_size, new, self.watch) for way in self.ways]
        warm_up(self.pair, batch_size, new)
        results = [checked(self.pair, self.suite.reference, method, log_to_stderr) for method in methods]
        self.results[batch_size] = results
        for repeat in range(num_repeats):
            first = repeat * len(results) // num_repeats
            timed = [result for result in results[first:] + results[:first] if not result.refused]
            for result in timed:
                time_once(self.pair, self.suite.reference, result, self.watch or CLOCKS[self.arguments.clock])
                if result.refused:
                    result.seconds.clear()
            log_to_stderr(f"batch {batch_size}: repeat {repeat + 1}/{num_repeats}")
            yield


def warm_up(pair: Pair, batch_size: int, max_new_tokens: int) -> None:
    """The longest texts and drafts first, because a growing cache discards its captured steps."""
    longest = max(batches(pair, batch_size), key=lambda batch: batch.input_ids.shape[1])
    method_of(pair, Way("fixed", MOST, MOST, lambda prompts: Fixed()), batch_size, max_new_tokens).decode(longest)


def measure_within(comparison: Comparison, seconds: float, write: Callable[[], None]) -> None:
    """Begins only repeats that should end within the given seconds, but at least one per batch size. write: called
    after each."""
    begin = time.perf_counter()
    for batch_size in comparison.arguments.batch_sizes:
        repeats, longest = comparison.repeats(batch_size), 0.0
        before = None
        for _ in repeats:
            write()
            now = time.perf_counter()
            if before is not None:
                longest = max(longest, now - before)
            before = now
            if now + longest - begin > seconds:
                log_to_stderr(f"batch {batch_size}: the {seconds:g} seconds are not enough for another repeat")
                break


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--head", type=Path, help="folder with the heads, by default the draft's")
    parser.add_argument("--num-prompts", type=positive, default=24, help="number of prompts, from the first")
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--num-speculative-tokens", type=numbers, default=(2, 3, 4, 5, 6, 7, 8, 10, 12), help="fixed K")
    parser.add_argument("--batch-sizes", type=numbers, default=(1,))
    parser.add_argument("--kinds", type=kinds, default=KINDS, help=f"of {', '.join(KINDS)}")
    parser.add_argument(
        "--thresholds", type=thresholds, action="append", default=[], metavar="KIND=H,H,...",
        help="instead of a kind's own sweep; may be given for several kinds",
    )  # fmt: skip
    parser.add_argument("--target-shape", choices=SHAPES, help="a stand-in of that shape for the target")
    parser.add_argument("--draft-shape", choices=SHAPES, help="and for the draft")
    parser.add_argument("--exclude-prefill", action="store_true", help="time only the part after a batch's first token")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="limit of the comparison, but at least one repeat"
    )
    add_clock(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--plot", type=Path, help="draw predicted against actual acceptance to this file")
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/policies-<device>-<date>")
    arguments = parser.parse_args(argv)
    check_clock(parser, arguments)
    if arguments.num_prompts < 2:
        parser.error("--num-prompts 1 leaves no prompt to judge a setting on; pass 2 or more")
    if (arguments.target_shape is None) != (arguments.draft_shape is None):
        parser.error("--target-shape and --draft-shape go together; pass both")
    arguments.head = arguments.head or arguments.models / "draft"
    return arguments


def kinds(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := set(chosen) - set(KINDS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} unknown; choose from {', '.join(KINDS)}")
    return chosen


def thresholds(text: str) -> tuple[str, tuple[float, ...]]:
    """
    >>> thresholds("confidence=0.3,0.4")
    ('confidence', (0.3, 0.4))
    """
    kind, _, values = text.partition("=")
    if kind not in THRESHOLDS:
        raise argparse.ArgumentTypeError(f"{kind} has no threshold; choose from {', '.join(THRESHOLDS)}")
    return kind, tuple(float(value) for value in values.split(","))


@contextmanager
def models_of(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[Pair, StandIns | None]]:
    dtype = getattr(torch, arguments.dtype)
    if arguments.target_shape is None:
        yield load_pair(arguments.models, arguments.num_prompts, dtype, device), None
        return
    small = load_pair(arguments.models, arguments.num_prompts, torch.float32, torch.device("cpu"))
    with stand_ins(small, arguments.target_shape, arguments.draft_shape, dtype, device) as found:
        yield found.pair, found


def chosen_ways(pair: Pair, suite: Suite, found: StandIns | None, arguments: argparse.Namespace) -> list[Way]:
    sweeps, clock = THRESHOLDS | dict(arguments.thresholds), cost_clock(arguments.clock)
    agrees = agreement(pair, suite.reference)
    ways = all_ways(arguments.head, arguments.num_speculative_tokens, sweeps, agrees, clock, found)
    return [way for way in ways if way.kind in arguments.kinds]


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")}
    record |= environment(device, ["python", "benchmarks/policies.py", *argv])
    names = ("device", "clock", "dtype", "max_new_tokens", "repeats", "target_shape", "draft_shape")
    record |= {name: getattr(arguments, name) for name in names}
    record |= {"prefill": "excluded" if arguments.exclude_prefill else "included"}
    load = ForeignLoad()
    with models_of(arguments, device) as (pair, found), greedy_settings(pair.target), older_objects_left_alone():
        if found is not None:
            record |= {"stand_ins": found.pair.name, "heads": HEADS_ON_STAND_INS}
        suite = suite_of(pair, arguments.max_new_tokens)
        record |= {"models": describe_pair(pair), "suites": [describe_suite(suite)]}
        comparison = Comparison(pair, suite, chosen_ways(pair, suite, found, arguments), arguments)

        def write() -> None:
            measured = {"policies": comparison.entries, "every_way": comparison.every_way}
            measured |= {"foreign_cores": load.cores()}
            write_record(record | measured, arguments.json, f"policies-{arguments.device}", now)

        measure_within(comparison, arguments.seconds, write)
    print(table(comparison.entries))
    if arguments.plot is not None:
        first = arguments.batch_sizes[0]
        plot_calibration([entry for entry in comparison.entries if entry["batch_size"] == first], arguments.plot)
    for label in comparison.wrong:
        log_to_stderr(f"NOT EQUAL to plain decoding, not timed: {label}")
    return 1 if comparison.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
