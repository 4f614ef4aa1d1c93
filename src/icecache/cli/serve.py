"""``icecache serve``: an OpenAI-compatible server on this machine."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from icecache.cli.inputs import parse_bytes
from icecache.cli.options import with_config_options
from icecache.config import IceCacheConfig
from icecache.errors import BackendUnavailable, InputError
from icecache.integrations.embedded import EMBEDDED, load
from icecache.ops.threads import work_alone

__all__ = ["serve"]

_NEEDED = ("fastapi", "uvicorn", "pydantic", "prometheus_client")


@with_config_options
def serve(
    config: IceCacheConfig,
    *,
    model: Annotated[
        str, typer.Option(help="A folder with a causal language model, or 'embedded'.")
    ] = EMBEDDED,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default its folder's name.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ICECACHE_API_KEY", help="Key that clients must send."),
    ] = None,
    max_host_memory: Annotated[
        str | None,
        typer.Option(help="Memory for all caches, such as 48GiB; by default nine tenths of it."),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests served at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 256,
    prefill_chunk: Annotated[
        int, typer.Option(min=32, help="Prompt tokens read in a step, beside running answers.")
    ] = 512,
    max_answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer a client may ask for.")
    ] = None,
    conversations: Annotated[
        Path | None, typer.Option(help="Folder where conversations survive a restart.")
    ] = None,
    max_disk: Annotated[
        str | None, typer.Option(help="Size that the folder may take, such as 100GiB.")
    ] = None,
    forget_seconds: Annotated[
        float, typer.Option(min=0, help="Idle conversations leave the memory after so long.")
    ] = 600.0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    native: Annotated[
        bool | None,
        typer.Option(
            "--native/--no-native",
            help="Answers by one compiled call a step; by default where the model can.",
        ),
    ] = None,
) -> None:
    """Serve a model to any OpenAI client, and a chat page at /."""
    _check_installed()
    from icecache.engine import EngineSettings
    from icecache.serve.app import ServeSettings
    from icecache.serve.server import run

    if api_key is not None and not api_key.strip():
        raise InputError("the API key is empty")
    engine = EngineSettings(
        max_running=max_running,
        max_waiting=max_waiting,
        prefill_chunk=prefill_chunk,
        max_host_memory=parse_bytes("--max-host-memory", max_host_memory),
        conversations=conversations,
        max_disk=parse_bytes("--max-disk", max_disk),
        forget_seconds=forget_seconds,
        native=native,
    )
    # a team of this thread would stay, and the one of the thread that serves would sleep
    work_alone()
    loaded, tokenizer = load(model, dtype)
    served = name or (EMBEDDED if model == EMBEDDED else Path(model).resolve().name)
    app = ServeSettings(model_name=served, api_key=api_key)
    console = Console(stderr=True)
    run(loaded, tokenizer, engine, config, app, (host, port), max_answer_tokens, console.print)


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            f"the server needs {', '.join(missing)}: pip install 'icecache[demo,serve]'"
        )
