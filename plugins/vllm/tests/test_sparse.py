"""A budget of 256: the answers of our transformers path, counted steps, and room for more."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Answers, num_alike, run_script, work_of


@pytest.fixture(scope="module")
def transformers(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    task: dict[str, Any] = {"prompts": prompts, "max_tokens": [24] * len(prompts)}
    task["cache"] = {"budget": 256}
    python, folder = os.environ["ICECACHE_PYTHON"], tmp_path_factory.mktemp("transformers")
    return run_script(python, "transformers_answers.py", task, folder, 900)


def concurrency(run: Answers) -> float:
    found = re.search(r"Maximum concurrency for 8,192 tokens per request: ([\d.]+)x", run["output"])
    assert found is not None
    return float(found[1])


def test_answers_are_those_of_the_transformers_path(
    sparse: Answers, transformers: Answers, stock: Answers
) -> None:
    answers = sparse["rounds"][0]["answers"]
    for ours, theirs in zip(answers, transformers["answers"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["top"] == [pytest.approx(top, abs=0.05) for top in theirs["top"]]
    sixth = [[each["top"][5] for each in run["rounds"][0]["answers"]] for run in (sparse, stock)]
    far = [mine != pytest.approx(full, abs=1e-2) for mine, full in zip(*sixth, strict=True)]
    assert any(far) and not all(far)


def test_steps_are_counted_for_each_request(sparse: Answers, transformers: Answers) -> None:
    work = work_of(sparse)
    asked = [answer["sparse"] for answer in transformers["answers"]]
    assert [work[number][0] for number in range(8)] == asked == [23, 0, 23, 23, 23, 0, 23, 23]
    assert [work[number][1] for number in range(8)] == [1, 24, 1, 1, 1, 24, 1, 1]


def test_the_pool_holds_ten_times_as_many_long_requests(sparse: Answers, stock: Answers) -> None:
    assert concurrency(sparse) >= 10 * concurrency(stock) > 0


def test_chunks_beside_decodes_give_answers_as_sure_as_whole_prompts(sparse: Answers) -> None:
    """Trees of prompts in chunks differ from trees of whole ones: so may tokens of close calls."""
    whole, chunked = sparse["rounds"]
    assert chunked["steps"] >= 24 + 6292 // 256 > whole["steps"]
    assert num_alike(chunked["answers"], whole["answers"], 0.5) >= 5


def test_the_folder_is_plain_safetensors(model: str) -> None:
    names = {path.name for path in Path(model).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
