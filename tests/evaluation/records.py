"""Results for the tests of stores and reports."""

from pathlib import Path

from icecache.evaluation.results.record import Record
from icecache.evaluation.results.store import ResultStore
from icecache.evaluation.settings import RunSettings

__all__ = ["SETTINGS", "STAMP", "example", "fill", "make_record"]

SETTINGS = RunSettings(model="m", tasks=("lcc",), methods=("topk",), budgets=(64,))
STAMP = {
    **{"icecache": "0", "commit": "c0ffee", "torch": "2", "transformers": "5"},
    **{"processor": "<fast & small>", "threads": 1, "started": "today", "prompts": "plain"},
}


def make_record(
    method: str = "topk",
    budget: int | None = 64,
    *,
    task: str = "lcc",
    number: int = 0,
    **values: float,
) -> Record:
    given = {"kl": 0.5, "top1": 0.75, "attended": 60.0, "score": 0.25, **values}
    return Record(
        task=task,
        id=str(number),
        method=method,
        budget=budget,
        tokens=1000,
        mass=(0.5, 0.7),
        error=(0.1, 0.2),
        answer="x | y\n<b>",
        **given,  # type: ignore[arg-type]
    )


def fill(folder: Path, records: list[Record]) -> None:
    with ResultStore.open(folder, SETTINGS, STAMP) as store:
        for record in records:
            store.add(record)


def example() -> list[Record]:
    """Return two tasks of three samples; icecache always half as far as topk."""
    records = []
    for task, number in ((task, n) for task in ("lcc", "trec") for n in range(3)):
        at = {"task": task, "number": number}
        records.append(
            make_record("full", None, **at, kl=0.0, top1=1.0, attended=1000.0, score=0.8)
        )
        for budget in (64, 256):
            far = (number + 1) * 64 / budget
            records.append(make_record("topk", budget, **at, kl=far, score=0.4))
            records.append(make_record("icecache", budget, **at, kl=far / 2, score=0.6))
    return records
