"""A whole server killed while it writes a conversation: the others are there when it comes back."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletion

from icecache.cache.snapshot import is_snapshot
from icecache.integrations.embedded import load
from tests.serve.running import BUDGET, running, until

_SERVER = """
import os, signal, sys
from pathlib import Path
from icecache import IceCacheConfig
from icecache.cache import snapshot
from icecache.engine import EngineSettings
from icecache.integrations.embedded import load
from icecache.serve.app import ServeSettings
from icecache.serve.server import run

model, folder, order = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[2] + ".die")
save = snapshot.save_file
def half(tensors, path):
    save(tensors, path)
    if order.exists():
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
snapshot.save_file = half
engine = EngineSettings(prefill_chunk=64, conversations=folder, idle_seconds=0.0)
settings = ServeSettings(model_name="tiny")
say = lambda line: print(line, flush=True)
address = ("127.0.0.1", 0)
cache = IceCacheConfig(budget=int(sys.argv[3]))
run(*load(model, "float32"), engine, cache, settings, address, say=say)
"""


@contextmanager
def _served(model: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", _SERVER, str(model), str(folder), str(BUDGET)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield process, found[0] + "/v1"
    finally:
        process.terminate()
        process.wait(60)


def _ask(url: str, *turns: str) -> ChatCompletion:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return client.chat.completions.create(
        model="tiny",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=8,
    )


def _cached(answer: ChatCompletion) -> int:
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def _has_answer(folder: Path) -> bool:
    try:
        manifests = [json.loads(path.read_text()) for path in folder.rglob("manifest.json")]
    except FileNotFoundError:
        # a prompt's gives way to its answer's while it is looked at
        return False
    return any(manifest["about"]["is_ended"] for manifest in manifests)


def test_killed_while_it_writes_a_conversation_it_comes_back_with_the_others(
    tiny_model: Path, tmp_path: Path
) -> None:
    first, second = "The boat is red. " * 30, "The lamp is green. " * 30
    folder, order = tmp_path / "kept", tmp_path / "kept.die"
    with _served(tiny_model, folder) as (process, url):
        answer = _ask(url, first).choices[0].message.content or ""
        until(lambda: _has_answer(folder))
        order.touch()
        with pytest.raises(openai.APIConnectionError):
            _ask(url, second)
        assert process.wait(60) == -signal.SIGKILL
    order.unlink()
    assert not all(is_snapshot(path) for path in folder.glob("*/*") if path.name != "lock")
    with _served(tiny_model, folder) as (_, url):
        assert all(is_snapshot(path) for path in folder.glob("*/*") if path.name != "lock")
        turn = _ask(url, first, answer, "And the sail?")
        assert _cached(turn) > 100
        again = _ask(url, second)
        assert _cached(again) == 0
    with running(*load(tiny_model, "float32")) as server:
        for found, turns in ((turn, (first, answer, "And the sail?")), (again, (second,))):
            fresh = _ask(server.url + "/v1", *turns)
            assert found.choices[0].message.content == fresh.choices[0].message.content
