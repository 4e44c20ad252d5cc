"""The record as plots. They need matplotlib, the `bench` extra."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import NamedTuple

from specdec.bench.methods import PLAIN
from specdec.bench.report.drawing import COLORS, baseline, colored, figure, legend, line, svg
from specdec.bench.report.record import median_of
from specdec.bench.sweeps import SYNTHETIC
from specdec.check.ways import AXES

MOVING = ("realign", "move rows")


class Plot(NamedTuple):
    """svg: a whole document."""

    title: str
    caption: str
    svg: str


def plots(record: dict) -> list[Plot]:
    """All plots for which the record has figures."""
    first = record["suites"][0]["name"]
    entries = [entry for entry in record["results"] if entry["suite"] == first and entry["timed"]]
    drawn = [
        speedup_by_batch(entries),
        acceptance_by_position(entries),
        time_by_stage(entries),
        cost_of_layouts(entries),
        forced_acceptance(entries),
        speedup_by_context(record),
    ]
    return [plot for plot in drawn if plot is not None]


def speedup_by_batch(entries: Sequence[dict]) -> Plot | None:
    """One line per method, at each batch size with its best K; other layouts have their own plot."""
    best = fastest(entry for entry in entries if not is_synthetic(entry) and "layout" not in entry["options"])
    sizes = sorted({entry["batch_size"] for entry in best})
    names = list(dict.fromkeys(entry["method"] for entry in best if entry["method"] != PLAIN))
    if not names:
        return None

    with figure() as (drawing, axes):
        for index, (name, color) in enumerate(colored(names)):
            aside = 0.035 * (index - (len(names) - 1) / 2)  # offset, so that equal speeds do not hide each other
            found = sorted((entry for entry in best if entry["method"] == name), key=lambda e: e["batch_size"])
            at = [sizes.index(entry["batch_size"]) + aside for entry in found]
            line(axes, at, [entry["speedup_over_plain"] for entry in found], name, color)

        baseline(axes)
        axes.set_xticks(range(len(sizes)), map(str, sizes))
        axes.set_xlim(-0.3, len(sizes) - 0.7)
        axes.set(xlabel="prompts decoded together", ylabel="speed, as a multiple of transformers plain")
        legend(axes)

        return Plot(
            "Speed by batch size",
            "Multiples of transformers' plain decoding at the same batch size, each method at its fastest K; bars are "
            "95 % bootstrap intervals. transformers speculates for one prompt at a time only.",
            svg(drawing),
        )


def acceptance_by_position(entries: Sequence[dict]) -> Plot | None:
    """One line per drafter, with its largest K; layouts make no difference here."""
    drafting = [e for e in entries if e.get("acceptance_by_position") and "layout" not in e["options"]]
    if not drafting:
        return None

    size = min(entry["batch_size"] for entry in drafting)
    longest: dict[str, dict] = {}
    for entry in drafting:
        known = longest.get(entry["method"])
        if entry["batch_size"] == size and (known is None or k_of(entry) > k_of(known)):
            longest[entry["method"]] = entry

    with figure() as (drawing, axes):
        for (name, entry), color in zip(longest.items(), cycle(COLORS), strict=False):
            rates = entry["acceptance_by_position"]
            axes.plot(range(1, len(rates) + 1), rates, "o-", color=color, label=f"{name}, K = {k_of(entry)}")
            tried = entry["conditional_acceptance_by_position"]
            axes.plot(range(1, len(tried) + 1), tried, "o:", color=color, alpha=0.6)

        axes.set_xticks(range(1, 1 + max(len(e["acceptance_by_position"]) for e in longest.values())))
        axes.set_ylim(0, 1.02)
        axes.set(xlabel="position in the draft", ylabel="share accepted")
        legend(axes)

        return Plot(
            "Acceptance by position",
            f"Solid: of all steps, those that accepted the token at this position. Dotted: of the steps that drafted "
            f"it and accepted all before it. Batch {size}.",
            svg(drawing),
        )


def time_by_stage(entries: Sequence[dict]) -> Plot | None:
    best = fastest(entry for entry in entries if entry.get("stages") and not is_synthetic(entry))
    if not best:
        return None
    stages = list(best[0]["stages"]["share"])
    labels = [f"{e['method'].removeprefix('specdec ')}{k_text(e)}, batch {e['batch_size']}" for e in best]
    with figure(height=1.4 + 0.32 * len(best)) as (drawing, axes):
        left = [0.0] * len(best)
        for stage, color in zip(stages, COLORS, strict=False):
            shares = [100 * entry["stages"]["share"][stage] for entry in best]
            axes.barh(labels, shares, left=left, color=color, label=stage, height=0.75)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the time of specdec.generate")
        axes.grid(False, axis="y")
        drawing.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
        return Plot("Time by stage", "Each method with its fastest K. Stages do not overlap.", svg(drawing))


def cost_of_layouts(entries: Sequence[dict]) -> Plot | None:
    """Left: speed over that of the ragged layout. Right: the share of time that moves keys and values."""
    found = [e for e in entries if e["is_ours"] and set(e["options"]) <= {"layout"} and not is_synthetic(e)]
    of_layout = {(base_of(e), e["batch_size"], layout_of(e)): e for e in fastest(found)}
    layouts = list(dict.fromkeys(layout for _, _, layout in of_layout))
    if len(layouts) < 2:
        return None
    groups = list(dict.fromkeys((base, size) for base, size, _ in of_layout))
    names = [f"{base}\nbatch {size}" for base, size in groups]

    with figure(panels=2, height=1.6 + 0.6 * len(groups)) as (drawing, (speeds, shares)):
        height = 0.8 / len(layouts)
        for place, (layout, color) in enumerate(zip(layouts, COLORS, strict=False)):
            at = [i + (place - (len(layouts) - 1) / 2) * height for i in range(len(groups))]
            chosen = [of_layout.get((*group, layout)) for group in groups]
            ragged = [of_layout.get((*group, AXES["layout"])) for group in groups]
            speeds.barh(
                at, [ratio(a, b) for a, b in zip(chosen, ragged, strict=True)], height, color=color, label=layout
            )
            shares.barh(at, [moving_share(entry) for entry in chosen], height, color=color)
        for axes in (speeds, shares):
            axes.invert_yaxis()
            axes.grid(False, axis="y")
        speeds.set_yticks(range(len(groups)), names)
        shares.set_yticks(range(len(groups)), [""] * len(groups))
        speeds.axvline(1, color="#444444", linewidth=1)
        speeds.set_xlabel("tokens/s, over the ragged layout's")
        shares.set_xlabel("% of time that moves keys and values")
        drawing.legend(*speeds.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)

        return Plot(
            "Cost of each layout",
            "repad (EQSPEC) moves rows so that they end in one column; grouped (EXSPEC) takes rows that already "
            "do, 8 per step; ragged moves only the rows after one that has left.",
            svg(drawing),
        )


def forced_acceptance(entries: Sequence[dict]) -> Plot | None:
    """A line for each K and batch size."""
    forced = [entry for entry in entries if is_synthetic(entry)]
    kinds = list(dict.fromkeys((entry["batch_size"], k_of(entry)) for entry in forced))
    if not kinds:
        return None

    with figure() as (drawing, axes):
        for (size, k), color in colored(kinds):
            found = [entry for entry in forced if (entry["batch_size"], k_of(entry)) == (size, k)]
            found.sort(key=rate_of)
            spreads = [entry["speedup_over_plain"] for entry in found]
            line(axes, [rate_of(entry) for entry in found], spreads, f"K = {k}, batch {size}", color)
        plain = [e for e in entries if e["method"] == "specdec plain" and not e["options"]]
        for entry, style in zip(plain, cycle(("--", "-.", ":")), strict=False):
            level = median_of(entry["speedup_over_plain"])
            axes.axhline(
                level, color="#444444", linestyle=style, linewidth=1, label=f"no drafts, batch {entry['batch_size']}"
            )
        axes.set(
            xlabel="probability that a draft token is accepted", ylabel="speed, as a multiple of transformers plain"
        )
        legend(axes)

        return Plot(
            "What a drafter would gain",
            "A drafter without cost whose tokens are right with the given probability. Drafting starts to pay where "
            "a line crosses that of the same loop without drafts; a drafter that takes time needs more.",
            svg(drawing),
        )


def speedup_by_context(record: dict) -> Plot | None:
    lengths = {suite["name"]: suite["prompt_tokens"]["max"] for suite in record["suites"][1:]}
    entries = [e for e in record["results"] if e["suite"] in lengths and e["timed"] and e["method"] != PLAIN]
    if not entries:
        return None
    by_suite = [best for name in lengths for best in fastest(e for e in entries if e["suite"] == name)]
    kinds = list(dict.fromkeys((entry["method"], entry["batch_size"]) for entry in by_suite))

    with figure() as (drawing, axes):
        for kind, color in colored(kinds):
            found = [entry for entry in by_suite if (entry["method"], entry["batch_size"]) == kind]
            found.sort(key=lambda entry: lengths[entry["suite"]])
            at = [lengths[entry["suite"]] for entry in found]
            line(axes, at, [e["speedup_over_plain"] for e in found], f"{kind[0]}, batch {kind[1]}", color)
        baseline(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(lengths.values()), map(str, sorted(lengths.values())))
        axes.minorticks_off()
        axes.set(xlabel="tokens of the prompt", ylabel="speed, as a multiple of transformers plain")
        legend(axes)

        return Plot("Speed by context length", "Each method with its fastest K; prefill included.", svg(drawing))


def fastest(entries: Iterable[dict]) -> list[dict]:
    """For each method and batch size, the entry with the fastest K."""
    best: dict[tuple, dict] = {}
    for entry in entries:
        key = (entry["method"], entry["batch_size"])
        known = best.get(key)
        if known is None or speed_of(entry) > speed_of(known):
            best[key] = entry
    return list(best.values())


def speed_of(entry: dict) -> float:
    return entry["tokens_per_second"]["median"]


def k_of(entry: dict) -> int:
    return entry["num_speculative_tokens"] or 0


def k_text(entry: dict) -> str:
    return f", K = {k_of(entry)}" if k_of(entry) else ""


def is_synthetic(entry: dict) -> bool:
    return entry["method"].startswith(SYNTHETIC)


def rate_of(entry: dict) -> float:
    return float(entry["method"].removeprefix(SYNTHETIC))


def layout_of(entry: dict) -> str:
    return entry["options"].get("layout", AXES["layout"])


def base_of(entry: dict) -> str:
    """The method without its layout."""
    return entry["method"].removeprefix("specdec ").removesuffix(f" {layout_of(entry)}")


def ratio(entry: dict | None, base: dict | None) -> float:
    return float("nan") if entry is None or base is None else speed_of(entry) / speed_of(base)


def moving_share(entry: dict | None) -> float:
    if entry is None or not entry.get("stages"):
        return float("nan")
    return 100 * sum(entry["stages"]["share"][stage] for stage in MOVING)
