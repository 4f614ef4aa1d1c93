"""One result: a method at a budget on a sample."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from icecache.errors import InputError

__all__ = ["Key", "Record"]

Key = tuple[str, str, str, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one method at one budget gave on one sample.

    Parameters
    ----------
    task, id, method : str
        `task` carries the length of a generated prompt, `method` its parameters.
    budget : int, optional
        None of the full cache.
    tokens : int
        Of the prompt.
    kl, top1 : float
        Teacher-forced distance from the full cache, nats, and share of equal likeliest tokens.
    attended : float
        Tokens a KV head attended exactly in the last forced step, mean over layers.
    mass, error : tuple of float
        Per layer, see `icecache.evaluation.engine.fidelity.LayerProbe`; empty if not measured.
    answer : str, optional
        What the method said; None if it was not asked.
    score : float, optional
        Of the answer, 0 to 1.
    """

    task: str
    id: str
    method: str
    budget: int | None
    tokens: int
    kl: float
    top1: float
    attended: float
    mass: tuple[float, ...] = ()
    error: tuple[float, ...] = ()
    answer: str | None = None
    score: float | None = None

    @property
    def key(self) -> Key:
        """What there is one record of."""
        return (self.task, self.id, self.method, self.budget)

    def to_line(self) -> str:
        """Return the record as one line of JSON."""
        named = [(name, getattr(self, name)) for name in ("kl", "top1", "attended", "score")]
        for layer, (mass, error) in enumerate(zip(self.mass, self.error)):
            named += [(f"mass of layer {layer}", mass), (f"error of layer {layer}", error)]
        for name, value in named:
            if value is not None and not math.isfinite(value):
                raise InputError(f"{self.key}: {name} is {value}; the model's logits are broken")
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Record":
        """Return the record of a line; KeyError or TypeError if it is none."""
        known = {field.name: row[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**known, "mass": tuple(row["mass"]), "error": tuple(row["error"])})
