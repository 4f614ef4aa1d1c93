"""The picture of the decode benchmark: time per token over the length of the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

Rows = list[dict[str, Any]]

_LABELS = {
    "icecache": "IceCache",
    "icecache:torch": "IceCache, step by torch",
    "icecache:compiled": "IceCache, step by torch.compile",
    "llama.cpp": "llama.cpp, 4 bits a weight",
    "dynamic": "DynamicCache",
    "static": "StaticCache",
    "quantized": "QuantizedCache, 4 bits",
    "quantized:fp8": "QuantizedCache, fp8",
    "offloaded": "DynamicCache, offloaded",
}


def draw(rows: Rows, title: str, path: Path) -> None:
    """Draw the medians, a line for each cache; synthetic contexts are hollow points."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row["cache"] for row in rows)):
        found = sorted((row for row in rows if row["cache"] == name), key=lambda r: r["context"])
        colour = f"C{number}"
        contexts = [row["context"] for row in found]
        times = [row["tpot_ms_median"] for row in found]
        axes.plot(contexts, times, color=colour, label=_LABELS.get(name, name))
        for row in found:
            face = "white" if row["synthetic"] else colour
            point = row["context"], row["tpot_ms_median"]
            axes.plot(*point, "o", color=colour, markerfacecolor=face, markersize=5)
    axes.set(title=title, xlabel="tokens of context", ylabel="milliseconds per token, median")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["context"] for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_size))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(title="hollow: synthetic context" * any(row["synthetic"] for row in rows) or None)
    figure.savefig(path, format="png", dpi=110)


def _size(tokens: float, _: int | None = None) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:g}"
