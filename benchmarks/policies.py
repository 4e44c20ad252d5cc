"""Length policies against each other on held-out prompts, and the cost model against plain decoding.

    python benchmarks/policies.py
    python benchmarks/policies.py --guarantee

The first compares fixed K, `confidence`, `acceptance_head`, `disco` and `cost_model` over sweeps of their settings, in
interleaved repeats of one run, with an oracle that drafts exactly the tokens that will be accepted. Each kind's setting
is chosen on every other prompt and judged on the rest. Outputs are compared with transformers' plain greedy decoding
first; the exit status is 1 if any is not equal.

The second measures, at several batch sizes, tokens per second of `cost_model`, which begins without any knowledge each
time, over those of plain decoding of the same engine, from the 33rd step on and until the first row ends: with the
pair's draft, with a draft of random weights, and with prompt lookup on sampled text, which repeats little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from decode import DEMO_PAIR, RESULTS, numbers, positive
from measure import Clock, ForeignLoad, Result, Spread, log_to_stderr, measure, synchronise
from methods import PLAIN, Batch, Decoded, Method, Pair, left_pad, load_pair, transformers_method
from record import describe_pair, environment, markdown
from transformers import AutoModelForCausalLM

import specdec
from specdec.acceptance_head import AcceptanceHead
from specdec.cost_model import CostModel, Knowledge
from specdec.disco import Disco
from specdec.length import ByAcceptanceHead, ByDisco, Confidence, Fixed, LengthPolicy

MOST = 20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FIRST_STEPS = 32
THRESHOLDS = {
    "confidence": (0.2, 0.35, 0.5),
    "acceptance_head": (0.4, 0.55, 0.7, 0.85),
    "disco": (0.3, 0.45, 0.6),
}


@dataclass(frozen=True)
class ClockOf:
    """A cost model's clock on the host."""

    mark: Callable[[], float]

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


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
    clock = ClockOf(CLOCKS["cpu"]) if arguments.clock == "cpu" else None
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
    def decode(batch: Batch) -> Decoded:
        drafting: dict[str, Any] = {}
        if way.make is not None:
            drafting = {"drafter": pair.draft, "length_policy": way.make(batch.prompt_indices)}
            drafting["num_speculative_tokens"] = way.most
        output = specdec.generate(
            pair.target, batch.input_ids, batch.attention_mask, do_sample=False, max_new_tokens=max_new_tokens,
            return_dict_in_generate=True, **drafting,
        )  # fmt: skip
        return Decoded(output.sequences, output.speculation)

    return Method(way.name, batch_size, True, None, decode)


def judged(ways: Sequence[Way], results: Sequence[Result]) -> list[dict]:
    """Each kind at the setting that was fastest on every other prompt, by its speed on the rest; at a batch size
    above 1, where single prompts have no time, on all of them."""
    num_prompts = len(results[0].outputs)
    alone = results[0].method.batch_size == 1
    chosen_on = range(0, num_prompts, 2) if alone else None
    judged_on = range(1, num_prompts, 2) if alone else None
    speeds = {way.name: result for way, result in zip(ways, results, strict=True) if result.seconds}
    best: dict[str, Way] = {}
    for way in (way for way in ways if way.name in speeds):
        if way.kind not in best or median(speeds[way.name], chosen_on) > median(speeds[best[way.kind].name], chosen_on):
            best[way.kind] = way
    base = speeds[best["fixed"].name]
    entries = [describe(way, speeds[way.name], base, judged_on) for way in best.values()]
    gain = next((entry["gain"]["median"] for entry in entries if entry["kind"] == "oracle"), 0.0)
    for entry in entries:
        entry["share_of_oracle"] = entry["gain"]["median"] / gain if gain > 0 else None
    return entries


def median(result: Result, prompts: Sequence[int] | None) -> float:
    return statistics.median(result.tokens_per_second(prompts))


def describe(way: Way, result: Result, base: Result, prompts: Sequence[int] | None) -> dict:
    """gain: over the best fixed K, repeat by repeat. tokens_per_target_call: per row."""
    ours, theirs = result.tokens_per_second(prompts), base.tokens_per_second(prompts)
    gain = Spread.of([a / b - 1 for a, b in zip(ours, theirs, strict=True)])
    speculation = result.speculation
    assert gain is not None and speculation is not None
    return {
        "kind": way.kind,
        "setting": way.setting,
        "batch_size": result.method.batch_size,
        "tokens_per_second": vars(Spread.of(ours)),
        "gain": vars(gain),
        "tokens_per_target_call": speculation.mean_acceptance_length,
        "drafted_per_step": speculation.num_draft_tokens / max(speculation.num_spec_steps, 1),
        "speculation": speculation.to_dict(),
    }


