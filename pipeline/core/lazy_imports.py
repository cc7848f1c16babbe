"""Import large libraries without their optional dependencies, and explain why a library cannot be loaded."""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Hide the packages `names` from imports in this thread, as if they were not installed.

    Use this for libraries to which these packages are optional. Modules that are imported already stay visible, and
    other threads are not affected.
    """
    finder = _Hiding(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def import_matplotlib() -> Any:
    """Return the module matplotlib, imported even if MPLBACKEND names a backend that is not installed.

    In the shell of a notebook, MPLBACKEND often does so. The backend is set afterwards, as matplotlib itself does,
    for other code in this process that draws with it.
    """
    is_first = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if is_first and backend:
        with suppress(ValueError):  # matplotlib's error for a backend that is not installed
            matplotlib.rcParams["backend"] = backend
    return matplotlib


class _Hiding:
    """Import hook that hides the given modules from the thread that created it."""

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._thread = names, threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Return None, so that the next finder is asked. Raises ModuleNotFoundError for a hidden module."""
        if name in self._names and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


_OURS = {"pipeline", "cli", "__main__"}
_UNIX = {"fcntl", "resource"}  # modules of the standard library that exist on Unix only
_SYSTEM_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
# The system packages with the libraries that OpenCV's wheels need.
_PACKAGES = {"cv2": " (Debian, Ubuntu: apt install libgl1 libglib2.0-0; Fedora: dnf install mesa-libGL glib2)"}


def failed_import(error: Exception) -> str | None:
    """Return why a library cannot be loaded on this machine, and what to do; None if `error` has another cause."""
    library = _being_imported(error)
    if library is None or library in _OURS:
        return None
    if library in _UNIX:
        return f"this system has no {library}, which Icebox needs: it runs on Linux and macOS, and on Windows in WSL"
    if isinstance(error, ModuleNotFoundError) and error.name == library:
        return f"the package {library} is not installed; install Icebox's packages anew, by make setup or by pip"
    reason = _reason(error)
    lacking = _SYSTEM_LIBRARY.search(reason)
    install = f"install {lacking[1]}{_PACKAGES.get(library, '')}, or the package anew" if lacking else None
    return f"{library} cannot be loaded on this machine ({reason}); {install or 'install the package anew'}"


def _being_imported(error: Exception) -> str | None:
    """Return the library that was being imported when `error` was raised; None if none was."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>")
    libraries = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    named = error.name.partition(".")[0] if isinstance(error, ImportError) and error.name else None
    return next((library for library in reversed(libraries) if library not in _OURS), named)


def _reason(error: BaseException) -> str:
    """Return the most informative line of an error: some libraries add whole tracebacks and long advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = [match[1] for line in lines if (match := re.fullmatch(r"\w*Error: (.+)", line))]
    return f"{[*told, ' '.join(lines)][0]:.200}"
