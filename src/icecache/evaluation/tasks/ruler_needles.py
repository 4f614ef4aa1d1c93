"""RULER's needles in a haystack (arXiv 2404.06654): one or several keys, values and questions."""

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import NamedTuple

from icecache.evaluation.metrics.exact import contains_all
from icecache.evaluation.tasks.base import Sample, Source, Task
from icecache.evaluation.tasks.fit import (
    NOISE,
    Draft,
    adjectives,
    fitted_samples,
    hide_in_sentences,
    nouns,
    read_haystack,
    uuid_of,
)

__all__ = ["needle_tasks"]

_ANSWER_TOKENS = 128
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ASK = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} "
    "for {query} mentioned in the provided text?"
)
_ASK_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} "
    "for {query} mentioned in the provided text?"
)
_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
_PREFIX_ONE = " The special magic {kind} for {query} mentioned in the provided text is"


class _Needles(NamedTuple):
    """RULER's settings: `keys` hidden, `values` each, `queries` of the keys asked for."""

    haystack: str  # noise | essay | needle
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"


_KINDS = {
    "niah_single_1": _Needles("noise"),
    "niah_single_2": _Needles("essay"),
    "niah_single_3": _Needles("essay", value_kind="uuids"),
    "niah_multikey_1": _Needles("essay", keys=4),
    "niah_multikey_2": _Needles("needle"),
    "niah_multikey_3": _Needles("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": _Needles("essay", values=4),
    "niah_multiquery": _Needles("essay", keys=4, queries=4),
}


def needle_tasks() -> list[Task]:
    """Return the eight needle tasks; an essay haystack without a file is noise."""
    return [
        Task(
            name=f"ruler_{name}",
            group="ruler",
            load=partial(_load, f"ruler_{name}", kind),
            score=lambda prediction, sample: contains_all(prediction, sample.answers),
            max_new_tokens=_ANSWER_TOKENS,
            is_generated=True,
        )
        for name, kind in _KINDS.items()
    ]


def _load(name: str, kind: _Needles, source: Source) -> Iterator[Sample]:
    essay = read_haystack(source) if kind.haystack == "essay" else None
    make = partial(_make, kind, essay)
    least = kind.keys * kind.values
    return fitted_samples(name, source, make, least, _ANSWER_TOKENS)


def _make(kind: _Needles, essay: list[str] | None, random: Random, amount: int) -> Draft:
    keys = [_draw(kind.key_kind, random) for _ in range(kind.keys)]
    values = {key: [_draw(kind.value_kind, random) for _ in range(kind.values)] for key in keys}
    needles = [_needle(kind, key, value) for key in keys for value in values[key]]
    random.shuffle(needles)
    asked = random.sample(keys, kind.queries)
    context = _hide(kind, essay, needles, random, amount)
    answers = tuple(value for key in asked for value in values[key])
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    is_one = len(answers) == 1
    word = kind.value_kind[:-1] if is_one else kind.value_kind
    ask, prefix = (_ASK_ONE, _PREFIX_ONE) if is_one else (_ASK, _PREFIX)
    prompt = ask.format(kind=word, context=context, query=query)
    return Draft(prompt, prefix.format(kind=word, query=query), answers)


def _hide(
    kind: _Needles, essay: list[str] | None, needles: list[str], random: Random, amount: int
) -> str:
    if essay is not None:
        return hide_in_sentences(essay, amount, needles, random)
    if kind.haystack == "needle":
        lines = [
            _needle(kind, _draw(kind.key_kind, random), _draw(kind.value_kind, random))
            for _ in range(amount)
        ]
    else:
        lines = [NOISE] * amount
    places = sorted(random.sample(range(amount), len(needles)), reverse=True)
    for place, needle in zip(places, needles):
        lines.insert(place, needle)
    return "\n".join(lines)


def _needle(kind: _Needles, key: str, value: str) -> str:
    return _NEEDLE.format(kind=kind.value_kind, key=key, value=value)


def _draw(kind: str, random: Random) -> str:
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return uuid_of(random)
    return f"{random.choice(adjectives())}-{random.choice(nouns())}"
