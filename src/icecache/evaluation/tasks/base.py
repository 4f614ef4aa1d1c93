"""What a task is."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sample", "Source", "Task", "task_seed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question with its answers.

    Parameters
    ----------
    id : str
        Unique within the task.
    prompt : str
        All that is asked, without chat template.
    answers : tuple of str
    prefix : str
        The beginning of the answer, put into the model's mouth.
    classes : tuple of str
        All classes, where the task is to choose one.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    prefix: str = ""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where samples come from.

    Parameters
    ----------
    data : Path, optional
        A local folder; without one data sets come from the Hugging Face hub.
    haystack : Path, optional
        A text file in which needles are hidden; without one it is noise.
    length : int
        Asked for: tokens of a generated prompt, its template and its answer together. What a
        prompt is made of depends on this one, so that template and steps do not change it.
    tokenizer
        Counts tokens of generated prompts.
    seed : int
        Of generated prompts.
    reserved : int
        Tokens of the length that template and further steps take.
    """

    data: Path | None
    haystack: Path | None
    length: int
    tokenizer: "PreTrainedTokenizerBase"
    seed: int = 0
    reserved: int = 0

    @property
    def room(self) -> int:
        """Tokens that are left for a generated prompt and its answer together."""
        return self.length - self.reserved


Score = Callable[[str, Sample], float]
Load = Callable[[Source], Iterator[Sample]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task by its name.

    Parameters
    ----------
    name, group : str
    load : callable
        Yields samples in a fixed order; generated tasks never end.
    score : callable
        From 0 to 1.
    max_new_tokens : int
        Longest answer.
    is_generated : bool
        Whether prompts are made at any length asked for.
    is_chat : bool
        Whether a chat template is used where the model has one (LongBench: not on few-shot and
        code tasks).
    stops : tuple of str
        An answer ends before the first of them.
    """

    name: str
    group: str
    load: Load
    score: Score
    max_new_tokens: int
    is_generated: bool = False
    is_chat: bool = True
    stops: tuple[str, ...] = ()

    def trim(self, answer: str) -> str:
        """Return an answer up to its first stop; leading line breaks are no stop."""
        answer = answer.lstrip("\n")
        for stop in self.stops:
            answer = answer.split(stop, 1)[0]
        return answer

    def is_done(self, answer: str) -> bool:
        """Return whether an answer has reached a stop."""
        answer = answer.lstrip("\n")
        return any(stop in answer for stop in self.stops)


def task_seed(name: str, source: Source, index: int) -> int:
    """Return the seed of one generated sample, the same in every process."""
    return zlib.crc32(f"{name}/{source.length}/{source.seed}/{index}".encode())
