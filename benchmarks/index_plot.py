"""The picture of the index benchmark: four panels over the length of the context."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Rows = list[dict[str, Any]]


def draw(rows: Rows, title: str, path: Path) -> None:
    """Draw build, search, insert and error over the tokens, one colour for each kind of layer."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    build, search, insert, error = figure.subplots(2, 2).flatten()
    figure.suptitle(title)
    groups = _groups(rows)
    for panel, styles in (
        (build, {"build_s": ("-", "index")}),
        (
            search,
            {
                "search_ms": ("-", "index"),
                "flat_search_ms": (":", "scan of every leaf"),
                "exact_scan_ms": ("--", "scan of every key"),
            },
        ),
        (insert, {"insert_ms": ("-", "median"), "insert_p99_ms": (":", "99th percentile")}),
        (error, {"error_ratio": ("-", "index")}),
    ):
        _curves(panel, groups, styles)
    _finish(build, "index the keys of one layer", "seconds")
    _finish(search, "search for one query token, all heads", "milliseconds")
    _finish(insert, "insert one token into every KV head", "milliseconds")
    _finish(error, "error of the attention output over that of a scan of every leaf", "ratio")
    _around_one(error)
    figure.legend(
        handles=[
            Line2D([], [], color=f"C{number}", marker="o", markersize=4, label=name)
            for number, name in enumerate(groups)
        ],
        loc="outside lower center",
        ncols=3,
    )
    figure.savefig(path, format="png", dpi=110)


def _groups(rows: Rows) -> dict[str, Rows]:
    """Rows by source and shape; the recorded layers of a file and a length are one mean."""
    cells: dict[str, dict[int, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["tokens"]):
        name = f"{row['source']}, {row['kv_heads']} x {row['head_dim']}"
        cells[name][row["tokens"]].append(row)
    return {name: [_mean(of) for of in cells[name].values()] for name in cells}


def _mean(rows: Rows) -> dict[str, Any]:
    mean = dict(rows[0])
    for field in mean:
        found = [row[field] for row in rows if isinstance(row[field], float)]
        if found:
            mean[field] = sum(found) / len(found)
    return mean


def _curves(axes: Axes, groups: dict[str, Rows], styles: dict[str, tuple[str, str]]) -> None:
    """Draw fields of the rows, a line style each; a legend of styles where there are several."""
    drawn = {}
    for number, rows in enumerate(groups.values()):
        for field, (style, label) in styles.items():
            points = [(row["tokens"], row[field]) for row in rows if row[field] is not None]
            if points:
                axes.plot(*zip(*points), style, marker="o", markersize=4, color=f"C{number}")
                drawn[label] = Line2D([], [], color="0.3", linestyle=style, label=label)
    if len(styles) > 1:
        axes.legend(handles=list(drawn.values()), fontsize=9)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="tokens", ylabel=unit, yscale="log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(_size))
    axes.grid(alpha=0.3)


def _around_one(axes: Axes) -> None:
    axes.axhline(1.0, color="0.6", linewidth=1, zorder=0)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.8), max(high, 1.25))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.1, 1.2, 1.5, 2.0, 5.0, 8.0, 9.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _size(tokens: float, _: int | None = None) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return f"{tokens:g}"
