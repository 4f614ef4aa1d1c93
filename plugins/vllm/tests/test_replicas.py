"""Two data-parallel replicas behind vLLM's own API server."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Answers, run_script, selected
from serving import ask, flags, free_port, metric, metrics_after, running, wait_until_healthy

LENGTHS = (500, 60, 310, 420, 20, 280, 360, 150)
NEW_TOKENS = 12


@pytest.fixture
def server(engine: dict[str, Any], tmp_path: Path) -> Iterator[str]:
    port = free_port()
    words = flags(
        model=engine["model"],
        served_model_name="model",
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=8192,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 28,
        data_parallel_size=2,
        api_server_count=1,
        enforce_eager=True,
        host="127.0.0.1",
        port=port,
        kv_transfer_config=json.dumps(selected(budget=128)["kv_transfer_config"]),
    )
    command = ["-m", "vllm.entrypoints.openai.api_server", *words]
    with running(command, tmp_path / "server.txt") as server:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, server)
        yield url


@pytest.fixture
def expected(text: list[int], tmp_path: Path) -> Answers:
    """The answers of our transformers path."""
    prompts = [text[500 * i : 500 * i + length] for i, length in enumerate(LENGTHS)]
    task: Answers = {"prompts": prompts, "max_tokens": [NEW_TOKENS] * len(prompts)}
    task["cache"] = {"budget": 128}
    run = run_script(os.environ["ICECACHE_PYTHON"], "transformers_answers.py", task, tmp_path, 900)
    return {"prompts": prompts, "tokens": [answer["tokens"] for answer in run["answers"]]}


def test_replicas_answer_what_one_process_does(expected: Answers, server: str) -> None:
    def answer(number: int) -> list[int]:
        return ask(server, expected["prompts"][number % len(LENGTHS)], NEW_TOKENS)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(answer, range(64)))
    assert answers == [expected["tokens"][number % len(LENGTHS)] for number in range(64)]

    page = metrics_after(server, 64)
    long = sum(length > 128 - NEW_TOKENS for length in LENGTHS)
    requests = metric(page, "request_sparse_steps_count")
    assert sum(requests.values()) == 64
    assert set(requests) == {"0", "1"} and min(requests.values()) > 8
    per_request = NEW_TOKENS - 1
    assert sum(metric(page, "request_sparse_steps_sum").values()) == 8 * long * per_request
    assert sum(metric(page, "sparse_steps_total").values()) == 8 * long * per_request
    assert sum(metric(page, "dense_steps_total").values()) == 8 * (long + 12 * (8 - long))
    assert set(metric(page, "host_bytes").values()) == {0.0}
