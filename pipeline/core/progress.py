"""Interfaces to report the progress of long work, so that library code need not print.

A stage opens a phase by `Progress`, and reports its steps by `Advance`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Function that reports `n` more completed steps; a negative `n` takes steps back.

    A `note` is shown beside the phase's title from then on.
    """

    def __call__(self, n: float, /, note: str = "") -> None:
        """Report `n` steps."""
        ...


class Progress(Protocol):
    """Function that opens a phase of `total` steps; its context manager yields the phase's `Advance`."""

    def __call__(self, title: str, total: int, unit: str = "images") -> AbstractContextManager[Advance]:
        """Return a context manager that opens the phase, and ends it on leaving."""
        ...


@contextmanager
def silent(title: str, total: int, unit: str = "images") -> Iterator[Advance]:
    """Report nothing."""
    yield lambda n, note="": None
