"""Length policies against each other, and against an oracle, on held-out prompts.

    python benchmarks/policies.py

Fixed K, `confidence`, `acceptance_head`, `disco` and `cost_model` over sweeps of their settings, in interleaved repeats
of one run, with an oracle that drafts exactly the tokens that will be accepted. Each kind's setting is chosen on every
other prompt and judged on the rest. Outputs are compared with transformers' plain greedy decoding first; the exit
status is 1 if any is not equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
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

import specdec
from specdec.acceptance_head import AcceptanceHead
from specdec.bench.latency import StepClock
from specdec.bench.measure import ForeignLoad, Result, log_to_stderr, measure, older_objects_left_alone
from specdec.bench.methods import Batch, Decoded, Method, Pair, generate
from specdec.bench.record import describe_pair, describe_suite
from specdec.bench.statistics import Estimate, Timing, rate, speedup
from specdec.bench.suite import Suite
from specdec.bench.tables import markdown
from specdec.cost_model import CostModel
from specdec.disco import Disco
from specdec.environment import environment
from specdec.length import ByAcceptanceHead, ByDisco, Confidence, Fixed, LengthPolicy
from specdec.oracle import greedy_settings

MOST = 20
THRESHOLDS = {
    "confidence": (0.2, 0.35, 0.5),
    "acceptance_head": (0.3, 0.4, 0.5, 0.6, 0.7, 0.85),
    "disco": (0.3, 0.45, 0.6),
}


class Oracle(LengthPolicy):
    """Drafts exactly the tokens that will be accepted, and nothing where the first would be rejected."""

    name = "oracle"

    def __init__(self, agrees: Sequence[np.ndarray]):
        """agrees: per row of the batch [new tokens] bool, whether the draft model proposes the target's token there."""
        self.runs = [run_lengths(row) for row in agrees]

    def widths(self, rows: specdec.Rows, max_tokens: int) -> np.ndarray:
        places = zip(rows.row_ids.tolist(), rows.num_new_tokens.tolist(), strict=True)
        return np.array([self.runs[row][place] if place < len(self.runs[row]) else 0 for row, place in places])


def run_lengths(agrees: np.ndarray) -> list[int]:
    """How many places agree from each on.

    >>> run_lengths(np.array([True, True, False, True]))
    [2, 1, 0, 1]
    """
    lengths = [0]
    for agreed in agrees[::-1]:
        lengths.append(lengths[-1] + 1 if agreed else 0)
    return lengths[:0:-1]


@torch.no_grad()
def agreement(pair: Pair, outputs: Sequence[list[int]]) -> list[np.ndarray]:
    """Where the draft model's argmax behind the true text is the target's token, [new tokens] bool per prompt."""
    found = []
    for prompt, new in zip(pair.prompts, outputs, strict=True):
        tokens = torch.cat([prompt, torch.tensor(new)]).to(pair.draft.device)
        guesses = pair.draft(input_ids=tokens[None, :-1], use_cache=False).logits[0].argmax(-1)
        found.append((guesses == tokens[1:])[len(prompt) - 1 :].cpu().numpy())
    return found


@dataclass(frozen=True)
class Way:
    """One length policy with one setting. make: a policy for the prompts of a batch; None is plain decoding."""

    kind: str
    setting: float | None
    most: int
    make: Callable[[range], LengthPolicy] | None

    @property
    def name(self) -> str:
        return self.kind if self.setting is None else f"{self.kind} {self.setting:g}"


