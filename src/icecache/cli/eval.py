"""``icecache eval``: methods beside the full cache on tasks, and the report of that."""

import importlib.util
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from icecache.cli.eval_display import RunDisplay
from icecache.cli.eval_options import SpreadCommand, with_settings_options
from icecache.errors import BackendUnavailable
from icecache.evaluation.settings import RunSettings
from icecache.integrations.embedded import load

__all__ = ["eval_app"]

_NEEDED = {
    "rouge_score": "rouge-score",
    "rapidfuzz": "rapidfuzz",
    "jieba": "jieba",
    "wonderwords": "wonderwords",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
}
eval_app = typer.Typer(
    help="Measure cache methods beside the full cache, on any model and task.",
    no_args_is_help=True,
)


def run(
    settings: RunSettings,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the results; an earlier run goes on.")],
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    mix: Annotated[
        bool, typer.Option("--mix", help="Go on although the results are of another version.")
    ] = False,
) -> None:
    """Run every method at every budget on every sample, from one prefill a sample."""
    _check_installed()
    from icecache.evaluation.run import Runner, check_names

    check_names(settings)
    if threads is not None:
        torch.set_num_threads(threads)
    runner = Runner(settings, *load(settings.model, settings.dtype))
    with RunDisplay(Console(stderr=True)) as display:
        runner.run(out, display, mix=mix)
    typer.echo(f"{out}: complete; icecache eval report {out}")


eval_app.command(cls=SpreadCommand)(with_settings_options(RunSettings, run))


@eval_app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.", metavar="DIR")],
) -> None:
    """Write report.md and report.html, a page that needs nothing beside it."""
    _check_installed()
    from icecache.evaluation.results.report import write_report

    for path in write_report(folder):
        typer.echo(path)


def _check_installed() -> None:
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise BackendUnavailable(
            f"icecache eval needs {', '.join(missing)}: pip install 'icecache[eval]'"
        )
