"""The record as one self-contained HTML page: no network, no script, plots embedded."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from specdec.bench.report.plots import Plot, plots
from specdec.bench.report.tables import all_tables, summary

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", Arial, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1180px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p.caption, dl { color: #444; margin: .3rem 0 .8rem; max-width: 62rem; }
ul.summary li.bad { color: #a40000; font-weight: 600; }
img { max-width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #e2e2e2; white-space: nowrap; }
th { border-bottom: 2px solid #999; vertical-align: bottom; }
th.wrap { white-space: normal; }
th:first-child, td:first-child { text-align: left; }
tr.bad td { color: #a40000; }
dt { font-weight: 600; float: left; clear: left; margin-right: .5rem; }
dd { margin: 0; }
code { font-size: .84rem; overflow-wrap: anywhere; }
"""
NOT_EQUAL = "NOT EQUAL"


def page(record: dict) -> str:
    """Needs matplotlib, the `bench` extra."""
    name = escape(record["models"]["name"])
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>specdec bench: {name}</title><style>{STYLE}</style></head><body>",
        f"<h1>specdec bench: {name}</h1>",
        bullets(summary(record)),
        origin(record),
        *map(picture, plots(record)),
        *(table(title, header, rows) for title, (header, rows) in all_tables(record)),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def bullets(lines: Sequence[str]) -> str:
    items = (f"<li{' class=bad' if line.startswith(NOT_EQUAL) else ''}>{escape(line)}</li>" for line in lines)
    return f"<ul class=summary>{''.join(items)}</ul>"


def origin(record: dict) -> str:
    """Where, when and with what."""
    machine, models = record["machine"], record["models"]
    revision = (record["git_sha"] or "unknown") + (" with uncommitted changes" if record["git_dirty"] else "")
    memory = f", {machine['memory_gb']} GB" if machine.get("memory_gb") else ""

    sizes = [
        f"{role} {models[role]['model_type']} of {models[role]['num_parameters'] / 1e6:.1f}M parameters"
        for role in ("target", "draft")
        if models[role] is not None
    ]

    facts = {
        "Models": ", ".join(sizes),
        "Setting": f"{record['dtype']} on {record['device']}, greedy, "
        f"{record['max_new_tokens']} new tokens per prompt, {record['repeats']} repeats, seed {record['seed']}",
        "Machine": f"{machine.get('gpu', machine['processor'])}, {machine['cpu_count']} cores, "
        f"threads used: {machine['num_threads']}{memory}",
        "Versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "Revision": f"{revision}, {record['date']}",
    }

    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{items}<dt>Command</dt><dd><code>{escape(record['command'])}</code></dd></dl>"


def picture(plot: Plot) -> str:
    """As a separate image, so that ids in one drawing cannot clash with those of another."""
    data = base64.b64encode(plot.svg.encode()).decode()
    return (
        f"<h2>{escape(plot.title)}</h2><p class=caption>{escape(plot.caption)}</p>"
        f'<img alt="{escape(plot.title)}" src="data:image/svg+xml;base64,{data}">'
    )


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th class=wrap>{escape(text)}</th>" for text in header)
    body = "".join(
        f"<tr{' class=bad' if any(NOT_EQUAL in text for text in row) else ''}>"
        + "".join(f"<td>{escape(text)}</td>" for text in row)
        + "</tr>"
        for row in rows
    )
    return f"<h2>{escape(title)}</h2><div class=table><table><tr>{head}</tr>{body}</table></div>"
