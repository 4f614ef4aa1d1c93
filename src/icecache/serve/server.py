"""A server from a loaded model to its end."""

import dataclasses
import socket
from collections.abc import Callable

import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icecache.config import IceCacheConfig
from icecache.engine import EngineSettings
from icecache.errors import InputError
from icecache.serve.app import ServeSettings, make_app
from icecache.serve.metrics import Metrics
from icecache.serve.worker import Worker

__all__ = ["run"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_GRACE_SECONDS = 5


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: EngineSettings,
    cache: IceCacheConfig,
    settings: ServeSettings,
    address: tuple[str, int],
    most_tokens: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve until SIGINT or SIGTERM; conversations are written to disk before it returns.

    Parameters
    ----------
    model, tokenizer : as loaded
    engine : EngineSettings
    cache : IceCacheConfig
    settings : ServeSettings
        Its `allowed_hosts` hold for loopback addresses only.
    address : tuple of str and int
        Host and port; port 0 takes a free one.
    most_tokens : int, optional
        Tokens that an answer may have.
    say : callable, optional
        Hears where the server listens.

    Raises
    ------
    InputError
        If it cannot listen there.
    """
    host, _ = address
    listener = _listen(address)
    if host not in _LOOPBACK:
        settings = dataclasses.replace(settings, allowed_hosts=())
        if settings.api_key is None:
            say("other machines can use this server, and there is no --api-key")
    metrics = Metrics()
    worker = Worker(model, tokenizer, engine, cache, metrics, most_tokens)
    try:
        app = make_app(worker, tokenizer, metrics, settings)
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            h11_max_incomplete_event_size=64 << 10,
        )
        port = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        say(f"{settings.model_name}: http://{shown}:{port}")
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        worker.close()
        listener.close()


def _listen(address: tuple[str, int]) -> socket.socket:
    host, port = address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
