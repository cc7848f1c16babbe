"""Text output for users, on stderr: notices, progress bars with the remaining time, and short tables.

The JSON object of a command is the one output to stdout.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from pipeline.core.progress import Advance
from pipeline.core.units import duration

console = Console(stderr=True, highlight=False, soft_wrap=True)

_LINE_EVERY_S = 10.0  # without a terminal, a line at this interval replaces the bar
_LEAST_TITLE, _BESIDE_TITLE = 16, 44  # characters
_LEAST_COLUMNS = 3  # columns of a table that are always shown, even on a narrow terminal


def begin(*, quiet: bool = False) -> None:
    """Print the library's log messages to the console, warnings in yellow; with `quiet`, only warnings."""
    console.quiet = quiet
    logger = logging.getLogger("pipeline")
    logger.handlers[:] = [_ConsoleHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _ConsoleHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        if warning and record.getMessage() in self._said:  # each warning is printed once
            return
        self._said.add(record.getMessage())
        if warning:
            warn(f"notice: {record.getMessage()}")
        else:
            say(record.getMessage())


@contextmanager
def progress(title: str, total: int, unit: str = "images") -> Iterator[Advance]:
    """Show a phase as a bar with rate and remaining time, or without a terminal as a line every ten seconds."""
    with (_bar if _shows_bars() else _lines)(title, total, unit) as advance:
        yield advance


def _shows_bars() -> bool:
    """Return whether bars can be shown: on a terminal, and in a notebook with ipywidgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


@contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Advance]:
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
        task = bar.add_task(_shortened(title), total=total)

        def advance(n: float, /, note: str = "") -> None:
            bar.advance(task, n)
            if note:
                bar.update(task, description=_shortened(f"{title} ({note})"))

        yield advance


def _shortened(title: str) -> str:
    """Return `title`, cut to leave room for numbers, rate, remaining time and some of the bar."""
    most = max(_LEAST_TITLE, console.width - _BESIDE_TITLE)
    return title if len(title) <= most else f"{title[: most - 1]}…"


def _Rate() -> Any:
    from rich.progress import ProgressColumn

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.1f}/s" if speed else "")

    return Rate()


@contextmanager
def _lines(title: str, total: int, unit: str) -> Iterator[Advance]:
    start = last = time.monotonic()
    done, noted = 0.0, ""

    def advance(n: float, /, note: str = "") -> None:
        nonlocal done, last, noted
        done += n
        noted = f" ({note})" if note else noted
        now = time.monotonic()
        if now - last < _LINE_EVERY_S:
            return
        last = now
        rate = max(done, 1) / (now - start)
        left = (total - done) / rate
        told = f"{title}{noted}: {done:,.0f} of {total:,} {unit}, {rate:,.1f}/s, {duration(left)} left"
        console.print(told, markup=False)

    yield advance


def table(rows: Iterable[Sequence[object]], headers: Sequence[str]) -> None:
    """Print rows under headers. Cells are never cut, so that names can be copied.

    On a terminal that is too narrow, the last columns are left out, and a line names them; put the most important
    columns first. Without rows nothing is printed.
    """
    lines = [list(headers), *([_text(cell) for cell in row] for row in rows)]
    if len(lines) == 1:
        return
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    shown = _columns_that_fit(widths) if console.is_terminal else len(widths)
    for line in lines:
        cells = zip(line[:shown], widths[:shown], strict=True)
        say("  ".join(itertools.starmap(padded, cells)).rstrip())
    if shown < len(widths):
        say(f"(too narrow here for: {', '.join(headers[shown:])}; --json tells all)", "dim")


def insert_column(rows: list[list[object]], headers: list[str], at: int, header: str, values: Sequence[object]) -> None:
    """Insert a column before column `at` of a table, unless all its values are equal."""
    if len(set(values)) > 1:
        headers.insert(at, header)
        for row, value in zip(rows, values, strict=True):
            row.insert(at, value)


def _columns_that_fit(widths: Sequence[int]) -> int:
    shown = len(widths)
    while shown > _LEAST_COLUMNS and sum(widths[:shown]) + 2 * (shown - 1) > console.width:
        shown -= 1
    return shown


def pairs(values: Mapping[str, object]) -> None:
    """Print each name with its value on a line."""
    columns = max(map(width, values), default=0)
    for name, value in values.items():
        say(f"{padded(name, columns)}  {_text(value)}")


def width(text: str) -> int:
    """Return how many terminal columns `text` takes when printed by `say`.

    Characters of some scripts take two columns; unprintable characters are escaped, and take more.
    """
    return cell_len(_spelt_out(text))


def padded(text: str, columns: int) -> str:
    """Return `text` padded with spaces to `columns` terminal columns; longer text is returned unchanged."""
    return text + " " * (columns - width(text))


def say(text: str, style: str | None = None) -> None:
    """Print one line. Unprintable characters, such as line breaks in file names, are escaped."""
    console.print(_spelt_out(text), style=style, markup=False)


def warn(text: str) -> None:
    """Print one line in yellow, also if `begin` was called with `quiet`."""
    shown = Console(stderr=True, highlight=False, soft_wrap=True) if console.quiet else console
    shown.print(_spelt_out(text), style="yellow", markup=False)


def _spelt_out(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def age(moment: str | None) -> str:
    """Return how long ago an ISO 8601 time was, as "3 days ago"; "" for None or an invalid time."""
    from datetime import UTC, datetime

    try:
        then = datetime.fromisoformat(moment or "")
    except ValueError:
        return ""
    seconds = (datetime.now(UTC) - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:,.0f} {unit} ago"
    return "just now" if seconds < 60 else "a minute ago"


def interval(ends: Sequence[float]) -> str:
    """Return the two ends of an interval of probabilities as "0.912 … 0.947"."""
    return " … ".join(f"{end:.3f}" for end in ends)


def emit_json(value: Mapping[str, Any]) -> None:
    """Print the JSON object of a command to stdout."""
    json.dump(value, sys.stdout, ensure_ascii=True, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.4g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else _spelt_out(str(cell))