def all_ways(arguments: argparse.Namespace, agrees: Sequence[np.ndarray]) -> list[Way]:
    clock = cost_clock(arguments.clock)
    ways = [Way("plain", None, 1, None)]
    ways += [Way("fixed", k, k, lambda prompts: Fixed()) for k in arguments.num_speculative_tokens]
    ways += [Way("confidence", h, MOST, lambda p, h=h: Confidence(h)) for h in THRESHOLDS["confidence"]]
    ways.append(Way("cost_model", None, MOST, lambda prompts: CostModel(None, clock)))
    if (arguments.head / f"{AcceptanceHead.kind}.json").is_file():
        head = AcceptanceHead.load(arguments.head)
        ways += [
            Way("acceptance_head", h, MOST, lambda p, h=h: ByAcceptanceHead(h, head=head))
            for h in THRESHOLDS["acceptance_head"]
        ]
        ways.append(Way("cost_model with head", None, MOST, lambda prompts: CostModel(head, clock)))
    if (arguments.head / f"{Disco.kind}.json").is_file():
        disco = Disco.load(arguments.head)
        ways += [Way("disco", c, MOST, lambda p, c=c: ByDisco(c, head=disco)) for c in THRESHOLDS["disco"]]
    return [*ways, Way("oracle", None, MOST, lambda prompts: Oracle([agrees[i] for i in prompts]))]


def method_of(pair: Pair, way: Way, batch_size: int, max_new_tokens: int) -> Method:
    def decode(batch: Batch, clock: StepClock | None = None) -> Decoded:
        if way.make is None:
            return generate(pair, batch, None, None, max_new_tokens, clock)
        policy = {"length_policy": way.make(batch.prompt_indices)}
        return generate(pair, batch, pair.draft, way.most, max_new_tokens, clock, policy)

    return Method(way.name, batch_size, True, None, decode)


def judged(ways: Sequence[Way], results: Sequence[Result]) -> list[dict]:
    """Each kind at the setting that was fastest on every other prompt, by its speed on the rest; at a batch size
    above 1, where single prompts have no time, on all of them. Nothing where no fixed K was timed."""
    num_prompts = len(results[0].outputs)
    alone = results[0].method.batch_size == 1
    chosen_on = range(0, num_prompts, 2) if alone else None
    judged_on = range(1, num_prompts, 2) if alone else None
    best: dict[str, tuple[Way, Result]] = {}
    for way, result in zip(ways, results, strict=True):
        known = best.get(way.kind)
        if result.is_timed and (known is None or median(result, chosen_on) > median(known[1], chosen_on)):
            best[way.kind] = way, result
    if "fixed" not in best:
        return []
    base = timing(best["fixed"][1], judged_on)
    entries = [describe(way, result, timing(result, judged_on), base) for way, result in best.values()]
    gain = next((entry["gain"]["median"] for entry in entries if entry["kind"] == "oracle"), 0.0)
    for entry in entries:
        entry["share_of_oracle"] = entry["gain"]["median"] / gain if gain > 0 else None
    return entries


def timing(result: Result, prompts: Sequence[int] | None) -> Timing:
    return result.timing if prompts is None else result.timing_of(prompts)


def median(result: Result, prompts: Sequence[int] | None) -> float:
    return float(np.median(timing(result, prompts).rates()))


def describe(way: Way, result: Result, ours: Timing, base: Timing) -> dict:
    """gain: over the best fixed K, repeat by repeat. tokens_per_target_call: per row."""
    speculation = result.speculation
    assert speculation is not None
    return {
        "kind": way.kind,
        "setting": way.setting,
        "batch_size": result.method.batch_size,
        "tokens_per_second": asdict(rate(ours)),
        "gain": asdict(gain_of(speedup(ours, base))),
        "tokens_per_target_call": speculation.mean_acceptance_length,
        "drafted_per_step": speculation.num_draft_tokens / max(speculation.num_spec_steps, 1),
        "speculation": speculation.to_dict(),
    }


def gain_of(ratio: Estimate) -> Estimate:
    """What is above 1."""
    return Estimate(ratio.median - 1, ratio.low - 1, ratio.high - 1, tuple(value - 1 for value in ratio.repeats))


