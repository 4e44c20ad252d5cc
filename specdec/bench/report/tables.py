"""The record as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from specdec.bench.report.record import label_of

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header and rows


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: float | dict | None, spec: str = ".2f", spread: bool = False) -> str:
    """A number, or an estimate's median with its interval."""
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return format(value, spec)
    text = format(value["median"], spec)
    return f"{text} ({value['low']:{spec}}-{value['high']:{spec}})" if spread else text


def speed_table(entries: Sequence[dict]) -> Table:
    header = ("method", "batch", "K", "equal", "tokens/s (95 %)", "x plain (95 %)", "x assisted", "x plain, no loops",
              "acceptance length", "acceptance rate")  # fmt: skip
    rows = []
    for entry in entries:
        without = entry["without_loops"] or {}
        untimed = f"FAILED, {entry['failure'].partition(':')[0]}" if "failure" in entry else "NOT EQUAL, not timed"
        speed = cell(entry["tokens_per_second"], ".0f", spread=True) if entry["timed"] else untimed
        rows.append(
            (
                entry["method"],
                str(entry["batch_size"]),
                cell(entry["num_speculative_tokens"], "d"),
                f"{entry['num_equal']}/{entry['num_prompts']}",
                speed,
                cell(entry["speedup_over_plain"], spread=True),
                cell(entry["speedup_over_assisted"]),
                cell(without.get("speedup_over_plain")),
                cell(entry.get("mean_acceptance_length")),
                cell(entry["draft_acceptance_rate"] if entry.get("num_draft_tokens") else None),
            )
        )
    return header, rows


def latency_table(entries: Sequence[dict]) -> Table:
    header = ("method", "batch", "K", "first token ms, p50", "p90", "p99", "whole row ms, p50", "p90", "p99",
              "target calls", "draft calls", "peak MiB", "roofline")  # fmt: skip
    rows = []
    for entry in entries:
        if "latency_ms" in entry:
            first, last = entry["time_to_first_token_ms"], entry["latency_ms"]
            times = [cell(found[p], ".1f") for found in (first, last) for p in ("p50", "p90", "p99")]
            calls = [cell(entry.get(name), "d") for name in ("num_target_calls", "num_draft_calls")]
            more = [cell(entry["peak_memory_mib"], ".0f"), cell(entry.get("roofline_ratio"))]
            k = cell(entry["num_speculative_tokens"], "d")
            rows.append((entry["method"], str(entry["batch_size"]), k, *times, *calls, *more))
    return header, rows


def category_table(entries: Sequence[dict], names: Sequence[str]) -> Table:
    """Speedup over plain if each call holds one prompt, and the acceptance length."""
    header = ("method", "batch", "K", *names)
    rows = []
    for entry in entries:
        parts = [entry["categories"][name] for name in names]
        if any(part["speedup_over_plain"] or part["mean_acceptance_length"] for part in parts):
            cells = [f"{cell(part['speedup_over_plain'])} / {cell(part['mean_acceptance_length'])}" for part in parts]
            rows.append((entry["method"], str(entry["batch_size"]), cell(entry["num_speculative_tokens"], "d"), *cells))
    return header, rows


def stage_table(entries: Sequence[dict]) -> Table:
    """Shares in percent of the time of `specdec.generate`, followed by milliseconds per forward."""
    profiled = [entry for entry in entries if entry.get("stages")]
    stages = list(profiled[0]["stages"]["share"]) if profiled else []
    header = ("method", "batch", "K", *(f"{stage} %" for stage in stages), "ms per verify", "ms per draft call")
    rows = []
    for entry in profiled:
        found = entry["stages"]
        shares = [format(100 * found["share"][stage], ".1f") for stage in stages]
        k = cell(entry["num_speculative_tokens"], "d")
        times = cell(found["verify_ms_per_call"]), cell(found["draft_ms_per_call"])
        rows.append((entry["method"], str(entry["batch_size"]), k, *shares, *times))
    return header, rows


def position_table(entries: Sequence[dict]) -> Table:
    """The share of steps that accepted draft token 1, 2, ...; layouts make no difference here."""
    drafting = [e for e in entries if e.get("acceptance_by_position") and "layout" not in e["options"]]
    width = max((len(entry["acceptance_by_position"]) for entry in drafting), default=0)
    header = ("method", "batch", "K", *map(str, range(1, width + 1)))
    rows = []
    for entry in drafting:
        rates = [cell(rate) for rate in entry["acceptance_by_position"]]
        rates += ["-"] * (width - len(rates))
        rows.append((entry["method"], str(entry["batch_size"]), cell(entry["num_speculative_tokens"], "d"), *rates))
    return header, rows


