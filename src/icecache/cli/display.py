"""The terminal: progress of prefill and decode, the streaming answer, the closing table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from icecache.cli.report import Comparison, Row

__all__ = ["Display", "show_comparison"]


class Display:
    """Shows one run: two bars and the answer as it grows."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def run(self, name: str, tokens: int, max_new_tokens: int) -> Iterator["Display"]:
        """Show the bars of one run until the block is left; the answer stays on the screen."""
        self._text, self._tokens = Text(), tokens
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._prefill = self._progress.add_task(f"{name}: prefill", total=tokens)
        self._decode = self._progress.add_task(
            f"{name}: decode", total=max_new_tokens, start=False, visible=max_new_tokens > 0
        )
        with Live(Group(self._progress, self._text), console=self._console):
            yield self
            self._progress.update(self._prefill, completed=tokens)
            # the answer may have ended early
            self._progress.update(self._decode, total=self._progress.tasks[-1].completed)
        if not self._console.is_terminal:
            self._console.line()

    def advance(self, tokens: float) -> None:
        """Move the prefill bar."""
        self._progress.advance(self._prefill, tokens)

    def piece(self, text: str) -> None:
        """Add a piece of the answer and move the decode bar by one token."""
        if not self._text:
            # shares of tokens, one a layer, do not sum up to the last digit
            self._progress.update(self._prefill, completed=self._tokens)
            self._progress.start_task(self._decode)
        self._text.append(text)
        self._progress.advance(self._decode)


def show_comparison(console: Console, result: Comparison) -> None:
    """Print the closing table, a column for each cache, and what distinguishes the two."""
    table = Table("", *(row.name for row in result.rows))
    for column in table.columns[1:]:
        column.justify = "right"
    for label, show in _LINES:
        table.add_row(label, *(show(row) for row in result.rows))
    console.print(table)
    if result.divergence is None:
        return
    for row in result.rows:
        console.print(Text.assemble((f"{row.name}: ", "bold"), row.answer))
    console.print(
        f"mean KL(full || IceCache) of next-token distributions: {result.divergence:.2g} nats"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


_LINES: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("tokens in context", lambda row: f"{row.tokens:,}"),
    ("tokens attended a step", lambda row: f"{row.attended:,.0f}"),
    ("keys and values, exact", lambda row: _mib(row.exact_bytes)),
    ("summaries", lambda row: _mib(row.summary_bytes)),
    ("total", lambda row: _mib(row.total_bytes)),
    ("full cache of the same tokens", lambda row: _mib(row.full_bytes)),
    ("prefill", lambda row: f"{row.prefill_s:.1f} s"),
    ("decode", lambda row: f"{row.tokens_per_s:.1f} tokens/s"),
)
