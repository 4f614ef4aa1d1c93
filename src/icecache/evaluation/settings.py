"""What a run is: its settings, checked before anything is loaded."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from icecache.errors import InputError
from icecache.integrations.embedded import EMBEDDED

__all__ = ["Overlong", "RunSettings"]

Overlong = Literal["middle", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Settings of one evaluation.

    Parameters
    ----------
    tasks : tuple of str
        Tasks and groups of them, see docs/evaluation.md.
    model : str, default "embedded"
        A folder with a causal language model, or 'embedded' for SmolLM2-135M.
    methods : tuple of str, default ("all",)
        Methods, as name or name:key=value,...; or all.
    budgets : tuple of int, default (64, 128, 256)
        Tokens that a KV head attends exactly in a step.
    limit : int, optional
        Samples of each task and length; by default all that there are.
    lengths : tuple of int, default (4096,)
        Tokens of generated prompts, answer included.
    data : Path, optional
        Folder of data sets; by default they come from the Hugging Face hub.
    haystack : Path, optional
        Text that hides needles; by default noise.
    max_length : int, optional
        Most tokens of a prompt; by default what the model's context leaves.
    overlong : {"middle", "skip"}, default "middle"
        Cut the middle out of longer prompts, or pass over them.
    steps : int, default 32
        Teacher-forced steps that fidelity is measured on.
    probed_steps : int, default 4
        How many of them are measured layer by layer.
    max_new_tokens : int, optional
        Longest answer, if shorter than the task's own.
    answers : bool, default True
        Let every method answer, to be scored by the task's metric.
    dtype : str, default "float32"
        Of the weights: float32, bfloat16 or float16.
    seed : int, default 0
        Of generated prompts.
    together : int, default 8
        Methods (at a budget each) that take a step as one batch; each holds a cache of its own.

    Raises
    ------
    InputError
        On a value outside its rule; names are checked by `icecache.evaluation.run.check_names`.
    """

    tasks: tuple[str, ...]
    model: str = EMBEDDED
    methods: tuple[str, ...] = ("all",)
    budgets: tuple[int, ...] = (64, 128, 256)
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
    together: int = 8

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
            "together": (self.together, 1),
            **{f"budgets {budget}": (budget, 1) for budget in self.budgets},
            **{f"lengths {length}": (length, 1) for length in self.lengths},
        }
        for name, (value, low) in numbers.items():
            if value is not None and value < low:
                raise InputError(f"--{name} must be at least {low}, got {value}")
        if self.overlong not in ("middle", "skip"):
            raise InputError(f"--overlong must be middle or skip, got {self.overlong!r}")
        for name in ("budgets", "lengths"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"--{name} has a value twice")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON takes them."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def figures_depend_on(self) -> dict[str, Any]:
        """Return what every figure of the run depends on; the rest says which figures there are."""
        free = ("tasks", "methods", "budgets", "limit", "lengths", "together")
        return {name: value for name, value in self.to_json().items() if name not in free}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
