"""The terminal: progress of prefill and decode, the streaming answer, the closing table."""

from collections.abc import Iterator
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
        self._text = Text()
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._prefill = self._progress.add_task(f"{name}: prefill", total=tokens)
        self._decode = self._progress.add_task(f"{name}: decode", total=max_new_tokens, start=False)
        with Live(Group(self._progress, self._text), console=self._console):
            yield self
            # the answer may have ended early
            self._progress.update(self._decode, total=self._progress.tasks[-1].completed)
        if not self._console.is_terminal:
            self._console.line()

    def advance(self, tokens: int) -> None:
        """Move the prefill bar."""
        self._progress.advance(self._prefill, tokens)

    def piece(self, text: str) -> None:
        """Add a piece of the answer and move the decode bar by one token."""
        self._progress.start_task(self._decode)
        self._text.append(text)
        self._progress.advance(self._decode)


def show_comparison(console: Console, result: Comparison) -> None:
    """Print the closing table and, with two rows, answers and divergence."""
    table = Table(title=None)
    for heading in ("", "tokens in context", "attended a step"):
        table.add_column(heading, justify="right" if heading else "left")
    for heading in ("KV exact", "summaries", "KV total", "full cache", "prefill", "decode"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(*_cells(row))
    console.print(table)
    if len(result.rows) > 1:
        for row in result.rows:
            console.print(Text.assemble((f"{row.name}: ", "bold"), row.answer))
        console.print(
            f"mean KL(full || IceCache) of next-token distributions: {result.divergence:.2g} nats"
        )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.tokens:,}",
        f"{row.attended:,.0f}",
        _mib(row.exact_bytes),
        _mib(row.summary_bytes),
        _mib(row.total_bytes),
        _mib(row.full_bytes),
        f"{row.prefill_s:.1f} s",
        f"{row.tokens_per_s:.1f} tokens/s",
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
