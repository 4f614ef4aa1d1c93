"""Questions with their documents, from the published files of SQuAD and HotpotQA."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from icecache.errors import InputError

__all__ = ["Question", "hotpot_questions", "squad_questions"]


class Question(NamedTuple):
    """A question, its answers, and the documents that hold them."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


class _Part(NamedTuple):
    """A value of a file, and where it stands."""

    value: Any
    where: str

    def at(self, key: str) -> "_Part":
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return _Part(self.value.get(key), f"{self.where}: {key}")

    def entries(self) -> list["_Part"]:
        if not isinstance(self.value, list) or not self.value:
            raise self.wrong("a list that is not empty")
        return [_Part(entry, f"{self.where}[{i}]") for i, entry in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("text")
        return self.value

    def wrong(self, rule: str) -> InputError:
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        return InputError(f"{self.where} must be {rule}, got {shown}")


def squad_questions(path: Path) -> list[Question]:
    """Return the questions of a SQuAD file that have an answer.

    Raises
    ------
    InputError
        If the file cannot be read, or a field breaks its rule: with its place.
    """
    return [
        Question(
            entry.at("question").text(),
            tuple(answer.at("text").text() for answer in entry.at("answers").entries()),
            (paragraph.at("context").text(),),
        )
        for article in _read(path).at("data").entries()
        for paragraph in article.at("paragraphs").entries()
        for entry in paragraph.at("qas").entries()
        if not entry.at("is_impossible").value
    ]


def hotpot_questions(path: Path) -> list[Question]:
    """Return the questions of a HotpotQA file.

    Raises
    ------
    InputError
        As `squad_questions`.
    """
    return [
        Question(
            entry.at("question").text(),
            (entry.at("answer").text(),),
            tuple(_titled(document) for document in entry.at("context").entries()),
        )
        for entry in _read(path).entries()
    ]


def _titled(document: _Part) -> str:
    parts = document.entries()
    if len(parts) != 2:
        raise document.wrong("a title and its sentences")
    return f"{parts[0].text()}\n{''.join(part.text() for part in parts[1].entries())}"


def _read(path: Path) -> _Part:
    try:
        return _Part(json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise InputError(f"data file cannot be read: {path} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
