"""The report of a run: Markdown, and one HTML page that needs nothing beside it."""

import inspect
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from icecache.errors import InputError
from icecache.evaluation.methods.registry import METHODS
from icecache.evaluation.results.bootstrap import FEWEST
from icecache.evaluation.results.plots import draw_plots
from icecache.evaluation.results.store import STAMPS, load_results, load_sessions, write_atomically
from icecache.evaluation.results.tables import Results, Table, summary_tables

__all__ = ["write_report"]

_FEW = "a task with one sample has none, nor has the mean of tasks with it"


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.html`` into the folder of a run; return both paths.

    Raises
    ------
    InputError
        If the folder has no results, or none that can be compared yet.
    """
    results = Results(load_results(folder))
    if not results.num_samples or not results.cells:
        raise InputError(
            f"{folder} has no sample yet that every method has answered; run `icecache eval run` on"
        )
    sessions = load_sessions(folder)
    tables = summary_tables(results)
    page = _template().render(
        tables=tables,
        plots=draw_plots(results),
        facts=_facts(results, sessions),
        methods=_about(results),
    )
    paths = folder / "report.md", folder / "report.html"
    write_atomically(paths[0], _markdown(results, sessions, tables))
    write_atomically(paths[1], page)
    return paths


def _markdown(results: Results, sessions: list[dict[str, Any]], tables: list[Table]) -> str:
    parts = ["# Evaluation of cache methods", ""]
    parts += [f"- {name}: {value}" for name, value in _facts(results, sessions)]
    for table in tables:
        parts += ["", f"## {table.title}", "", table.note, ""]
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts += ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines]
    parts += ["", "## Methods", ""]
    for name, text in _about(results):
        parts += [f"### {name}", "", text, ""]
    return "\n".join(parts).rstrip() + "\n"


def _facts(results: Results, sessions: list[dict[str, Any]]) -> list[tuple[str, str]]:
    latest = sessions[-1]
    settings = latest["settings"]
    facts = [
        ("model", f"{settings['model']}, {settings['dtype']}"),
        ("samples", f"{results.num_samples} of {len(results.tasks)} tasks"),
        ("forced steps", str(settings["steps"])),
        ("prompts", f"{latest['prompts']}; {_within(settings)}"),
        ("seed", str(settings["seed"])),
    ]
    fewest = min(len(results.of(None, task)) for task in results.tasks)
    if fewest < FEWEST:
        facts.append(("intervals", f"those of fewer than {FEWEST} samples are too narrow; {_FEW}"))
    if results.num_partial:
        facts.append(("left out", f"{results.num_partial} samples that some method lacks"))
    for number, session in enumerate(sessions, 1):
        stamp = ", ".join(f"{name} {session[name]}" for name in STAMPS[:-1])
        facts.append((f"session {number}", stamp))
    return facts


def _within(settings: dict[str, Any]) -> str:
    longest = settings["max_length"]
    within = "the model's context" if longest is None else f"{longest:,} tokens"
    kept = "cut in the middle" if settings["overlong"] == "middle" else "passed over"
    return f"within {within}, longer ones {kept}"


def _about(results: Results) -> list[tuple[str, str]]:
    found = []
    for label in results.methods:
        method = METHODS.get(label.partition(":")[0])
        if method is not None:
            text = inspect.getdoc(method) or ""
            found.append((label, text.split("\n\nParameters\n", 1)[0]))
    return found


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _template() -> jinja2.Template:
    text = files("icecache.evaluation").joinpath("data/report.html").read_text("utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
