"""What a run is: its settings, checked before anything is loaded."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icecache.errors import InputError
from icecache.evaluation.methods.registry import parse_methods
from icecache.evaluation.prompting import Overlong
from icecache.evaluation.tasks.registry import find_tasks

__all__ = ["RunSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Settings of one evaluation.

    Parameters
    ----------
    model : str
        A folder with a causal language model, or ``"embedded"``.
    tasks, methods : tuple of str
        Names of tasks or groups, and of methods, with parameters as ``name:key=value,...``.
    budgets : tuple of int
        Tokens that a KV head attends exactly in a step.
    limit : int, optional
        Samples of each task (and length); without one all that there are.
    lengths : tuple of int
        Tokens of generated prompts, answer included.
    data, haystack : Path, optional
        See `icecache.evaluation.tasks.base.Source`.
    max_length : int, optional
        Most tokens of a prompt; by default what the model's context leaves.
    overlong : {"middle", "skip"}
        What happens to longer ones.
    steps : int
        Teacher-forced steps that fidelity is measured on.
    probed_steps : int
        How many of them are measured layer by layer.
    max_new_tokens : int, optional
        Longest answer, if shorter than the task's own.
    answers : bool
        Whether methods answer freely, to be scored; fidelity alone takes half the time.
    dtype : str
        Of the weights.
    seed : int
        Of generated prompts.

    Raises
    ------
    InputError
        On an unknown name or a value outside its rule.
    ConfigError
        On a method's parameter outside its rule, or a budget that it cannot keep.
    """

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    limit: int | None = None
    lengths: tuple[int, ...] = (4096,)
    data: Path | None = None
    haystack: Path | None = None
    max_length: int | None = None
    overlong: Overlong = "middle"
    steps: int = 32
    probed_steps: int = 4
    max_new_tokens: int | None = None
    answers: bool = True
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "budgets", "lengths"):
            if not getattr(self, name):
                raise InputError(f"--{name} must not be empty")
        numbers = {
            "steps": (self.steps, 1),
            "probed-steps": (self.probed_steps, 0),
            "limit": (self.limit, 1),
            "max-length": (self.max_length, 1),
            "max-new-tokens": (self.max_new_tokens, 1),
            "seed": (self.seed, 0),
            **{f"budgets {budget}": (budget, 1) for budget in self.budgets},
            **{f"lengths {length}": (length, 1) for length in self.lengths},
        }
        for name, (value, low) in numbers.items():
            if value is not None and value < low:
                raise InputError(f"--{name} must be at least {low}, got {value}")
        if self.overlong not in ("middle", "skip"):
            raise InputError(f"--overlong must be middle or skip, got {self.overlong!r}")
        find_tasks(list(self.tasks))
        for named in parse_methods(list(self.methods)):
            for budget in self.budgets:
                named.method.check(budget)
        for name in ("budgets", "lengths"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"--{name} has a value twice")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON takes them."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def figures_depend_on(self) -> dict[str, Any]:
        """Return what every figure of the run depends on; the rest says which figures there are."""
        free = ("tasks", "methods", "budgets", "limit", "lengths")
        return {name: value for name, value in self.to_json().items() if name not in free}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
