"""Icebox with something wrong under it: the Nth file-system call of the cache fails, or the process dies just before.

As a program it is `cli.py` that sends itself a signal at such a call; `signalled` starts it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import files

if TYPE_CHECKING:
    from conftest import Finished

INDEX_CALLS = {"open index", "make index", "query", "commit"}  # SQLite's, which tells of failures in its own way
WRITES = {"make folder", "create", "write", "sync", "rename", "make index", "commit", "lock"}


@dataclass
class Watcher:
    """Counts calls, and does something at the one numbered `at`, or from there on; the first is number 1."""

    at: int = 0
    act: Callable[[str, Path], None] = lambda call, path: None
    for_good: bool = False
    among: frozenset[str] = frozenset()  # kinds of calls that count; empty: all
    within: tuple[Path, ...] = ()  # the folders in which calls count; empty: all
    calls: list[tuple[str, Path]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, call: str, path: Path) -> None:
        if self.among and call not in self.among:
            return
        if self.within and not any(path.is_relative_to(folder) for folder in self.within):
            return
        with self._lock:
            self.calls.append((call, path))
            number = len(self.calls)
        if number == self.at or (self.for_good and number > self.at > 0):
            self.act(call, path)


@contextmanager
def watched(watcher: Watcher) -> Iterator[Watcher]:
    files.watcher = watcher
    try:
        yield watcher
    finally:
        files.watcher = None


def io_error(call: str, path: Path) -> None:
    """Fail as a bad disk does."""
    if call in INDEX_CALLS:
        raise sqlite3.OperationalError("disk I/O error")
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def disk_full(call: str, path: Path) -> None:
    """Fail as a full disk does."""
    if call in INDEX_CALLS:
        raise sqlite3.OperationalError("database or disk is full")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def signalled(
    at: int,
    data: Path,
    *arguments: str | Path,
    number: int = signal.SIGKILL,
    among: Collection[str] = (),
    within: Collection[Path] = (),
) -> Finished:
    """Run `cli.py` in a process that sends itself a signal just before the call numbered `at`, as `Watcher` counts."""
    from conftest import command_line, finished  # not above: the process itself needs none of it

    watch = json.dumps([at, number, list(among), list(map(str, within))])
    return finished([watch, *command_line(data, *arguments)[2:]], program="faults")


def _run_signalled() -> int:
    import cli

    at, number, among, within = json.loads(sys.argv[1])
    with watched(
        Watcher(
            at,
            lambda call, path: os.kill(os.getpid(), number),
            among=frozenset(among),
            within=tuple(map(Path, within)),
        )
    ):
        return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(_run_signalled())
