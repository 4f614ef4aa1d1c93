"""Passkey retrieval (arXiv 2305.16300): a number hidden in noise."""

from collections.abc import Iterator
from random import Random

from icecache.evaluation.metrics.exact import contains_all
from icecache.evaluation.tasks.base import Sample, Source, Task
from icecache.evaluation.tasks.fit import NOISE, Draft, fitted_samples

__all__ = ["passkey_task"]

_ANSWER_TOKENS = 16
_ASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I "
    "will quiz you about the important information there.\n{context}\nWhat is the pass key?"
)


def passkey_task() -> Task:
    """Return the task; the five digits lie at a random depth."""
    return Task(
        name="passkey",
        group="passkey",
        load=_load,
        score=lambda prediction, sample: contains_all(prediction, sample.answers),
        max_new_tokens=_ANSWER_TOKENS,
        is_generated=True,
    )


def _load(source: Source) -> Iterator[Sample]:
    return fitted_samples("passkey", source, _make, 1, _ANSWER_TOKENS)


def _make(random: Random, amount: int) -> Draft:
    key = str(random.randint(10000, 99999))
    # the depth is drawn first, so that it does not change while the length is fitted
    depth = random.random()
    lines = [NOISE] * amount
    lines.insert(
        round(depth * amount), f"The pass key is {key}. Remember it. {key} is the pass key."
    )
    return Draft(_ASK.format(context="\n".join(lines)), " The pass key is", (key,))