def layout_table(entries: Sequence[dict]) -> Table:
    """Speed relative to the ragged layout, the time that moving keys takes, and how often it was not needed."""
    header = ("method", "batch", "K", "x ragged", "realign %", "move rows %", "steps without realignment %")
    plain = {(e["method"], e["batch_size"], e["num_speculative_tokens"]): e for e in entries if e["timed"]}
    rows = []
    for entry in entries:
        layout = entry["options"].get("layout")
        base = entry["method"].removesuffix(f" {layout}")
        ragged = plain.get((base, entry["batch_size"], entry["num_speculative_tokens"]))
        if layout is None or ragged is None or not entry["timed"]:
            continue
        ratio = entry["tokens_per_second"]["median"] / ragged["tokens_per_second"]["median"]
        share = entry["stages"]["share"] if entry.get("stages") else {}
        moving = [cell(100 * share[stage] if share else None, ".1f") for stage in ("realign", "move rows")]
        k, rate = cell(entry["num_speculative_tokens"], "d"), cell(100 * entry["grouping_rate"], ".0f")
        rows.append((entry["method"], str(entry["batch_size"]), k, cell(ratio), *moving, rate))
    return header, rows


def without_empty_columns(table: Table) -> Table:
    """The table without columns that are empty in every row."""
    header, rows = table
    kept = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def all_tables(record: dict) -> list[tuple[str, Table]]:
    """Title and table, for all tables that have rows."""
    found: list[tuple[str, Table]] = []
    for suite in record["suites"]:
        entries = [entry for entry in record["results"] if entry["suite"] == suite["name"]]
        tables = [
            ("Speed", speed_table(entries)),
            ("By category: x plain / acceptance length", category_table(entries, suite["categories"])),
            ("Latency, calls, memory", latency_table(entries)),
            ("Acceptance by position", position_table(entries)),
            ("Layouts", layout_table(entries)),
            ("Time by stage", stage_table(entries)),
        ]
        behind = "" if len(record["suites"]) == 1 else f", {suite['name']}"
        found += [
            (f"{title}{behind}", without_empty_columns(table))
            for title, table in tables
            if table[1] and len(table[0]) > 3
        ]
    return found


def summary(record: dict) -> list[str]:
    """Sentences that belong above any table."""
    lines = []
    for suite in record["suites"]:
        lengths = suite["prompt_tokens"]
        lines.append(
            f"{suite['name']}: {suite['num_prompts']} prompts of {lengths['min']} to {lengths['max']} tokens, "
            f"{suite['num_new_tokens']} new tokens in all; {suite['num_looping']} of the continuations "
            f"({suite['num_looping'] / suite['num_prompts']:.0%}) end in a loop"
            + (f"; {suite['num_shortened']} prompts were shortened" if suite["num_shortened"] else "")
        )
    unequal = [entry for entry in record["results"] if entry["num_equal"] < entry["num_prompts"]]
    for entry in unequal:
        verdict = "timed, because it is a peer" if entry["timed"] else "not timed"
        lines.append(
            f"NOT EQUAL to plain decoding ({entry['num_equal']} of {entry['num_prompts']} prompts), {verdict}: "
            f"{label_of(entry)}"
        )
    if not unequal:
        lines.append("Every method's outputs equal plain greedy decoding, token for token.")
    return lines


def document(record: dict) -> str:
    """The whole record as Markdown."""
    machine, versions = record["machine"], record["versions"]
    lines = [
        f"# specdec bench: {record['models']['name']}",
        "",
        *(f"- {line}" for line in summary(record)),
        f"- {record['dtype']} on {machine.get('gpu', machine['processor'])}, {record['repeats']} repeats, "
        f"seed {record['seed']}, {record['date']}",
        "- " + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f", revision {record['git_sha'] or 'unknown'}{' with changes' if record['git_dirty'] else ''}",
        f"- `{record['command']}`",
    ]  # fmt: skip
    for title, (header, rows) in all_tables(record):
        lines += ["", f"## {title}", "", markdown(header, rows)]
    return "\n".join(lines) + "\n"
