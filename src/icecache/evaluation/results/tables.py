"""Results summed up as tables of texts, which both report formats show."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from icecache.evaluation.results.bootstrap import (
    Interval,
    mean_interval,
    mean_of_means,
    ratio_interval,
)
from icecache.evaluation.results.quoted import QUOTED, QUOTED_FULL, QUOTED_SOURCE
from icecache.evaluation.results.record import Record
from icecache.evaluation.tasks.registry import task_groups

__all__ = ["Results", "Table", "summary_tables"]

_OURS = "icecache"
Cell = tuple[str, int]


class Table(NamedTuple):
    """A table: a title, what it says, and texts."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


class Results:
    """Records arranged by task, method and budget.

    Only samples that every method has at every budget count, so that means compare; a run that is
    under way has others, `num_partial` of them.
    """

    def __init__(self, records: list[Record]) -> None:
        self.cells: list[Cell] = list(
            dict.fromkeys((r.method, r.budget) for r in records if r.budget is not None)
        )
        self.methods = list(dict.fromkeys(method for method, _ in self.cells))
        self.budgets = sorted({budget for _, budget in self.cells})
        by_sample: dict[tuple[str, str], dict[Cell | None, Record]] = {}
        for record in records:
            cell = None if record.budget is None else (record.method, record.budget)
            by_sample.setdefault((record.task, record.id), {})[cell] = record
        wanted = {None, *self.cells}
        self._samples = [found for found in by_sample.values() if wanted <= found.keys()]
        self.num_samples = len(self._samples)
        self.num_partial = len(by_sample) - self.num_samples
        self.tasks = list(dict.fromkeys(found[None].task for found in self._samples))

    def of(self, cell: Cell | None, task: str | None = None) -> list[Record]:
        """Return a cell's records in the order of the samples; None is the full cache."""
        found = (sample[cell] for sample in self._samples)
        return [record for record in found if task in (None, record.task)]

    def scores(self, cell: Cell | None, task: str) -> list[float]:
        """Return a cell's scores on a task, in per cent; empty if none was asked."""
        return [100 * r.score for r in self.of(cell, task) if r.score is not None]

    def average(self, cell: Cell | None, among: Collection[str] | None = None) -> Interval | None:
        """Return the mean over tasks, all or those `among`, of the mean score, in per cent."""
        tasks = [task for task in self.tasks if among is None or task in among]
        groups = [scores for task in tasks if (scores := self.scores(cell, task))]
        return mean_of_means(groups) if groups else None


def summary_tables(results: Results) -> list[Table]:
    """Return all tables of a report."""
    tables = [
        _per_budget(
            results,
            "Distance from the full cache",
            "Mean KL(full || method) of the next token in nats, teacher-forced on the full cache's "
            "own answer, with 95 % bootstrap intervals over the samples. Lower is better.",
            lambda records: _shown(mean_interval([r.kl for r in records])),
        ),
        _ratios(results),
        _per_budget(
            results,
            "Same next token as the full cache",
            "Per cent of the forced steps.",
            lambda records: _shown(mean_interval([100 * r.top1 for r in records]), 1),
        ),
        _per_budget(
            results,
            "Tokens attended",
            "Exactly, by a KV head in the last forced step, mean over layers and samples.",
            lambda records: f"{mean_interval([r.attended for r in records]).value:.1f}",
        ),
    ]
    if any(record.mass for record in results.of(None)):
        tables += [
            _per_budget(
                results,
                "Attention mass attended exactly",
                "Share of full attention on the tokens that were selected, mean over layers.",
                lambda records: f"{_layer_mean([r.mass for r in records]):.3f}",
            ),
            _per_budget(
                results,
                "Error of the attention output",
                "|output - full| / |full| on the method's own queries, mean over layers.",
                lambda records: f"{_layer_mean([r.error for r in records]):.3f}",
            ),
        ]
    if results.average(None) is not None:
        tables += [_scores(results, budget) for budget in results.budgets]
    return [*tables, _quoted(results)]


def _per_budget(
    results: Results, title: str, note: str, show: Callable[[list[Record]], str]
) -> Table:
    rows = []
    for method in results.methods:
        cells = [(method, budget) for budget in results.budgets]
        rows.append(
            [method, *(show(results.of(cell)) if cell in results.cells else "-" for cell in cells)]
        )
    return Table(title, note, ["method", *map(str, results.budgets)], rows)


def _ratios(results: Results) -> Table:
    def against(method: str, budget: int) -> str:
        cell, ours = (method, budget), (_OURS, budget)
        if cell not in results.cells or ours not in results.cells:
            return "-"
        found = ratio_interval([r.kl for r in results.of(cell)], [r.kl for r in results.of(ours)])
        return "-" if found is None else _shown(found)

    others = [method for method in results.methods if method != _OURS]
    return Table(
        "Distance over that of icecache",
        "Mean KL of the method over that of icecache at the same budget, samples resampled in "
        "pairs. Above 1 is worse than icecache.",
        ["method", *map(str, results.budgets)],
        [[m, *(against(m, budget) for budget in results.budgets)] for m in others],
    )


def _scores(results: Results, budget: int) -> Table:
    methods = [method for method in results.methods if (method, budget) in results.cells]
    rows = []
    for task in results.tasks:
        full = results.scores(None, task)
        if not full:
            continue
        mean = mean_interval(full).value
        shown = [
            _with_ratio(mean_interval(results.scores((method, budget), task)), mean)
            for method in methods
        ]
        rows.append([task, str(len(full)), f"{mean:.1f}", *shown])
    whole = results.average(None)
    assert whole is not None
    averages = [results.average((method, budget)) for method in methods]
    last = [_with_ratio(found, whole.value) for found in averages if found is not None]
    rows.append(["mean of tasks", str(results.num_samples), f"{whole.value:.1f}", *last])
    return Table(
        f"Scores at {budget} tokens",
        "Per cent by the tasks' own metrics with 95 % intervals; behind them the ratio to the full "
        "cache's.",
        ["task", "samples", "full", *methods],
        rows,
    )


def _quoted(results: Results) -> Table:
    rows = []
    english = task_groups()["longbench_en"]
    whole = results.average(None, english)
    for entry in QUOTED:
        ours = "-"
        if (entry.method, entry.budget) in results.cells:
            found = results.average((entry.method, entry.budget), english)
            if found is not None and whole is not None and whole.value:
                ours = f"{found.value / whole.value:.3f}"
        quoted = f"{entry.score:.1f}", f"{entry.score / QUOTED_FULL:.3f}"
        rows.append([entry.method, str(entry.budget), *quoted, ours])
    return Table(
        "Beside the paper's figures",
        f"Quoted: {QUOTED_SOURCE}; its full cache has {QUOTED_FULL}. The last column is this run's "
        "ratio to its own full cache, on its own model and those of LongBench's English sets that "
        "it has; - where it has none.",
        ["method", "budget", "quoted score", "quoted ratio", "this run's ratio"],
        rows,
    )


def _shown(found: Interval, digits: int | None = None) -> str:
    def one(value: float) -> str:
        return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"

    if found.low is None or found.high is None:
        return one(found.value)
    return f"{one(found.value)} ({one(found.low)}-{one(found.high)})"


def _with_ratio(found: Interval, full: float) -> str:
    ratio = f"{found.value / full:.2f}" if full else "-"
    return f"{_shown(found, 1)} {ratio}"


def _layer_mean(layers: list[tuple[float, ...]]) -> float:
    values = [value for sample in layers for value in sample]
    return sum(values) / len(values)
