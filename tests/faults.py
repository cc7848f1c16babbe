"""Icebox with something wrong under it: the Nth file-system call of the cache fails, or the process dies just before.

As a program, for deaths: python tests/faults.py N ARGUMENT…  runs `cli.py ARGUMENT…` and kills it at call N. What
it prints on its last line otherwise is how many calls there were.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.cache import storage

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
    storage.watcher = watcher
    try:
        yield watcher
    finally:
        storage.watcher = None


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


def die(call: str, path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def call_and_die(number: int, within: tuple[Path, ...], arguments: list[str]) -> None:
    """Run `cli.py` with these arguments in a process made for it, and kill it at a call within these folders."""
    import cli

    with watched(Watcher(number, die, within=within)):
        sys.exit(cli.main(arguments))


def main() -> int:
    import cli

    with watched(Watcher(int(sys.argv[1]), die)) as watcher:
        code = cli.main(sys.argv[2:])
    print(len(watcher.calls))
    return code


if __name__ == "__main__":
    sys.exit(main())
