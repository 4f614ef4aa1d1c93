"""LongBench (arXiv 2308.14508): 16 English and 5 Chinese sets, prompts and metrics as published."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from typing import NamedTuple

from icecache.errors import InputError
from icecache.evaluation.metrics.exact import (
    classification,
    code_similarity,
    counted,
    retrieved,
)
from icecache.evaluation.metrics.text import f1, f1_zh, rouge_l, rouge_l_zh
from icecache.evaluation.tasks.base import Sample, Score, Source, Task
from icecache.evaluation.tasks.rows import Hub, Row, read_rows, text_of, where_of

__all__ = ["CHINESE", "longbench_tasks"]

_HUB = "hf://datasets/zai-org/LongBench/data.zip"
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")


class _Set(NamedTuple):
    max_new_tokens: int
    score: Score
    is_chat: bool = True
    is_one_line: bool = False


def _best(metric: Callable[[str, str], float]) -> Score:
    def score(prediction: str, sample: Sample) -> float:
        return max(metric(prediction, answer) for answer in sample.answers)

    return score


def _classified(prediction: str, sample: Sample) -> float:
    return max(classification(prediction, answer, sample.classes) for answer in sample.answers)


_SETS: dict[str, _Set] = {
    "narrativeqa": _Set(128, _best(f1)),
    "qasper": _Set(128, _best(f1)),
    "multifieldqa_en": _Set(64, _best(f1)),
    "hotpotqa": _Set(32, _best(f1)),
    "2wikimqa": _Set(32, _best(f1)),
    "musique": _Set(32, _best(f1)),
    "gov_report": _Set(512, _best(rouge_l)),
    "qmsum": _Set(512, _best(rouge_l)),
    "multi_news": _Set(512, _best(rouge_l)),
    "trec": _Set(64, _classified, is_chat=False, is_one_line=True),
    "triviaqa": _Set(32, _best(f1), is_chat=False, is_one_line=True),
    "samsum": _Set(128, _best(rouge_l), is_chat=False, is_one_line=True),
    "passage_count": _Set(32, _best(counted)),
    "passage_retrieval_en": _Set(32, _best(retrieved)),
    "lcc": _Set(64, _best(code_similarity), is_chat=False),
    "repobench-p": _Set(64, _best(code_similarity), is_chat=False),
    "multifieldqa_zh": _Set(64, _best(f1_zh)),
    "dureader": _Set(128, _best(rouge_l_zh)),
    "vcsum": _Set(512, _best(rouge_l_zh)),
    "lsht": _Set(64, _classified, is_chat=False, is_one_line=True),
    "passage_retrieval_zh": _Set(32, _best(retrieved)),
}


def longbench_tasks() -> list[Task]:
    """Return one task per set.

    Rows are LongBench's own (``context``, ``input``, ``answers``, ``all_classes``) or complete
    prompts (``prompt``, ``answers``), from ``longbench/NAME.jsonl`` or ``NAME.jsonl`` of a local
    folder or from the hub.
    """
    return [
        Task(
            name=name,
            group="longbench",
            load=partial(_load, name),
            score=entry.score,
            max_new_tokens=entry.max_new_tokens,
            is_chat=entry.is_chat,
            stops=("\n",) if entry.is_one_line else (),
        )
        for name, entry in _SETS.items()
    ]


def _load(name: str, source: Source) -> Iterator[Sample]:
    # a script of the data set's repository, which datasets 4 no longer runs, would unpack this
    hub = Hub("json", data_files=f"zip://data/{name}.jsonl::{_HUB}", split="train")
    names = (f"longbench/{name}.jsonl", f"{name}.jsonl")
    template = _templates()[name]
    for number, row in enumerate(read_rows(source.data, names, hub)):
        sample = _sample(row, number, template)
        _check(name, sample, where_of(row))
        yield sample


def _check(name: str, sample: Sample, where: str) -> None:
    """Raise `InputError` on answers that the set's metric cannot take."""
    if _SETS[name].score is _classified and not sample.classes:
        raise InputError(f"{where}: field 'all_classes' must be a list of texts, {name} needs it")
    if name.startswith("passage_retrieval"):
        for answer in sample.answers:
            if re.search(r"\d", answer) is None:
                raise InputError(f"{where}: an answer of {name} must hold a number, got {answer!r}")


def _sample(row: Row, number: int, template: str) -> Sample:
    if "prompt" in row:
        prompt = text_of(row, "prompt")
    else:
        prompt = template.format(context=text_of(row, "context"), input=text_of(row, "input"))
    # some copies of the sets keep both in one object
    nested = row["answers"] if isinstance(row.get("answers"), dict) else row
    answers = _texts(nested, "answers", where_of(row))
    if not answers:
        raise InputError(f"{where_of(row)}: field 'answers' must be a list of texts, got []")
    has_classes = nested.get("all_classes") is not None
    return Sample(
        id=str(row.get("id", row.get("_id", number))),
        prompt=prompt,
        answers=answers,
        classes=_texts(nested, "all_classes", where_of(row)) if has_classes else (),
    )


def _texts(row: Row, key: str, where: str) -> tuple[str, ...]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{where}: field {key!r} must be a list of texts, got {repr(value)[:60]}")
    return tuple(value)


def _templates() -> dict[str, str]:
    text = files("icecache.evaluation").joinpath("data/longbench_prompts.json").read_text("utf-8")
    found: dict[str, str] = json.loads(text)
    return found
