"""Making a prompt as long as asked for, and the material it is made of."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from random import Random
from typing import NamedTuple
from uuid import UUID

from icecache.errors import InputError
from icecache.evaluation.tasks.base import Sample, Source, task_seed

__all__ = [
    "NOISE",
    "Draft",
    "adjectives",
    "all_words",
    "fitted_samples",
    "hide_in_sentences",
    "nouns",
    "read_haystack",
    "uuid_of",
]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# where needles may lie in a text, as RULER: 40 depths from the first sentence to the last
_DEPTHS = 40
# a unit of context has a token or more; far beyond this many a token it is empty
_MOST_UNITS = 8


class Draft(NamedTuple):
    """A generated question: as in `Sample`."""

    prompt: str
    prefix: str
    answers: tuple[str, ...]


Make = Callable[[Random, int], Draft]


def fitted_samples(
    name: str, source: Source, make: Make, least: int, answer_tokens: int
) -> Iterator[Sample]:
    """Yield samples whose prompt, with room for the answer, has at most ``source.room`` tokens.

    Parameters
    ----------
    name : str
        Of the task; with the seed, length and number it seeds a sample.
    make : callable
        Makes a draft from a random generator and an amount of context, of which more is longer.
    least : int
        The smallest amount.
    answer_tokens : int
        Room for the answer.

    Raises
    ------
    InputError
        If not even the smallest amount fits, or more and more makes the prompt no longer.
    """
    index = 0
    while True:
        seed = task_seed(name, source, index)
        amount = _largest(source, make, least, answer_tokens, seed, name)
        draft = make(Random(seed), amount)
        yield Sample(
            id=f"{source.seed}-{index}",
            prompt=draft.prompt,
            answers=draft.answers,
            prefix=draft.prefix,
        )
        index += 1


def _largest(
    source: Source, make: Make, least: int, answer_tokens: int, seed: int, name: str
) -> int:
    def fits(amount: int) -> bool:
        draft = make(Random(seed), amount)
        ids = source.tokenizer(draft.prompt + draft.prefix, verbose=False)["input_ids"]
        return len(ids) + answer_tokens <= source.room

    if not fits(least):
        raise InputError(
            f"{name}: a prompt of {source.length} tokens, answer included, is too short for this "
            "task; raise --lengths"
        )
    low, high = least, least + 1
    while fits(high):
        if high > _MOST_UNITS * (least + source.room):
            raise InputError(
                f"{name}: {high:,} units of context still fit {source.length:,} tokens, it does "
                "not grow; the task has nothing to fill a prompt with"
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def read_haystack(source: Source) -> list[str] | None:
    """Return the words of the haystack file, None where there is none.

    Raises
    ------
    InputError
        If the file is missing, no UTF-8 text, or empty.
    """
    if source.haystack is None:
        return None
    try:
        words = source.haystack.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"haystack cannot be read: {source.haystack} ({error})") from error
    if not words:
        raise InputError(f"haystack is empty: {source.haystack}")
    return words


def hide_in_sentences(words: list[str], amount: int, needles: list[str], random: Random) -> str:
    """Return the first `amount` words, repeated as needed, with needles between sentences."""
    text = " ".join((words * (amount // len(words) + 1))[:amount])
    sentences = re.split(r"(?<=[.!?])\s+", text)
    depths = sorted(random.sample(range(_DEPTHS), len(needles)))
    places = [len(sentences) * depth // (_DEPTHS - 1) for depth in depths]
    for place, needle in reversed(list(zip(places, needles))):
        sentences.insert(place, needle)
    return " ".join(sentences)


def uuid_of(random: Random) -> str:
    """Return a random UUID."""
    return str(UUID(int=random.getrandbits(128), version=4))


@cache
def nouns() -> tuple[str, ...]:
    """Return English nouns."""
    return _words("nounlist.txt")


@cache
def adjectives() -> tuple[str, ...]:
    """Return English adjectives."""
    return _words("adjectivelist.txt")


@cache
def all_words() -> tuple[str, ...]:
    """Return nouns, adjectives and verbs, sorted."""
    return tuple(sorted({*nouns(), *adjectives(), *_words("verblist.txt")}))


def _words(name: str) -> tuple[str, ...]:
    # the lists that RULER draws from
    return tuple(files("wonderwords.assets").joinpath(name).read_text("utf-8").split())
