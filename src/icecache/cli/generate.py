"""``icecache generate``: one question about one text file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from icecache.cli.compare import Comparer
from icecache.cli.display import show_comparison
from icecache.cli.inputs import read_prompt
from icecache.cli.options import with_config_options
from icecache.config import IceCacheConfig
from icecache.integrations.embedded import EMBEDDED, load

__all__ = ["generate"]


@with_config_options
def generate(
    config: IceCacheConfig,
    *,
    prompt_file: Annotated[Path, typer.Option(help="The document: a UTF-8 text file.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    model: Annotated[
        str, typer.Option(help="A folder with a causal language model, or 'embedded'.")
    ] = EMBEDDED,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the full cache too and compare.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")
    ] = False,
) -> None:
    """Answer a question about a document, attending a fixed number of tokens a step."""
    document = read_prompt(prompt_file)
    loaded, tokenizer = load(model, dtype)
    console = Console(stderr=json)
    result = Comparer(loaded, tokenizer, config, console).ask(
        document, question, max_new_tokens=max_new_tokens, with_full=compare
    )
    if json:
        typer.echo(result.to_json())
    else:
        show_comparison(console, result)
