"""A server in a thread of the test's process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icecache import IceCacheConfig
from icecache.engine import EngineSettings, EngineStats
from icecache.serve.app import ServeSettings, make_app
from icecache.serve.metrics import Metrics
from icecache.serve.worker import Worker

__all__ = ["BUDGET", "Running", "running", "until"]

BUDGET = 96


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    port: int
    worker: Worker
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        """Return the official client."""
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)

    def stats(self) -> EngineStats:
        """Return the engine's figures, from its own thread."""
        found: list[EngineStats] = []
        done = threading.Event()

        def look() -> None:
            found.append(self.worker._engine.stats())
            done.set()

        self.worker._command(look)
        assert done.wait(60)
        return found[0]


@contextmanager
def running(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str | None = None,
    most_tokens: int | None = None,
    cache: IceCacheConfig | None = None,
    **engine: Any,
) -> Iterator[Running]:
    """Serve a model until the block is left."""
    metrics = Metrics()
    settings = EngineSettings(**{"prefill_chunk": 64, **engine})
    cache = IceCacheConfig(budget=BUDGET) if cache is None else cache
    worker = Worker(model, tokenizer, settings, cache, metrics, most_tokens)
    app = make_app(worker, tokenizer, metrics, ServeSettings(model_name="tiny", api_key=key))
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(listener.getsockname()[1], worker, model, tokenizer)
    finally:
        server.should_exit = True
        thread.join(60)
        worker.close()
        listener.close()


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds; a minute at most."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.01)
