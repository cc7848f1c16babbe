"""What people read: notices, progress with time left, and short tables, all on stderr."""

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

_LINE_EVERY_S = 10.0  # without a terminal a line now and then stands in for the bar
_LEAST_TITLE, _BESIDE_TITLE = 16, 44  # characters
_LEAST_COLUMNS = 3  # of a table, however narrow the terminal


def begin(*, quiet: bool = False) -> None:
    """Let the library's notices reach the console, warnings standing out; if `quiet`, nothing but warnings."""
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
        if warning and record.getMessage() in self._said:  # met again on the way; once is enough
            return
        self._said.add(record.getMessage())
        if warning:
            warn(f"notice: {record.getMessage()}")
        else:
            say(record.getMessage())


@contextmanager
def progress(title: str, total: int, unit: str = "images") -> Iterator[Advance]:
    """Show a phase as a bar with rate and time left; where there can be none, as a line every ten seconds."""
    with (_bar if _shows_bars() else _lines)(title, total, unit) as advance:
        yield advance


def _shows_bars() -> bool:
    """Return whether bars can be shown: on a terminal, and in a notebook that has widgets."""
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
    """Return a bar's title such that numbers, rate and time left have room beside it, and a little of the bar."""
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
    """Print rows under headers, names whole so that they can be copied.

    On a terminal that is too narrow the last columns are left out, which is said; those that tell most stand first.
    Without rows nothing is printed.
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
    """Put a column in front of column `at` of a table, unless all its values are the same."""
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
    """Print names and values, a line each."""
    columns = max(map(width, values), default=0)
    for name, value in values.items():
        say(f"{padded(name, columns)}  {_text(value)}")


def width(text: str) -> int:
    """Return how many columns `say` prints it in: letters of some scripts take two, what is spelt out takes more."""
    return cell_len(_spelt_out(text))


def padded(text: str, columns: int) -> str:
    """Return text that is printed in so many columns, if it does not take more."""
    return text + " " * (columns - width(text))


def say(text: str, style: str | None = None) -> None:
    """Print one line; what a file's name may hold beside letters, line breaks and escapes, is spelt out."""
    console.print(_spelt_out(text), style=style, markup=False)


def warn(text: str) -> None:
    """Print one line that stands out, even where the rest is kept quiet."""
    shown = Console(stderr=True, highlight=False, soft_wrap=True) if console.quiet else console
    shown.print(_spelt_out(text), style="yellow", markup=False)


def _spelt_out(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def age(moment: str | None) -> str:
    """Return how long ago an ISO 8601 time was, as people say it; "" for none or one that cannot be read."""
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
    """Return the ends of an interval of probabilities, in one cell."""
    return " … ".join(f"{end:.3f}" for end in ends)


def emit_json(value: Mapping[str, Any]) -> None:
    """Print the one JSON object of a command to stdout."""
    json.dump(value, sys.stdout, ensure_ascii=True, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.4g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else _spelt_out(str(cell))
