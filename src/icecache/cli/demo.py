"""``icecache demo``: one fact in an overwinterers' log, found with a budget of 256 tokens."""

from importlib.resources import files

import typer
from rich.console import Console

from icecache.cli.compare import Comparer
from icecache.cli.display import show_comparison
from icecache.cli.options import with_config_options
from icecache.config import IceCacheConfig
from icecache.integrations.embedded import EMBEDDED, load

__all__ = ["demo"]

_DOCUMENT = "data/expedition.txt"
_QUESTION = "What is the password of the emergency radio?"
_ANSWER = "copper lantern"
_MAX_NEW_TOKENS = 32


@with_config_options
def demo(config: IceCacheConfig) -> None:
    """Ask the embedded model for a fact hidden in a long log, with IceCache and the full cache."""
    console = Console()
    document = files("icecache.cli").joinpath(_DOCUMENT).read_text(encoding="utf-8")
    model, tokenizer = load(EMBEDDED)
    console.print(f"An Arctic station's log of {len(document.split()):,} words, and one question:")
    console.print(f"[bold]{_QUESTION}[/bold]")
    result = Comparer(model, tokenizer, config, console).ask(
        document, _QUESTION, max_new_tokens=_MAX_NEW_TOKENS, with_full=True
    )
    show_comparison(console, result)
    answer = result.rows[0].answer
    if _ANSWER not in answer.lower():
        console.print(f"[bold red]Wrong:[/bold red] the log says {_ANSWER!r}.")
        raise typer.Exit(1)
    console.print(f"[bold green]Right:[/bold green] the log says {_ANSWER!r}.")
