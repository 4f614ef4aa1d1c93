"""Servers on a free port of this machine, over tiny models."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from icecache.integrations.embedded import load
from tests.serve.running import Running, running


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Running]:
    """A server without a key that serves small answers of a random model."""
    model, tokenizer = load(tiny_model, "float32")
    with running(model, tokenizer, most_tokens=400) as started:
        yield started


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    """The official client of that server; it does not try again."""
    return server.client()
