"""Two nodes, a tensor-parallel rank on each: processes that meet at addresses alone."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

import pytest
from conftest import Answers, run_script, save_tiny, selected
from serving import (
    Server,
    ask,
    flags,
    free_port,
    get,
    metric,
    metrics_after,
    running,
    wait_until_healthy,
)

SERVE = str(Path(__file__).parents[1] / "examples" / "serve.py")
LENGTHS = (700, 90, 410, 30, 560, 257)
NEW_TOKENS = 16
PROMPTS = [[3 + (k * i * i + 11 * i) % 500 for i in range(n)] for k, n in enumerate(LENGTHS, 1)]
# addresses that only this machine reaches
LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


class Nodes(NamedTuple):
    """The first node, which answers, and the second."""

    url: str
    first: Server
    second: Server


@pytest.fixture(scope="module")
def tiny(engine: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Engine arguments of a model whose heads two ranks can share, and whose tokens differ."""
    model = save_tiny("Llama", tmp_path_factory.mktemp("tiny"), initializer_range=0.2)
    return {
        **engine,
        "model": model,
        "max_model_len": 1024,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 1 << 26,
    }


@contextmanager
def two_nodes(tiny: dict[str, Any], folder: Path, **more: Any) -> Iterator[Nodes]:
    port, meeting = free_port(), free_port()
    words = [SERVE, tiny["model"]]
    words += flags(**{name: value for name, value in tiny.items() if name != "model"})
    words += flags(served_model_name="model", tensor_parallel_size=2, nnodes=2, **more)
    words += flags(master_addr="127.0.0.1", master_port=meeting)
    second = [*words, *flags(node_rank=1, headless=True)]
    first = [*words, *flags(node_rank=0, host="127.0.0.1", port=port)]
    with (
        running(second, folder / "second.txt", **LOOPBACK) as second_node,
        running(first, folder / "first.txt", **LOOPBACK) as first_node,
    ):
        nodes = Nodes(f"http://127.0.0.1:{port}", first_node, second_node)
        wait_until_healthy(nodes.url, first_node, second_node)
        yield nodes


def plugin(budget: int, **settings: Any) -> str:
    """Return the value of ``--kv-transfer-config``."""
    return json.dumps(selected(budget=budget, **settings)["kv_transfer_config"])


def of_one_node(arguments: dict[str, Any], folder: Path) -> list[list[int]]:
    task: Answers = {"engine": arguments, "prompts": PROMPTS, "rounds": [{}]}
    task["max_tokens"] = [NEW_TOKENS] * len(PROMPTS)
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ran = run_script(sys.executable, "run_engine.py", task, folder, 900, **alone)
    return [answer["tokens"] for answer in ran["rounds"][0]["answers"]]


def of_two_nodes(nodes: Nodes) -> list[list[int]]:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: ask(nodes.url, prompt, NEW_TOKENS), PROMPTS))


def work_of(node: Server) -> list[tuple[int, int, int]]:
    """Return what a node's log says of each request: sparse and dense steps, host bytes freed."""
    line = r"IceCache: request \S+ ended with \d+ tokens, (\d+) sparse and (\d+) dense steps; (\d+)"
    found = re.findall(line, node.said)
    return sorted((int(sparse), int(dense), int(freed)) for sparse, dense, freed in found)


def test_two_nodes_give_the_tokens_of_stock(tiny: dict[str, Any], tmp_path: Path) -> None:
    """With room for all in the budget: prompts in chunks of 256 tokens beside decodes."""
    stock = of_one_node(tiny, tmp_path)
    assert len({tuple(tokens) for tokens in stock}) == len(PROMPTS)
    with two_nodes(tiny, tmp_path, kv_transfer_config=plugin(1024)) as nodes:
        assert of_two_nodes(nodes) == stock
        assert set(metric(metrics_after(nodes.url, len(PROMPTS)), "host_bytes").values()) == {0.0}
    for node in (nodes.first, nodes.second):
        assert [(sparse, freed) for sparse, _, freed in work_of(node)] == [(0, 0)] * len(PROMPTS)


def test_two_nodes_select_as_one_and_end_with_an_error(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    arguments = {**tiny, "max_num_batched_tokens": 4096}
    budget = {"budget": 256, "max_host_memory": 1 << 28}
    alone = of_one_node({**arguments, **selected(**budget)}, tmp_path)
    with two_nodes(arguments, tmp_path, kv_transfer_config=plugin(**budget)) as nodes:
        assert of_two_nodes(nodes) == alone
        page = metrics_after(nodes.url, len(PROMPTS))
        assert set(metric(page, "host_bytes").values()) == {0.0}
        long = sum(length + NEW_TOKENS > 256 for length in LENGTHS)
        assert set(metric(page, "sparse_steps_total").values()) == {long * (NEW_TOKENS - 1.0)}
        works = [work_of(node) for node in (nodes.first, nodes.second)]
        # each rank has one of two heads, and both have done the same
        for work in works:
            sparse = [each for each in work if each[0] == NEW_TOKENS - 1 and each[2] > 0]
            assert len(sparse) == long and len(work) == len(PROMPTS)
        assert [each[:2] for each in works[0]] == [each[:2] for each in works[1]]
        _ends_when_the_other_dies(nodes)


def _ends_when_the_other_dies(nodes: Nodes) -> None:
    """Kill the second node under a request: that fails, and so does the first node."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, nodes.url, PROMPTS[0], 300)
        while not re.search(r"vllm:num_requests_running{.*} 1", get(f"{nodes.url}/metrics")):
            assert not asked.done()
        os.killpg(nodes.second.process.pid, signal.SIGKILL)
        with pytest.raises((HTTPError, ConnectionError)):
            asked.result(120)
    nodes.first.process.wait(120)
    assert "EngineDeadError" in nodes.first.said
