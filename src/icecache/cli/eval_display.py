"""The progress of an evaluation on the terminal."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["RunDisplay"]


class RunDisplay:
    """One bar over all results of a run; what is under way stands before it."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("reading", total=None)

    def __enter__(self) -> "RunDisplay":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def plan(self, results: int, done: int) -> None:
        """Set the bar's length; results of an earlier session count."""
        self._progress.update(self._task, total=results, completed=done)

    def begin(self, what: str) -> None:
        """Say what comes next."""
        self._progress.update(self._task, description=what)

    def advance(self) -> None:
        """Move the bar by one result."""
        self._progress.advance(self._task)
