"""One writer a feature space: an advisory lock that dies with its holder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import CacheError


@contextmanager
def exclusive(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`; if another holds it, call `on_wait(holder)` once and wait.

    The system gives the lock up when its holder ends, however it ends, so none is ever left behind.

    Raises
    ------
    CacheError
        If the lock file cannot be written, or the file system has no locks.
    """
    try:
        file = path.open("a+")
    except OSError as error:
        raise CacheError(f"{path.parent} cannot be written ({error.strerror or error}), so nothing is added") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            on_wait(file.read().strip() or "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            reason = errno.errorcode.get(error.errno or 0, str(error))
            raise CacheError(
                f"{path.parent} cannot be locked ({reason}); put the cache on a disk with locks"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
