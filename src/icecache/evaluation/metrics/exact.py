"""Choice, retrieval, counting, code, numbers: metrics that look for the right thing."""

import re
from collections.abc import Sequence

from rapidfuzz import fuzz

__all__ = [
    "classification",
    "code_similarity",
    "contains_all",
    "contains_any",
    "counted",
    "final_number",
    "is_number",
    "retrieved",
]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Return one over the number of classes named, if the right one is among them (LongBench).

    A class whose name is part of the right one's name is not counted.
    """
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == answer or name not in answer]
    return 1.0 / len(named) if answer in named else 0.0


def counted(prediction: str, answer: str) -> float:
    """Return the share of the numbers named that are the right one (LongBench)."""
    numbers = re.findall(r"\d+", prediction)
    return sum(number == answer for number in numbers) / len(numbers) if numbers else 0.0


def retrieved(prediction: str, answer: str) -> float:
    """Return the share of the numbers named that are the right paragraph's (LongBench).

    answer: ``Paragraph 7`` or ``段落7``.
    """
    return counted(prediction, re.findall(r"\d+", answer)[0])


def code_similarity(prediction: str, answer: str) -> float:
    """Return the edit similarity of the first line of code, comments passed over (LongBench)."""
    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(sign in line for sign in ("`", "#", "//")))
    return fuzz.ratio(next(code, ""), answer) / 100


def contains_all(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that the prediction contains, in any case (RULER)."""
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def contains_any(prediction: str, answers: Sequence[str]) -> float:
    """Return whether the prediction contains one of the answers, in any case (RULER's QA)."""
    text = prediction.lower()
    return float(any(answer.lower() in text for answer in answers))


def final_number(prediction: str, answer: str) -> float:
    """Return whether the final number is right (GSM8K): behind ####, else the last one."""
    marked = prediction.split("####", 1)
    found = _NUMBER.findall(marked[1])[:1] if len(marked) > 1 else _NUMBER.findall(prediction)[-1:]
    return float(bool(found) and _value(found[0]) == _value(answer))


def is_number(text: str) -> bool:
    """Return whether a text is a number that `final_number` can compare with."""
    return _NUMBER.fullmatch(text) is not None


def _value(text: str) -> float:
    return float(text.replace(",", ""))
