"""Imports of large libraries without the further ones they would take along for other programs."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Hide packages from what this thread imports meanwhile, as if they were not installed.

    For libraries that do without them. What is imported already stays in sight, and other threads notice nothing.
    """
    finder = _Hiding(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def import_matplotlib() -> Any:
    """Import matplotlib, which refuses to be imported where MPLBACKEND names a backend that is not installed.

    Every notebook's shell has that. The backend is set as matplotlib itself sets it, for programs that draw on it too.
    """
    is_first = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if is_first and backend:
        with suppress(ValueError):  # how matplotlib says that it does not have it
            matplotlib.rcParams["backend"] = backend
    return matplotlib


class _Hiding:
    """A finder of modules that finds no others than those behind it do, and says of some that they do not exist."""

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._thread = names, threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Leave it to the next finder. Raises ModuleNotFoundError for what is hidden."""
        if name in self._names and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
