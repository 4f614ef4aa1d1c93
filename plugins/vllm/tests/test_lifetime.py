"""Host memory: within its limit while requests come and go, and free when they are gone."""

import sys
from pathlib import Path
from typing import Any

from conftest import run_script, save_tiny, selected


def test_two_hundred_requests_leave_nothing_behind(engine: dict[str, Any], tmp_path: Path) -> None:
    limit = 8_000_000
    arguments = {**engine, "model": save_tiny("Llama", tmp_path / "model"), "max_model_len": 512}
    arguments |= {"max_num_seqs": 64, "skip_tokenizer_init": True}
    arguments |= {"kv_cache_memory_bytes": 1 << 26, **selected(budget=64, max_host_memory=limit)}
    task = {"engine": arguments, "num_requests": 200, "seed": 7, "preempt_at": [9, 30]}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    seen = run_script(sys.executable, "run_lifetime.py", task, tmp_path, 900, **alone)
    assert seen["finished"] + seen["aborted"] == 200
    assert min(seen["finished"], seen["aborted"]) > 30
    assert (seen["held"], seen["reserved"], seen["known"]) == (0, 0, 0)
    assert seen["free_after"] == seen["free_before"]
    assert 0 < seen["most_held"] <= seen["most_reserved"] <= seen["limit"] == limit
    assert 0 < seen["worst"] <= 1
    # there were blocks for more, and host memory was not
    assert seen["withheld"] > 5
