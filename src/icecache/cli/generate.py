"""``icecache generate``: one question about one text file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from icecache.cli.compare import Comparer
from icecache.cli.display import show_comparison
from icecache.cli.inputs import read_prompt
from icecache.cli.options import with_config_options
from icecache.cli.resume import load_conversation
from icecache.config import IceCacheConfig
from icecache.errors import InputError
from icecache.integrations.embedded import EMBEDDED
from icecache.integrations.embedded import load as load_model

__all__ = ["generate"]


@with_config_options
def generate(
    config: IceCacheConfig,
    *,
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    prompt_file: Annotated[
        Path | None, typer.Option(help="The document: a UTF-8 text file.")
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(help="Go on with a saved conversation instead of reading a document."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Save the conversation to this folder after the answer.")
    ] = None,
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
    """Answer a question about a document, or a further one, within a budget of tokens a step."""
    _check_source(prompt_file, load, compare)
    document = None if prompt_file is None else read_prompt(prompt_file)
    loaded, tokenizer = load_model(model, dtype)
    console = Console(stderr=json)
    comparer = Comparer(loaded, tokenizer, config, console, save_to=save)
    if document is not None:
        result = comparer.ask(document, question, max_new_tokens=max_new_tokens, with_full=compare)
    else:
        assert load is not None
        cache = load_conversation(load, loaded, config)
        result = comparer.go_on(cache, question, max_new_tokens=max_new_tokens)
    if json:
        typer.echo(result.to_json())
    else:
        show_comparison(console, result)


def _check_source(prompt_file: Path | None, load: Path | None, compare: bool) -> None:
    if (prompt_file is None) == (load is None):
        raise InputError("give either --prompt-file or --load")
    if load is not None and compare:
        raise InputError("--compare needs the whole prompt: give --prompt-file instead of --load")
