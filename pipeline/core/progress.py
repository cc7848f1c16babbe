"""How long work is reported without the library printing: a stage opens a phase and says how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Says that `n` more steps are done, or undone if n < 0; `note` is shown beside the phase's title from then on."""

    def __call__(self, n: float, /, note: str = "") -> None:
        """Note the steps."""
        ...


class Progress(Protocol):
    """Opens a phase of `total` steps and gives the function that advances it."""

    def __call__(self, title: str, total: int, unit: str = "images") -> AbstractContextManager[Advance]:
        """Open a phase; on leaving the context it ends."""
        ...


@contextmanager
def silent(title: str, total: int, unit: str = "images") -> Iterator[Advance]:
    """Report nothing."""
    yield lambda n, note="": None
