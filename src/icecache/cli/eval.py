"""``icecache eval``: methods beside the full cache on tasks, and the report of that."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperCommand

from icecache.cli.eval_display import RunDisplay
from icecache.errors import BackendUnavailable
from icecache.integrations.embedded import EMBEDDED, load

__all__ = ["eval_app"]

_NEEDED = {
    "rouge_score": "rouge-score",
    "rapidfuzz": "rapidfuzz",
    "jieba": "jieba",
    "wonderwords": "wonderwords",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
}
_LISTS = ("--tasks", "--methods", "--budgets", "--lengths")

eval_app = typer.Typer(
    help="Measure cache methods beside the full cache, on any model and task.",
    no_args_is_help=True,
)


class _SpreadCommand(TyperCommand):
    """Takes ``--budgets 64 128 256`` for ``--budgets 64 --budgets 128 --budgets 256``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(arguments: list[str]) -> list[str]:
    """Repeat the flag of a list before each of its values."""
    found: list[str] = []
    flag = None
    for argument in arguments:
        if argument.startswith("-"):
            flag = argument if argument in _LISTS else None
            if flag is None:
                found.append(argument)
        elif flag is None:
            found.append(argument)
        else:
            found += [flag, argument]
    return found


@eval_app.command(cls=_SpreadCommand)
def run(
    *,
    tasks: Annotated[list[str], typer.Option(help="Tasks and groups, see docs/evaluation.md.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; an earlier run goes on.")],
    model: Annotated[
        str, typer.Option(help="A folder with a causal language model, or 'embedded'.")
    ] = EMBEDDED,
    methods: Annotated[
        list[str], typer.Option(help="Methods, as name or name:key=value,...; or all.")
    ] = ["all"],  # noqa: B006 - typer reads it, nothing writes to it
    budgets: Annotated[
        list[int], typer.Option(help="Tokens a KV head attends exactly in a step.")
    ] = [64, 128, 256],  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="Samples of each task.")] = None,
    lengths: Annotated[
        list[int], typer.Option(help="Tokens of generated prompts, answer included.")
    ] = [4096],  # noqa: B006
    data: Annotated[
        Path | None, typer.Option(help="Folder of data sets; by default the Hugging Face hub.")
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(help="Text that hides needles; by default noise.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of a prompt; by default the model's context.")
    ] = None,
    overlong: Annotated[
        Literal["middle", "skip"], typer.Option(help="Cut longer prompts, or pass over them.")
    ] = "middle",
    steps: Annotated[int, typer.Option(help="Teacher-forced steps.")] = 32,
    probed_steps: Annotated[int, typer.Option(help="Steps measured layer by layer.")] = 4,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, if shorter than the task's.")
    ] = None,
    answers: Annotated[
        bool, typer.Option(help="Let every method answer, to be scored by the task's metric.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of generated prompts.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
) -> None:
    """Run every method at every budget on every sample, from one prefill a sample."""
    _check_installed()
    from icecache.evaluation.run import Runner
    from icecache.evaluation.settings import RunSettings

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    settings = RunSettings(
        model=model,
        tasks=tuple(tasks),
        methods=tuple(methods),
        budgets=tuple(budgets),
        limit=limit,
        lengths=tuple(lengths),
        data=data,
        haystack=haystack,
        max_length=max_length,
        overlong=overlong,
        steps=steps,
        probed_steps=probed_steps,
        max_new_tokens=max_new_tokens,
        answers=answers,
        dtype=dtype,
        seed=seed,
    )
    runner = Runner(settings, *load(model, dtype))
    with RunDisplay(Console(stderr=True)) as display:
        runner.run(out, display)
    typer.echo(f"{out}: complete; icecache eval report {out}")


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