def table(entries: Sequence[dict]) -> str:
    header = ("policy", "batch", "setting", "tokens/s (range)", "over best fixed K (range)", "share of oracle's gain",
              "tokens per target call", "drafted per step", "acceptance rate")  # fmt: skip
    rows = []
    for entry in entries:
        speed, gain, share = entry["tokens_per_second"], entry["gain"], entry["share_of_oracle"]
        rows.append(
            (
                entry["kind"],
                str(entry["batch_size"]),
                "-" if entry["setting"] is None else f"{entry['setting']:g}",
                f"{speed['median']:.0f} ({speed['min']:.0f}-{speed['max']:.0f})",
                f"{gain['median']:+.1%} ({gain['min']:+.1%} to {gain['max']:+.1%})",
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


def compare(pair: Pair, arguments: argparse.Namespace) -> tuple[dict, bool]:
    reference = transformers_method(pair, PLAIN, 1, None, arguments.max_new_tokens)
    plain = method_of(pair, Way("plain", None, 1, None), 1, arguments.max_new_tokens)
    outputs = measure(pair, reference, [plain], 0, log_to_stderr)[0].outputs
    ways = all_ways(arguments, agreement(pair, outputs))
    entries, wrong = [], []
    for batch_size in arguments.batch_sizes:
        methods = [method_of(pair, way, batch_size, arguments.max_new_tokens) for way in ways]
        results = measure(pair, reference, methods, arguments.repeats, log_to_stderr, CLOCKS[arguments.clock])
        wrong += [result.method.label for result in results if result.refused]
        entries += judged(ways, results)
    print(table(entries))
    if arguments.plot is not None:
        first = arguments.batch_sizes[0]
        plot_calibration([entry for entry in entries if entry["batch_size"] == first], arguments.plot)
    for label in wrong:
        log_to_stderr(f"NOT EQUAL to plain decoding, not timed: {label}")
    return {"policies": entries}, not wrong


# ---- the guarantee


def speed_behind_first_steps(
    pair: Pair, batch: Batch, options: dict[str, Any], max_new_tokens: int, clock: Clock
) -> float:
    """Tokens per second behind the first steps, while the batch is full: plain decoding ends all rows at once, drafts
    one after the other. Where there are fewer than twice as many steps, behind the first half of them."""
    times, tokens, is_full = [], [], True

    def on_commit(report: specdec.StepReport) -> None:
        nonlocal is_full
        if is_full:
            times.append(clock())
            tokens.append(int(report.num_committed.sum()))
        is_full = is_full and not report.finished.any()

    specdec.generate(
        pair.target, batch.input_ids, batch.attention_mask, max_new_tokens=max_new_tokens, eos_token_id=None,
        on_commit=on_commit, **options,
    )  # fmt: skip
    synchronise(batch.input_ids.device)
    skipped = min(FIRST_STEPS, len(times) // 2)  # and prefill's report
    return sum(tokens[skipped + 1 :]) / (times[-1] - times[skipped])


def guarantee(pair: Pair, arguments: argparse.Namespace) -> tuple[dict, bool]:
    torch.manual_seed(arguments.seed)
    random_draft = AutoModelForCausalLM.from_config(pair.draft.config).to(pair.draft.device, pair.draft.dtype).eval()
    greedy = {"do_sample": False}
    sampled = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": arguments.seed}
    cases: list[tuple[str, Any, dict]] = [
        ("draft", pair.draft, greedy),
        ("random draft", random_draft, greedy),
        ("prompt_lookup, sampled text", "prompt_lookup", sampled),
    ]
    entries = []
    for batch_size in arguments.batch_sizes:
        for name, drafter, decoding in cases:
            entries.append(guaranteed(pair, batch_size, name, drafter, decoding, arguments))
            log_to_stderr(f"batch {batch_size}, {name}: {entries[-1]['over_plain']['median']:.3f}")
    header = ("drafter", "batch", "plain tokens/s", "cost_model tokens/s", "over plain (range)")
    rows = [
        (
            entry["drafter"],
            str(entry["batch_size"]),
            f"{entry['plain']['median']:.0f}",
            f"{entry['cost_model']['median']:.0f}",
            "{median:.3f} ({min:.3f}-{max:.3f})".format(**entry["over_plain"]),
        )
        for entry in entries
    ]
    print(markdown(header, rows))
    return {"guarantee": entries}, all(entry["over_plain"]["median"] >= 0.97 for entry in entries)


def guaranteed(
    pair: Pair, batch_size: int, name: str, drafter: Any, decoding: dict, arguments: argparse.Namespace
) -> dict:
    """Interleaved repeats, each way first in every other one; the first of both is a warm-up."""
    repeated = Pair(pair.name, pair.target, pair.draft, (pair.prompts * batch_size)[:batch_size])
    batch = left_pad(repeated, range(batch_size))
    speeds: dict[str, list[float]] = {"plain": [], "cost_model": []}
    load, clock = ForeignLoad(), CLOCKS[arguments.clock]
    for repeat in range(arguments.repeats + 1):
        for way in ("plain", "cost_model")[:: 1 if repeat % 2 else -1]:
            options = dict(decoding)
            if way == "cost_model":
                own = ClockOf(clock) if arguments.clock == "cpu" else None
                options |= {"drafter": drafter, "length_policy": CostModel(clock=own, knowledge=Knowledge())}
            speed = speed_behind_first_steps(repeated, batch, options, arguments.max_new_tokens, clock)
            if repeat:
                speeds[way].append(speed)
    ratios = [ours / plain for ours, plain in zip(speeds["cost_model"], speeds["plain"], strict=True)]
    found = {**speeds, "over_plain": ratios}
    spreads = {key: vars(Spread.of(values)) for key, values in found.items()}
    return {"drafter": name, "batch_size": batch_size, **spreads, "foreign_cores": load.cores()}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--head", type=Path, help="folder with the heads, by default the draft's")
    parser.add_argument("--num-prompts", type=positive, default=24, help="how many of the prompts, from the first")
    parser.add_argument("--max-new-tokens", type=positive, help="by default 96, and 160 with --guarantee")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--num-speculative-tokens", type=numbers, default=(2, 3, 4, 5, 6, 7, 8, 10, 12), help="fixed K")
    parser.add_argument("--batch-sizes", type=numbers, help="by default 1, and 1,8,32,64 with --guarantee")
    parser.add_argument("--guarantee", action="store_true", help="compare the cost model with plain decoding instead")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall",
        help="cpu: the time that this process computes, for one thread on a machine that others use too",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw predicted against actual acceptance there")
    parser.add_argument("--json", type=Path, help="the record; by default benchmarks/results/policies-<device>-<date>")
    arguments = parser.parse_args(argv)
    if arguments.clock == "cpu" and (arguments.device != "cpu" or torch.get_num_threads() > 1):
        parser.error("--clock cpu is for --device cpu with one thread; set OMP_NUM_THREADS=1")
    arguments.head = arguments.head or arguments.models / "draft"
    arguments.max_new_tokens = arguments.max_new_tokens or (160 if arguments.guarantee else 96)
    arguments.batch_sizes = arguments.batch_sizes or ((1, 8, 32, 64) if arguments.guarantee else (1,))
    for batch_size in () if arguments.guarantee else arguments.batch_sizes:
        if arguments.num_prompts % batch_size:
            parser.error(f"--num-prompts {arguments.num_prompts} is no multiple of batch size {batch_size}")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(arguments.seed)
    now, device = datetime.now(timezone.utc), torch.device(arguments.device)
    record = {"date": now.isoformat(timespec="seconds")} | environment(device, "benchmarks/policies.py", argv)
    pair = load_pair(arguments.models, arguments.num_prompts, getattr(torch, arguments.dtype), device)
    names = ("device", "clock", "dtype", "seed", "max_new_tokens", "repeats")
    record |= {name: getattr(arguments, name) for name in names} | describe_pair(pair)
    load = ForeignLoad()
    found, passed = (guarantee if arguments.guarantee else compare)(pair, arguments)
    record |= found | {"foreign_cores": load.cores()}
    kind = "guarantee" if arguments.guarantee else "policies"
    path = arguments.json or RESULTS / f"{kind}-{arguments.device}-{now:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