def table(entries: Sequence[dict]) -> str:
    header = ("policy", "batch", "setting", "tokens/s (95 %)", "over best fixed K (95 %)", "share of oracle's gain",
              "tokens per target call", "drafted per step", "acceptance rate")  # fmt: skip
    rows = []
    for entry in entries:
        speed, gain, share = entry["tokens_per_second"], entry["gain"], entry["share_of_oracle"]
        rows.append(
            (
                entry["kind"],
                str(entry["batch_size"]),
                "-" if entry["setting"] is None else f"{entry['setting']:g}",
                f"{speed['median']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})",
                f"{gain['median']:+.1%} ({gain['low']:+.1%} to {gain['high']:+.1%})",
                "-" if share is None else f"{share:.0%}",
                f"{entry['tokens_per_target_call']:.2f}",
                f"{entry['drafted_per_step']:.2f}",
                f"{entry['speculation']['draft_acceptance_rate']:.2f}",
            )
        )
    return markdown(header, rows)


def plot_calibration(entries: Sequence[dict], path: Path) -> None:
    """Predicted against actual acceptance of drafted tokens; areas are proportional to their number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 5))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for entry in (entry for entry in entries if entry["speculation"]["calibration"]):
        bins = entry["speculation"]["calibration"]
        tokens = np.array([found["tokens"] for found in bins])
        points = [found["predicted"] for found in bins], [found["actual"] for found in bins]
        axes.plot(*points, linewidth=1)
        axes.scatter(*points, s=200 * tokens / tokens.sum() + 5, label=entry["kind"])
    axes.set(xlabel="predicted acceptance", ylabel="actual acceptance", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=120)
    plt.close(figure)


def compare(pair: Pair, suite: Suite, arguments: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """An entry of each kind at each batch size, and the methods that were wrong."""
    ways = all_ways(arguments, agreement(pair, suite.reference))
    entries, wrong = [], []
    for batch_size in arguments.batch_sizes:
        methods = [method_of(pair, way, batch_size, arguments.max_new_tokens) for way in ways]
        clock = CLOCKS[arguments.clock]
        results = measure(pair, suite.reference, methods, arguments.repeats, log_to_stderr, clock)
        wrong += [result.method.label for result in results if result.refused]
        entries += judged(ways, results)
    return entries, wrong


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--head", type=Path, help="folder with the heads, by default the draft's")
    parser.add_argument("--num-prompts", type=positive, default=24, help="how many of the prompts, from the first")
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--num-speculative-tokens", type=numbers, default=(2, 3, 4, 5, 6, 7, 8, 10, 12), help="fixed K")
    parser.add_argument("--batch-sizes", type=numbers, default=(1,))
    add_clock(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--plot", type=Path, help="draw predicted against actual acceptance there")
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/policies-<device>-<date>")
    arguments = parser.parse_args(argv)
    check_clock(parser, arguments)
    if arguments.num_prompts < 2:
        parser.error("--num-prompts 1 leaves no prompt to judge a setting on; pass 2 or more")
    arguments.head = arguments.head or arguments.models / "draft"
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")}
    record |= environment(device, ["python", "benchmarks/policies.py", *argv])
    pair = load_pair(arguments.models, arguments.num_prompts, getattr(torch, arguments.dtype), device)
    load = ForeignLoad()
    with greedy_settings(pair.target), older_objects_left_alone():
        suite = suite_of(pair, arguments.max_new_tokens)
        entries, wrong = compare(pair, suite, arguments)
    names = ("device", "clock", "dtype", "max_new_tokens", "repeats")
    record |= {name: getattr(arguments, name) for name in names}
    record |= {"models": describe_pair(pair), "suites": [describe_suite(suite)]}
    record |= {"policies": entries, "foreign_cores": load.cores()}
    print(table(entries))
    if arguments.plot is not None:
        first = arguments.batch_sizes[0]
        plot_calibration([entry for entry in entries if entry["batch_size"] == first], arguments.plot)
    write_record(record, arguments.json, f"policies-{arguments.device}", now)
    for label in wrong:
        log_to_stderr(f"NOT EQUAL to plain decoding, not timed: {label}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
