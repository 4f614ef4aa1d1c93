"""The typer application: collects the commands."""

from typing import Annotated

import typer

from icecache import __version__
from icecache.cli.demo import demo
from icecache.cli.eval import eval_app
from icecache.cli.generate import generate
from icecache.cli.inspect import inspect
from icecache.cli.serve import serve

__all__ = ["app"]

app = typer.Typer(
    name="icecache",
    help="Long-context LLMs with the KV cache in host memory and a fixed attention budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"icecache {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Long-context LLMs with the KV cache in host memory and a fixed attention budget."""


app.command()(demo)
app.command()(generate)
app.command()(inspect)
app.add_typer(eval_app, name="eval")
app.command()(serve)
