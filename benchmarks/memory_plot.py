"""The picture of the memory benchmark: error over index bytes, a panel for each budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from memory_codes import CODES

from icecache import IceCacheConfig

Rows = list[dict[str, Any]]

_BYTES = (3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 120)
_RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


class _Style(NamedTuple):
    """Colour: the keys' code; line: the values' code; labels: which side of the points."""

    colour: str
    line: str
    labels: str | None = None


_STYLES = {
    "int8": _Style("C0", "-", "right"),
    "int4 values": _Style("C0", "--"),
    "int8 keys, no values": _Style("C0", ":", "right"),
    "int4 keys": _Style("C2", "-"),
    "int4 both": _Style("C2", "--", "left"),
    "int4 keys, no values": _Style("C2", ":", "left"),
}


def draw(rows: Rows, path: Path) -> None:
    """Draw the ratio over the bytes per token, a line for each of the codes; rows are means."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    figure = Figure(figsize=(6.4 * len(budgets), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(budgets), squeeze=False)[0]
    for axes, budget in zip(panels, budgets):
        of_budget = [row for row in rows if row["budget"] == budget]
        for name, style in _STYLES.items():
            _curve(axes, name, style, [row for row in of_budget if row["codes"] == name])
        _mark_default(axes, of_budget)
        _finish(axes, f"budget {budget} tokens")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    files = rows[0]["files"]
    of = f"{files} recording{'s' * (files > 1)}"
    figure.suptitle(f"Error over index bytes, means over {of}; at the points: leaf_size")
    figure.savefig(path, format="png", dpi=110)


def _curve(axes: Axes, name: str, style: _Style, rows: Rows) -> None:
    points = [(row["bytes_per_token"], row["ratio"]) for row in rows]
    if not points:
        return
    label = name + " (simulated)" * CODES[name].simulated
    axes.plot(*zip(*points), style.line, color=style.colour, marker="o", markersize=4, label=label)
    if style.labels is None:
        return
    right = style.labels == "right"
    for row, point in zip(rows, points):
        axes.annotate(
            str(row["leaf_size"]), point, (4, 3) if right else (-4, -3),
            textcoords="offset points", color=style.colour, fontsize=8,
            ha="left" if right else "right", va="bottom" if right else "top",
        )  # fmt: skip


def _mark_default(axes: Axes, rows: Rows) -> None:
    size = IceCacheConfig().leaf_size
    for row in rows:
        if row["codes"] == "int8" and row["leaf_size"] == size:
            point = row["bytes_per_token"], row["ratio"]
            axes.plot(*point, "*", color="k", markersize=14, zorder=3, label="default")


def _finish(axes: Axes, title: str) -> None:
    axes.axhline(1.0, color="0.6", linewidth=1, zorder=0)
    axes.set(title=title, xscale="log", yscale="log")
    axes.set(xlabel="index bytes per token and KV head", ylabel="error / that of exact top-k")
    for axis, ticks in ((axes.xaxis, _BYTES), (axes.yaxis, _RATIOS)):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)
