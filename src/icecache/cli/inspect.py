"""``icecache inspect``: a picture of what selection did for one prompt."""

import importlib.util
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from icecache.cli.capture import record
from icecache.cli.captured import Captured, measure
from icecache.cli.display import Display
from icecache.cli.inputs import read_prompt
from icecache.cli.options import with_config_options
from icecache.cli.session import encode
from icecache.config import IceCacheConfig
from icecache.errors import BackendUnavailable, InputError
from icecache.integrations.embedded import EMBEDDED, load

__all__ = ["inspect"]


@with_config_options
def inspect(
    config: IceCacheConfig,
    *,
    prompt_file: Annotated[Path, typer.Option(help="The document: a UTF-8 text file.")],
    out: Annotated[Path, typer.Option(help="The picture to write, PNG.")],
    question: Annotated[str, typer.Option(help="What to ask about the document.")] = (
        "What is this text about?"
    ),
    model: Annotated[
        str, typer.Option(help="A folder with a causal language model, or 'embedded'.")
    ] = EMBEDDED,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to average over.")] = 8,
    layer: Annotated[
        int | None, typer.Option(help="Layer of the page map; by default the one in the middle.")
    ] = None,
    head: Annotated[int, typer.Option(min=0, help="KV head of the page map.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
) -> None:
    """Draw the attention mass that a budget captures, and which positions share a page."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendUnavailable("inspect needs matplotlib: pip install 'icecache[demo]'")
    from icecache.cli.figure import draw

    document = read_prompt(prompt_file)
    if not out.parent.is_dir():
        raise InputError(f"the picture's folder does not exist: {out.parent}")
    loaded, tokenizer = load(model, dtype)
    console = Console()
    ids = encode(loaded, tokenizer, document, question, steps)
    with Display(console).run("full cache", ids.shape[1], 0) as shown:
        recordings = record(loaded, ids, steps, shown.advance)
    with torch.inference_mode():
        found = [
            measure(recording, config)
            for recording in track(recordings, "selection, by layer", console=console)
        ]
    chosen = _pick(found, layer, head)
    title = f"{prompt_file.name}: {ids.shape[1]:,} tokens, budget {config.budget}"
    draw(found, chosen, head, title, out)
    console.print(_summary(found))
    console.print(f"picture: {out}")


def _pick(found: list[Captured], layer: int | None, head: int) -> Captured:
    by_layer = {captured.layer: captured for captured in found}
    wanted = found[len(found) // 2].layer if layer is None else layer
    if wanted not in by_layer:
        raise InputError(f"layer must be one of {', '.join(map(str, by_layer))}, got {layer}")
    heads = len(by_layer[wanted].maps)
    if head >= heads:
        raise InputError(f"head must be from 0 to {heads - 1}, got {head}")
    return by_layer[wanted]


def _summary(found: list[Captured]) -> Table:
    table = Table("attention mass captured", "mean", "worst layer and head")
    for name, field in (
        ("IceCache", "icecache"),
        ("positional pages", "positional"),
        ("best tokens", "best_tokens"),
    ):
        mass = torch.stack([getattr(captured, field) for captured in found])
        table.add_row(name, f"{float(mass.mean()):.4f}", f"{float(mass.min()):.4f}")
    return table
