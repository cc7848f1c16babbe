"""What people read: notices, progress with time left, and short tables, all on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(stderr=True, highlight=False, soft_wrap=True)

_LINE_EVERY_S = 10.0  # without a terminal a line now and then stands in for the bar


def show_notices() -> None:
    """Let the library's notices reach the console; warnings stand out."""
    logger = logging.getLogger("pipeline")
    logger.handlers[:] = [_ConsoleHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = ("notice: " if warning else "") + record.getMessage()
        console.print(text, style="yellow" if warning else None, markup=False)


@contextmanager
def progress(title: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Show a phase as a bar with rate and time left, or as a line every ten seconds without a terminal."""
    with (_bar if console.is_terminal else _lines)(title, total, unit) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(unit),
        _Rate(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)


def _Rate() -> Any:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.1f}/s" if speed else "")

    return Rate()


@contextmanager
def _lines(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < _LINE_EVERY_S:
            return
        last = now
        rate = done / (now - start)
        left = (total - done) / rate
        console.print(f"{title}: {done:,} of {total:,} {unit}, {rate:,.1f}/s, {left:,.0f} s left", markup=False)

    yield advance


def table(rows: Iterable[Sequence[object]], headers: Sequence[str] = ()) -> None:
    """Print a small table of any cells."""
    rows = [[_text(cell) for cell in row] for row in rows]
    made = Table(*headers, show_header=bool(headers), box=None, pad_edge=False)
    for _ in rows[0] if rows and not headers else ():
        made.add_column(overflow="fold")  # a cell too wide is continued below, never cut
    for row in rows:
        made.add_row(*row)
    console.print(made, markup=False)


def say(text: str, style: str | None = None) -> None:
    """Print one line."""
    console.print(text, style=style, markup=False)


def emit_json(value: Mapping[str, Any]) -> None:
    """Print the one JSON object of a command to stdout."""
    json.dump(value, sys.stdout, ensure_ascii=True, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _text(cell: object) -> Any:
    from rich.text import Text

    if isinstance(cell, float):
        return Text(f"{cell:,.4g}")
    return Text(f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell))
