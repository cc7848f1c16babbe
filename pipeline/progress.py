"""How long work is reported without the library printing: a stage opens a phase and says how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Opens a phase of `total` steps and gives the function that advances it."""

    def __call__(self, title: str, total: int, unit: str = "images") -> AbstractContextManager[Callable[[float], None]]:
        """Open a phase; on leaving the context it ends."""
        ...


@contextmanager
def silent(title: str, total: int, unit: str = "images") -> Iterator[Callable[[float], None]]:
    """Report nothing."""
    yield lambda n: None
