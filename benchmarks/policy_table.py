"""Results of `policies.py`: each kind at the setting chosen on other prompts, a table, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from policy_ways import Way

from specdec.bench.measure import Result
from specdec.bench.report.statistics import Estimate, Timing, rate, speedup
from specdec.bench.report.tables import markdown


def judged(ways: Sequence[Way], results: Sequence[Result]) -> list[dict]:
    """Each kind at the setting that was fastest on every other prompt, judged by its speed on the rest; at batch sizes
    above 1, where single prompts have no times, on all prompts. Empty if no fixed K was timed."""
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
    """The estimate minus 1."""
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
