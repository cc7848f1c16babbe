"""Results that people read as a table: the command line prints it, a notebook shows it as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.api.results import Result, readable

Table = tuple[Sequence[str], Sequence[Sequence[object]]]  # headers, rows


@dataclass(frozen=True)
class TableResult(Result):
    """A result with a table beside its lines."""

    def table(self) -> Table:
        """Return the headers of the table and its rows."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        headers, rows = self.table()
        return super()._repr_html_() + _html_table(headers, rows)


def _html_table(headers: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    return f"<td>{'' if value is None else html.escape(readable('', value))}</td>"
