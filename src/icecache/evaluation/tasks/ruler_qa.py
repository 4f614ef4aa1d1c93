"""RULER's question answering (arXiv 2404.06654): a few documents that answer, among many others."""

from collections.abc import Iterator
from functools import partial
from itertools import count
from random import Random

from icecache.errors import InputError
from icecache.evaluation.metrics.exact import contains_any
from icecache.evaluation.tasks.base import Sample, Source, Task
from icecache.evaluation.tasks.fit import Draft, adjectives, fitted_samples, nouns
from icecache.evaluation.tasks.qa_files import Question, hotpot_questions, squad_questions
from icecache.evaluation.tasks.rows import Hub

__all__ = ["qa_tasks"]

_ANSWER_TOKENS = 32
_ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {question}"
)
_PREFIX = " Answer:"


def qa_tasks() -> list[Task]:
    """Return qa (made-up documents), qa_1 (SQuAD) and qa_2 (HotpotQA).

    The two data sets come from ``squad.json`` and ``hotpotqa.json`` of the data folder, the
    published development files, or from the hub.
    """
    loads = {"ruler_qa": _load_made, "ruler_qa_1": _load_squad, "ruler_qa_2": _load_hotpot}
    return [
        Task(
            name=name,
            group="ruler",
            load=partial(load, name),
            score=lambda prediction, sample: contains_any(prediction, sample.answers),
            max_new_tokens=_ANSWER_TOKENS,
            is_generated=True,
        )
        for name, load in loads.items()
    ]


def _load_made(name: str, source: Source) -> Iterator[Sample]:
    return fitted_samples(name, source, _make, 2, _ANSWER_TOKENS)


def _make(random: Random, amount: int) -> Draft:
    people = [_person(random) for _ in range(amount)]
    asked = random.choice(people)
    context = _numbered([document for _, _, document in people])
    question = f"In which town was {asked[0]} born?"
    return Draft(_ASK.format(context=context, question=question), _PREFIX, (asked[1],))


def _person(random: Random) -> tuple[str, str, str]:
    name = f"{random.choice(adjectives()).title()} {random.choice(nouns()).title()}"
    town = f"{random.choice(nouns()).title()}{random.choice(('ton', 'ville', 'burg', 'ham'))}"
    title = f"{random.choice(adjectives())} {random.choice(nouns())}".title()
    years = random.randint(1800, 1999), random.randint(3, 30)
    text = (
        f"{name} (born {years[0]} in {town}) was known for work on the {random.choice(nouns())}. "
        f"After {years[1]} years abroad the author of The {title} turned to teaching."
    )
    return name, town, f"{name}\n{text}"


def _load_squad(name: str, source: Source) -> Iterator[Sample]:
    if source.data is None:
        rows = Hub("rajpurkar/squad_v2", split="validation").rows()
        found = [
            Question(row["question"], tuple(row["answers"]["text"]), (row["context"],))
            for row in rows
            if row["answers"]["text"]
        ]
    else:
        found = squad_questions(source.data / "squad.json")
    return _among_others(name, source, found)


def _load_hotpot(name: str, source: Source) -> Iterator[Sample]:
    if source.data is None:
        rows = Hub("hotpotqa/hotpot_qa", name="distractor", split="validation").rows()
        found = [
            Question(row["question"], (row["answer"],), tuple(_documents(**row["context"])))
            for row in rows
        ]
    else:
        found = hotpot_questions(source.data / "hotpotqa.json")
    return _among_others(name, source, found)


def _documents(title: list[str], sentences: list[list[str]]) -> Iterator[str]:
    return (f"{head}\n{''.join(text)}" for head, text in zip(title, sentences))


def _among_others(name: str, source: Source, questions: list[Question]) -> Iterator[Sample]:
    """Yield each question's documents among others' until the length is reached."""
    if not questions:
        raise InputError(f"{name}: the data set holds no question that can be answered")
    others = list(dict.fromkeys(text for entry in questions for text in entry.documents))
    for index in count():
        if index == len(questions):
            return
        entry = questions[index]
        if set(others) <= set(entry.documents):
            raise InputError(
                f"{name}: question {index} of the data set must have documents of other questions "
                "to be put among, there are none"
            )
        make = partial(_make_among, entry, others)
        least = len(entry.documents)
        samples = fitted_samples(f"{name}/{index}", source, make, least, _ANSWER_TOKENS)
        sample = next(samples)
        yield Sample(
            id=f"{source.seed}-{index}",
            prompt=sample.prompt,
            answers=sample.answers,
            prefix=sample.prefix,
        )


def _make_among(entry: Question, others: list[str], random: Random, amount: int) -> Draft:
    mine = set(entry.documents)
    pool = [text for text in others if text not in mine]
    wanted = amount - len(entry.documents)
    # more documents than there are: they come again, as in RULER
    added = [text for _ in range(wanted // len(pool)) for text in pool]
    documents = [*entry.documents, *added, *random.sample(pool, wanted - len(added))]
    random.shuffle(documents)
    context = _numbered(documents)
    return Draft(_ASK.format(context=context, question=entry.question), _PREFIX, entry.answers)


def _numbered(documents: list[str]) -> str:
    return "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
