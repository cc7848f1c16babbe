"""Advisory locks on a feature space that die with their holder: one writer; many readers, or one who removes."""

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
    """Return whether a person said that the cache lies where there are no locks: ICEBOX_LOCKS=off."""
    return os.environ.get("ICEBOX_LOCKS", "").lower() in ("off", "0", "no", "false")


def spare_hdf5() -> None:
    """Have HDF5, Keras' included, lock no file where locks are `done_without`. It looks once, while it is loaded."""
    if without_locks():
        os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"


@contextmanager
def exclusive(path: Path, on_wait: Callable[[str], None], *, needed: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; if another holds it, call `on_wait(holder)` once and wait.

    The system gives the lock up when its holder ends, however it ends, so none is ever left behind. Where locks are
    `done_without`, nothing is held: who only adds rows does no harm then. Who removes files has the lock `needed`.

    Raises
    ------
    CacheError
        If the lock file cannot be written, the file system has no locks, or one is needed and done without.
    """
    if without_locks():
        if needed:
            raise CacheError(f"{path.parent}: what removes or replaces files needs locks; unset ICEBOX_LOCKS")
        yield
        return
    files.about_to("lock", path)
    try:
        # Not through a link: a space from somebody else must not have another file written to.
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
        with suppress(OSError):  # the name is for people who wait; a full disk must not keep `gc` from making room
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        file.close()


def hold_alone(file: BinaryIO, path: Path) -> None:
    """Hold an open file until it is closed, unless locks are `done_without`.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    CacheError
        If its file system has no locks.
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
    """Hold the lock file `path` together with other readers, waiting for whoever holds it alone.

    Where the folder cannot be written nobody removes anything either, so there it is done without.
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
    """Make `folder` and hold it as being worked on, as far as its file system has locks for folders.

    Raises
    ------
    FileExistsError
        If something of that name is there.
    """
    with _alone_in(folder.parent):  # made and held in one: in between, another process would find it abandoned
        files.about_to("make folder", folder)
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # NFS has no locks for folders: `abandoned` then says no, and the folder is left alone
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def held_if_abandoned(folder: Path) -> Iterator[bool]:
    """Hold `folder` as being worked on, if nobody does; give whether it is held. A folder that is gone is not.

    Where locks are `done_without`, nothing is held, and whoever asks for the folder has it.

    Raises
    ------
    CacheError
        If its file system has no locks for folders.
    """
    with ExitStack() as stack:
        with _alone_in(folder.parent):
            held = _is_free(folder, stack)
        yield held


def find_abandoned(folder: Path) -> bool:
    """Return whether nobody works on `folder` any more; False where its file system has no locks to tell by."""
    with _alone_in(folder.parent), ExitStack() as stack, suppress(CacheError):
        return _is_free(folder, stack)
    return False


def remove_abandoned(folder: Path) -> bool:
    """Remove a folder unless somebody works on it, or there are no locks to tell by; return whether it was removed."""
    if without_locks() or not find_abandoned(folder):
        return False
    with held_if_abandoned(folder) as held:
        if held:
            files.remove_folder(folder)
        return held


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Be the only process that begins, takes up or looks at work in `folder`; others wait for the instant it takes.

    Without it, a look at a lock, which is to take it for a moment, would keep the owner of the work from locking it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # where folders have no locks, none is found abandoned
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_free(folder: Path, stack: ExitStack) -> bool:
    """Return whether `folder` could be locked; the lock is held until `stack` is closed. Raises CacheError."""
    if without_locks():
        return folder.is_dir()
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # published or removed meanwhile, or another user's
        return False
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _no_locks(folder, error) from error
    return folder.is_dir()  # its owner may have published it between opening and locking


_LOCKLESS = {
    errno.ENOLCK: "its server's lock service does not answer",
    errno.ENOSYS: "it is mounted without locks",
    errno.EOPNOTSUPP: "it is mounted without locks",
    524: "it is mounted without locks",  # ENOTSUPP, the kernel's own, which has no name outside
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
