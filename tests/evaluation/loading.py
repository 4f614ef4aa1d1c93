"""How the tests of tasks load samples."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from icecache.evaluation.tasks.base import Sample, Source
from icecache.evaluation.tasks.registry import all_tasks, task_groups

__all__ = ["GENERATED", "load", "source_of", "write"]

GENERATED = task_groups()["generated"]


def source_of(tokenizer: PreTrainedTokenizerBase | None, **settings: Any) -> Source:
    given = {"data": None, "haystack": None, "length": 1000, "tokenizer": tokenizer}
    return Source(**{**given, **settings})


def load(name: str, source: Source, count: int = 3) -> list[Sample]:
    return list(islice(all_tasks()[name].load(source), count))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
