"""The plots of a report, as SVG that stands in the page itself."""

import io
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from icecache.evaluation.results.bootstrap import Interval, mean_interval
from icecache.evaluation.results.quoted import QUOTED, QUOTED_FULL
from icecache.evaluation.results.record import Record
from icecache.evaluation.results.tables import Results
from icecache.evaluation.tasks.registry import task_groups

__all__ = ["Plot", "draw_plots"]


class Plot(NamedTuple):
    """A plot: a title and an ``<svg>`` element."""

    title: str
    svg: str


def draw_plots(results: Results) -> list[Plot]:
    """Draw KL over the budget, scores over the full cache's, mass and error per layer."""
    drawn: list[tuple[str, Callable[[Any, Results], None]]] = [
        ("Distance from the full cache, nats", _kl_over_budget)
    ]
    if results.average(None) is not None:
        drawn += [
            (f"Score over the full cache's at {budget} tokens", partial(_ratios, budget))
            for budget in results.budgets
        ]
    if any(record.mass for record in results.of(None)):
        at = f"at {results.budgets[-1]} tokens"
        drawn += [
            (f"Attention mass attended exactly {at}", partial(_per_layer, attrgetter("mass"))),
            (f"Error of the attention output {at}", partial(_per_layer, attrgetter("error"))),
        ]
    return [_draw(title, draw, results) for title, draw in drawn]


def _draw(title: str, draw: Callable[[Any, Results], None], results: Results) -> Plot:
    import matplotlib
    from matplotlib.figure import Figure

    # without a fixed salt every drawing has other ids; text stays text
    settings = {"svg.hashsalt": "icecache", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        colors = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        # twenty in pairs: the strong ones first
        axes.set_prop_cycle(color=[*colors[::2], *colors[1::2]])
        draw(axes, results)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return Plot(title, text[text.index("<svg") :])


def _kl_over_budget(axes: Any, results: Results) -> None:
    for method in results.methods:
        budgets = [budget for budget in results.budgets if (method, budget) in results.cells]
        found = [mean_interval([r.kl for r in results.of((method, b))]) for b in budgets]
        values = np.array([entry.value for entry in found])
        spread = np.array([_arms(entry) for entry in found]).T
        axes.errorbar(budgets, values, yerr=spread.clip(min=0), marker="o", capsize=2, label=method)
    axes.set_xscale("log", base=2)
    # zero is on the axis: a budget that holds the context gives it
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_ylim(bottom=0)
    axes.set_xticks(results.budgets, [str(budget) for budget in results.budgets])
    axes.set_xlabel("tokens a KV head attends exactly")


def _arms(found: Interval) -> tuple[float, float]:
    """Return how far the interval reaches down and up; nowhere where there is none."""
    if found.low is None or found.high is None:
        return 0.0, 0.0
    return found.value - found.low, found.high - found.value


def _ratios(budget: int, axes: Any, results: Results) -> None:
    methods = [method for method in results.methods if (method, budget) in results.cells]
    # the paper's figures are of LongBench's English sets
    has_english = any(task in task_groups()["longbench_en"] for task in results.tasks)
    quoted = {q.method: q.score / QUOTED_FULL for q in QUOTED if q.budget == budget and has_english}
    tasks = [task for task in results.tasks if any(results.scores(None, task))]
    width = 0.8 / max(1, len(methods))
    for i, method in enumerate(methods):
        heights = [
            np.mean(results.scores((method, budget), task)) / np.mean(results.scores(None, task))
            for task in tasks
        ]
        places = np.arange(len(tasks)) + i * width
        bars = axes.bar(places, heights, width, label=method)
        if method in quoted:
            color = bars.patches[0].get_facecolor() if tasks else None
            label = f"{method}, quoted"
            axes.axhline(quoted[method], color=color, linestyle=":", linewidth=1, label=label)
    axes.set_xticks(np.arange(len(tasks)) + 0.4, tasks, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("ratio to the full cache")


def _per_layer(pick: Callable[[Record], tuple[float, ...]], axes: Any, results: Results) -> None:
    for method in results.methods:
        cell = (method, results.budgets[-1])
        if cell in results.cells:
            layers = np.mean([pick(record) for record in results.of(cell)], axis=0)
            axes.plot(layers, marker=".", label=method)
    axes.set_xlabel("full-attention layer")
