"""GSM8K (arXiv 2110.14168) with chain of thought: the answers are long, the context grows."""

import re
from collections.abc import Iterator

from icecache.errors import InputError
from icecache.evaluation.metrics.exact import final_number, is_number
from icecache.evaluation.tasks.base import Sample, Source, Task
from icecache.evaluation.tasks.rows import Hub, Row, read_rows, text_of, where_of

__all__ = ["SHOTS", "gsm8k_task"]

SHOTS = 8
_HUB = Hub("openai/gsm8k", name="main", split="test")
_FILES = ("gsm8k_test.jsonl", "gsm8k.jsonl")


def gsm8k_task() -> Task:
    """Return the task: 8 worked examples, the last 8 rows of the set, which are never asked."""
    return Task(
        name="gsm8k",
        group="gsm8k",
        load=_load,
        score=lambda prediction, sample: final_number(prediction, sample.answers[0]),
        max_new_tokens=400,
        is_chat=False,
        stops=("\n\nQuestion:",),
    )


def _load(source: Source) -> Iterator[Sample]:
    rows = list(read_rows(source.data, _FILES, _HUB))
    if len(rows) <= SHOTS:
        raise InputError(
            f"gsm8k: the set must have more than {SHOTS} rows, the examples, got {len(rows)}"
        )
    examples = "".join(f"{_asked(row)}{_worked(row)}\n\n" for row in rows[-SHOTS:])
    for number, row in enumerate(rows[:-SHOTS]):
        marked = text_of(row, "answer").rsplit("####", 1)
        if len(marked) < 2 or not is_number(marked[1].strip()):
            end = text_of(row, "answer")[-20:]
            raise InputError(
                f"{where_of(row)}: field 'answer' must end in #### NUMBER, it ends in {end!r}"
            )
        yield Sample(id=str(number), prompt=examples + _asked(row), answers=(marked[1].strip(),))


def _asked(row: Row) -> str:
    return f"Question: {text_of(row, 'question').strip()}\nAnswer:"


def _worked(row: Row) -> str:
    # <<16-3-4=9>> are notes for a calculator
    return " " + re.sub(r"<<.*?>>", "", text_of(row, "answer")).strip()
