"""Advisory file locks (`flock`), which the system releases when their process ends.

A feature space has a lock for its one writer, and a lock that readers share and that `gc` takes alone to remove shards.
A run or a sweep that is being computed has its folder locked; an unfinished folder without a lock is abandoned.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.core import files
from pipeline.core.errors import CacheError


def without_locks() -> bool:
    """Return whether locks are switched off by ICEBOX_LOCKS=off, for file systems without locks."""
    return os.environ.get("ICEBOX_LOCKS", "").lower() in ("off", "0", "no", "false")


def spare_hdf5() -> None:
    """Switch off HDF5's own file locks, also for Keras, if `without_locks()`. Call this before HDF5 is loaded."""
    if without_locks():
        os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"


@contextmanager
def exclusive(path: Path, on_wait: Callable[[str], None], *, needed: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; if another process holds it, call `on_wait(holder)` once and wait.

    The system releases the lock when its process ends, even by a crash, so no lock is left behind. If
    `without_locks()`, nothing is locked: processes that only add rows do not harm each other. Code that removes
    files passes `needed`.

    Raises
    ------
    CacheError
        If the lock file cannot be written, the file system has no locks, or `needed` and `without_locks()`.
    """
    if without_locks():
        if needed:
            raise CacheError(f"{path.parent}: what removes or replaces files needs locks; unset ICEBOX_LOCKS")
        yield
        return
    files.about_to("lock", path)
    try:
        # Links are refused: a feature space copied from an untrusted source could make Icebox write to another file.
        file = files.open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        raise CacheError(f"{path} cannot be written ({error.strerror or error}), so nothing is added") from error
    handle, waited = file.fileno(), True
    try:
        try:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                waited = False
            if waited:
                on_wait(os.pread(handle, 1000, 0).decode(errors="replace").strip() or "another process")
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise _no_locks(path.parent, error) from error
        with suppress(OSError):  # the holder's name is only for messages; a full disk must not stop `gc`
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        file.close()


def hold_alone(file: BinaryIO, path: Path) -> None:
    """Lock an open file until it is closed; do nothing if `without_locks()`.

    Raises
    ------
    BlockingIOError
        If another process holds the lock.
    CacheError
        If the file system has no locks.
    """
    if without_locks():
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise _no_locks(path.parent, error) from error


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock file `path` together with other readers, after waiting for a process that holds it alone.

    If the folder cannot be written, nothing is locked: no process can remove files from it either.
    """
    if without_locks():
        yield
        return
    files.about_to("lock", path)
    try:
        file = files.open_regular(path, os.O_RDONLY | os.O_CREAT)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOSPC):
            raise CacheError(f"{path} cannot be opened ({error.strerror or error})") from error
        yield
        return
    try:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        except OSError as error:
            raise _no_locks(path.parent, error) from error
        yield
    finally:
        file.close()


@contextmanager
def new_folder_held(folder: Path) -> Iterator[None]:
    """Create `folder` and lock it, which marks it as in use, if the file system has locks for folders.

    Raises
    ------
    FileExistsError
        If a file or folder of that name exists.
    """
    with _alone_in(folder.parent):  # in one step, as other processes take a folder without a lock for abandoned
        files.about_to("make folder", folder)
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # NFS has no locks for folders: `find_abandoned` returns False there
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def held_if_abandoned(folder: Path) -> Iterator[bool]:
    """Lock `folder` unless another process works on it; yield whether it is locked, False if it does not exist.

    If `without_locks()`, nothing is locked, and the value is True for every existing folder.

    Raises
    ------
    CacheError
        If the file system has no locks for folders.
    """
    with ExitStack() as stack:
        with _alone_in(folder.parent):
            held = _is_free(folder, stack)
        yield held


def find_abandoned(folder: Path) -> bool:
    """Return whether no process works on `folder` any more; False if the file system has no locks for folders."""
    with _alone_in(folder.parent), ExitStack() as stack, suppress(CacheError):
        return _is_free(folder, stack)
    return False


def remove_abandoned(folder: Path) -> bool:
    """Remove a folder if no process works on it; return whether it was removed, False also if there are no locks."""
    if without_locks() or not find_abandoned(folder):
        return False
    with held_if_abandoned(folder) as held:
        if held:
            files.remove_folder(folder)
        return held


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock `folder` for a moment, to be the only process that creates, resumes or examines a run or sweep in it.

    Examining a lock means taking it for a moment. Without this outer lock, that could make the owner fail to lock
    its own folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # without locks for folders, no folder counts as abandoned
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_free(folder: Path, stack: ExitStack) -> bool:
    """Lock `folder` until `stack` is closed; return whether that was possible. Raises CacheError."""
    if without_locks():
        return folder.is_dir()
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # the folder was published or removed meanwhile, or belongs to another user
        return False
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _no_locks(folder, error) from error
    return folder.is_dir()  # the owner may have published the folder between opening and locking


_LOCKLESS = {
    errno.ENOLCK: "its server's lock service does not answer",
    errno.ENOSYS: "it is mounted without locks",
    errno.EOPNOTSUPP: "it is mounted without locks",
    524: "it is mounted without locks",  # ENOTSUPP of the Linux kernel, which Python's errno does not list
    errno.EIO: "its server does not answer",
}


def _no_locks(folder: Path, error: OSError) -> CacheError:
    name = errno.errorcode.get(error.errno or 0, str(error))
    why = f"{_LOCKLESS[error.errno]}, {name}" if error.errno in _LOCKLESS else name
    return CacheError(
        f"{folder} cannot be locked ({why}); mount its file system with locks (Lustre: -o flock; NFS: lockd), put "
        "the cache elsewhere by --data-dir, or set ICEBOX_LOCKS=off on every machine, after which only `gc` and "
        "`verify --repair` refuse to work"
    )
