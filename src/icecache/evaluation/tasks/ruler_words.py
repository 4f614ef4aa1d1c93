"""RULER's aggregation and tracing (arXiv 2404.06654): common words, frequent words, variables."""

import math
import string
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from random import Random

from icecache.evaluation.metrics.exact import contains_all
from icecache.evaluation.tasks.base import Sample, Source, Task
from icecache.evaluation.tasks.fit import NOISE, Draft, all_words, fitted_samples

__all__ = ["word_tasks"]

_COMMON = 10
_HOPS = 4
_CWE_ASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_FWE_ASK = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
_FWE_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
_VT_ASK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are: "
)


def word_tasks() -> list[Task]:
    """Return common words (cwe), frequent words (fwe) and variable tracking (vt)."""
    return [
        _task("ruler_cwe", _load_common, 120),
        _task("ruler_fwe", _load_frequent, 50),
        _task("ruler_vt", _load_variables, 30),
    ]


def _task(
    name: str, load: Callable[[str, int, Source], Iterator[Sample]], answer_tokens: int
) -> Task:
    return Task(
        name=name,
        group="ruler",
        load=partial(load, name, answer_tokens),
        score=lambda prediction, sample: contains_all(prediction, sample.answers),
        max_new_tokens=answer_tokens,
        is_generated=True,
    )


def _load_common(name: str, answer_tokens: int, source: Source) -> Iterator[Sample]:
    make = partial(_make_common, source.length < 4096)
    return fitted_samples(name, source, make, _COMMON + 1, answer_tokens)


def _make_common(is_short: bool, random: Random, amount: int) -> Draft:
    # one worked example first; few repetitions where there is little room, as in RULER
    shown = _word_list(random, 20, 3, 1) if is_short else _word_list(random, 40, 10, 3)
    asked = _word_list(random, amount, 6, 1) if is_short else _word_list(random, amount, 30, 3)
    solved = " ".join(f"{i}. {word}" for i, word in enumerate(shown[1], 1))
    example = f"{_CWE_ASK.format(context=shown[0])}{_CWE_PREFIX} {solved}"
    return Draft(f"{example}\n{_CWE_ASK.format(context=asked[0])}", _CWE_PREFIX, tuple(asked[1]))


def _word_list(random: Random, amount: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """Return a numbered list of `amount` different words, the first ten `often`, and those ten."""
    pool = all_words()
    words = random.sample(pool, min(amount, len(pool)))
    # beyond the pool: pairs, which no single word equals
    words += [f"{random.choice(pool)}-{i}" for i in range(amount - len(words))]
    repeated = words[:_COMMON] * often + words[_COMMON:] * seldom
    random.shuffle(repeated)
    return " ".join(f"{i}. {word}" for i, word in enumerate(repeated, 1)), words[:_COMMON]


def _load_frequent(name: str, answer_tokens: int, source: Source) -> Iterator[Sample]:
    make = partial(_make_frequent, max(10, (source.length - answer_tokens) // 50))
    return fitted_samples(name, source, make, 60, answer_tokens)


def _make_frequent(vocabulary: int, random: Random, amount: int) -> Draft:
    words = _letters(random, string.ascii_lowercase, 6, vocabulary)
    # the most frequent one is noise; frequencies follow a zeta distribution with exponent 2
    words[0] = "..."
    share = 6 / math.pi**2
    text = [word for k, word in enumerate(words, 1) for _ in range(int(amount * share / k**2))]
    random.shuffle(text)
    return Draft(_FWE_ASK.format(context=" ".join(text)), _FWE_PREFIX, tuple(words[1:4]))


def _load_variables(name: str, answer_tokens: int, source: Source) -> Iterator[Sample]:
    return fitted_samples(name, source, _make_variables, _HOPS + 1, answer_tokens)


def _make_variables(random: Random, amount: int) -> Draft:
    # one worked example first, with shorter names, as in RULER
    shown, names = _chain(random, 10, letters=3)
    asked, answers = _chain(random, amount, letters=5)
    example = f"{shown.prompt}{shown.prefix}{' '.join(names)}\n\n"
    return Draft(example + asked.prompt, asked.prefix, tuple(answers))


def _chain(random: Random, amount: int, letters: int) -> tuple[Draft, list[str]]:
    names = _letters(random, string.ascii_uppercase, letters, _HOPS + 1)
    value = str(random.randint(10000, 99999))
    links = [f"VAR {names[0]} = {value}"]
    links += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
    lines = [NOISE] * amount
    for moved, (place, link) in enumerate(zip(sorted(random.sample(range(amount), 5)), links)):
        lines.insert(place + moved, link)
    ask = _VT_ASK.format(context="\n".join(lines), value=value)
    return Draft(ask, _VT_PREFIX.format(count=len(names), value=value), ()), names


def _letters(random: Random, alphabet: str, length: int, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choices(alphabet, k=length))] = None
    return list(found)
