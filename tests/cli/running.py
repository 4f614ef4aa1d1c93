"""What a run of the command line in this process gives."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Cli", "Result"]


@dataclass(frozen=True)
class Result:
    """Exit code and what was written."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]
