"""A model whose sliding layers stay with vLLM's own backend while its full ones are ours."""

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Answers, run_script, save_tiny, selected, tokens_of

ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def task(engine: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    model = save_tiny("Gemma3Text", tmp_path_factory.mktemp("hybrid"))
    arguments = {**engine, "model": model, "max_model_len": 512, "skip_tokenizer_init": True}
    arguments |= {"enable_prefix_caching": False, "kv_cache_memory_bytes": 1 << 26}
    prompts = [[3 + (7 * i * (i + k)) % 500 for i in range(n)] for k, n in ((1, 400), (2, 90))]
    return {"engine": arguments, "prompts": prompts, "max_tokens": [12, 12], "rounds": [{}]}


def test_full_layers_alone_are_ours(task: Answers, tmp_path: Path) -> None:
    stock = run_script(sys.executable, "run_engine.py", task, tmp_path, 900, **ALONE)
    arguments = {**task["engine"], **selected(budget=512)}
    ours = run_script(
        sys.executable, "run_engine.py", {**task, "engine": arguments}, tmp_path, 900, **ALONE
    )
    assert tokens_of(ours) == tokens_of(stock)
    assert ours["output"].count("IceCache: 2 layers") == 1
    assert ours["output"].count("IceCache: request") == 2


def test_a_shared_prefix_of_sliding_layers_is_refused(task: Answers, tmp_path: Path) -> None:
    arguments = {**task["engine"], **selected(budget=512), "enable_prefix_caching": True}
    with pytest.raises(pytest.fail.Exception, match="start with --no-enable-prefix-caching"):
        run_script(
            sys.executable, "run_engine.py", {**task, "engine": arguments}, tmp_path, 900, **ALONE
        )
