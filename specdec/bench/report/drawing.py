"""How plots look: one style, colours, lines with their intervals, SVG. matplotlib is imported only for drawing."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 8.0, 4.2  # inches
# Okabe and Ito's palette, distinguishable for the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#7A5195", "#8C613C")


@contextmanager
def figure(panels: int = 1, height: float = HEIGHT) -> Iterator[tuple[Figure, Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "path", "svg.hashsalt": "specdec", "font.size": 10, "axes.grid": True, "grid.color": "#dddddd",
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(WIDTH, height), layout="constrained")
        yield drawing, drawing.subplots(1, panels)


def svg(drawing: Figure) -> str:
    out = io.StringIO()
    drawing.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def colored(names: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    return zip(names, cycle(COLORS), strict=False)


def line(axes: Axes, x: Sequence[float], spreads: Sequence[dict], label: str, color: str) -> None:
    """Medians with their intervals; a single point is drawn as a marker."""
    middle = [spread["median"] for spread in spreads]
    below = [max(0.0, spread["median"] - spread["low"]) for spread in spreads]
    above = [max(0.0, spread["high"] - spread["median"]) for spread in spreads]
    style = "o-" if len(x) > 1 else "s"
    axes.errorbar(x, middle, [below, above], fmt=style, color=color, label=label, capsize=3, markersize=5)


def baseline(axes: Axes) -> None:
    axes.axhline(1, color="#444444", linewidth=1, linestyle="--")
    axes.set_ylim(bottom=0)


def legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
