"""Two data-parallel replicas behind vLLM's own API server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, Answers, run_script, selected

LENGTHS = (500, 60, 310, 420, 20, 280, 360, 150)
NEW_TOKENS = 12


def get(url: str, body: dict[str, Any] | None = None, timeout: float = 600) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text: str = answer.read().decode()
    return text


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            get(f"{url}/health", timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return
    pytest.fail(f"the server did not come up:\n{log.read_text(errors='replace')[-6000:]}")


@pytest.fixture
def server(engine: dict[str, Any], tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.txt"
    flags = {
        "model": engine["model"],
        "served-model-name": "model",
        "dtype": "float32",
        "max-model-len": 1024,
        "max-num-batched-tokens": 8192,
        "max-num-seqs": 8,
        "kv-cache-memory-bytes": 1 << 28,
        "data-parallel-size": 2,
        "api-server-count": 1,
        "host": "127.0.0.1",
        "port": port,
        "kv-transfer-config": json.dumps(selected(budget=128)["kv_transfer_config"]),
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *words],
            env={**os.environ, **ENVIRONMENT},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def expected(text: list[int], tmp_path: Path) -> Answers:
    """The answers of our transformers path."""
    prompts = [text[500 * i : 500 * i + length] for i, length in enumerate(LENGTHS)]
    task: Answers = {"prompts": prompts, "max_tokens": [NEW_TOKENS] * len(prompts)}
    task["cache"] = {"budget": 128}
    run = run_script(os.environ["ICECACHE_PYTHON"], "transformers_answers.py", task, tmp_path, 900)
    return {"prompts": prompts, "tokens": [answer["tokens"] for answer in run["answers"]]}


def metric(page: str, name: str) -> dict[str, float]:
    """Return a metric's value by engine."""
    lines = re.findall(rf'^icecache:{name}{{engine="(\d)".*}} (\S+)$', page, re.MULTILINE)
    return {engine: float(value) for engine, value in lines}


def test_replicas_answer_what_one_process_does(expected: Answers, server: str) -> None:
    def ask(number: int) -> list[int]:
        body = {"model": "model", "prompt": expected["prompts"][number % len(LENGTHS)]}
        body |= {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        answer = json.loads(get(f"{server}/v1/completions", {**body, "return_token_ids": True}))
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(64)))
    assert answers == [expected["tokens"][number % len(LENGTHS)] for number in range(64)]

    page = get(f"{server}/metrics")
    long = sum(length > 128 - NEW_TOKENS for length in LENGTHS)
    requests = metric(page, "request_sparse_steps_count")
    assert sum(requests.values()) == 64
    assert set(requests) == {"0", "1"} and min(requests.values()) > 8
    per_request = NEW_TOKENS - 1
    assert sum(metric(page, "request_sparse_steps_sum").values()) == 8 * long * per_request
    assert sum(metric(page, "sparse_steps_total").values()) == 8 * long * per_request
    assert sum(metric(page, "dense_steps_total").values()) == 8 * (long + 12 * (8 - long))
    assert set(metric(page, "host_bytes").values()) == {0.0}
