"""All file-system calls of the cache and of the runs, in one module: atomic writes, reads, listings, removals.

A file gets its final name only when it is complete and on the disk. It is written to the same folder under a
temporary name, fsynced and renamed, and then the folder is fsynced.

HDF5 and SQLite make system calls themselves, so code that uses them calls `about_to` first. A test that sets
`watcher` thus sees every step, and can make it fail or kill the process just before it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.core.errors import CacheError, RunError

_BLOCK = 2**20  # bytes read or written at a time, so that a full disk is noticed between two blocks
MOST_JSON_BYTES = 2**28  # largest size of a JSON file with lists of images or classes, written or read
PARTIAL_PREFIX = ".partial-"

# Called before each file-system call, with the kind of call and its path. An exception from it stops the call.
watcher: Callable[[str, Path], None] | None = None


def about_to(call: str, path: Path) -> None:
    """Announce a file-system call to `watcher`. Callers of HDF5 and SQLite must do so too."""
    if watcher is not None:
        watcher(call, path)


def partial_name(directory: Path, suffix: str = "") -> Path:
    """Return a unique temporary path in `directory`; readers skip names with the prefix `PARTIAL_PREFIX`."""
    return directory / f"{PARTIAL_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}{suffix}"


def make_folder(path: Path) -> None:
    """Create the folder `path` and its missing parents. Raises CacheError if a file is in the way."""
    about_to("make folder", path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CacheError(f"a file stands where the folder {path} should be; move it away") from error


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a new file, which must not exist; it is not durable before `publish`."""
    about_to("create", path)
    with path.open("xb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            about_to("write", path)
            rest = rest[file.write(rest[:_BLOCK]) :]


def make_file(path: Path) -> None:
    """Create an empty file with the permissions of the umask, unless the file exists."""
    about_to("create", path)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))


def require_writable(directory: Path) -> None:
    """Raise CacheError unless files can be created in `directory`. Call this before computing results for it."""
    probe = partial_name(directory)
    try:
        write_file(probe, b"")
    except OSError as error:
        raise CacheError(
            f"nothing can be written to {directory} ({error.strerror or error}), so nothing is computed; see its "
            "permissions, and the room on its disk"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Make the closed file `partial` durable and rename it to `final`, replacing any file there."""
    fsync(partial)
    about_to("rename", final)
    partial.replace(final)
    fsync(final.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: a reader sees the complete file or none."""
    partial = partial_name(path.parent)
    try:
        write_file(partial, data)
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, most: int = MOST_JSON_BYTES) -> None:
    """Write `value` as indented JSON, atomically. Raises RunError if the text has more than `most` bytes."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    content = text.encode("utf-8", "backslashreplace")  # undecodable bytes in file names become JSON's \udcXX
    if len(content) > most:
        raise RunError(f"{path.name} would have {len(content):,} bytes; {most:,} are read at most")
    write_whole(path, content)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; on leaving without an error the file is made durable and replaces `path`."""
    partial = partial_name(path.parent)
    about_to("create", partial)
    try:
        with partial.open("xb") as file:
            yield file
            about_to("write", partial)
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_small(path: Path, most: int) -> bytes:
    """Return the content of a file of at most `most` bytes. Raises OSError if it is larger or cannot be read."""
    about_to("read", path)
    with open_regular(path, os.O_RDONLY) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"larger than {most:,} bytes")
    return data


def try_to_read(path: Path) -> None:
    """Read one byte of a file. Raises OSError if it cannot be read."""
    with open_regular(path, os.O_RDONLY) as file:
        file.read(1)


def open_regular(path: Path, flags: int) -> BinaryIO:
    """Open a regular file, unbuffered, with the `flags` of `os.open`. Raises OSError for pipes, devices and folders."""
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "r+b" if flags & os.O_RDWR else "rb", buffering=0)


def exists(path: Path) -> bool:
    """Return whether `path` exists. A broken link counts as existing, and so does a path without permission."""
    about_to("look", path)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        return True
    return True


def size(path: Path) -> int:
    """Return the size of a file in bytes."""
    about_to("look", path)
    return path.stat().st_size


def fsync(path: Path) -> None:
    """Flush a file's or a directory's content to the disk."""
    about_to("sync", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    about_to("hash", path)
    with open_regular(path, os.O_RDONLY) as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def list_files(directory: Path) -> dict[str, os.stat_result]:
    """Return name → stat of the regular files in `directory`; empty if there is no such folder."""
    about_to("list", directory)
    try:
        with os.scandir(directory) as entries:
            found = list(entries)
    except FileNotFoundError:
        return {}
    except NotADirectoryError as error:
        raise CacheError(f"a file stands where the folder {directory} should be; move it away") from error
    stats = {entry.name: _stat(entry) for entry in found}
    return {name: found for name, found in stats.items() if found is not None and stat.S_ISREG(found.st_mode)}


def list_entries(directory: Path) -> set[str]:
    """Return the names of all entries of `directory`, of any type; empty if there is no such folder."""
    about_to("list", directory)
    try:
        return {path.name for path in directory.iterdir()}
    except FileNotFoundError:
        return set()


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except FileNotFoundError:  # the entry was removed meanwhile, or is a broken link
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that leads to itself
            return None
        raise


def list_folders(directory: Path) -> list[str]:
    """Return the names of the folders in `directory`, sorted; empty if there is no such folder."""
    about_to("list", directory)
    try:
        with os.scandir(directory) as entries:
            stats = {entry.name: _stat(entry) for entry in entries}
    except FileNotFoundError:
        return []
    return sorted(name for name, found in stats.items() if found is not None and stat.S_ISDIR(found.st_mode))


def remove(path: Path) -> None:
    """Remove a file, if it exists."""
    about_to("remove", path)
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content."""
    about_to("remove", path)
    shutil.rmtree(path)


def move(path: Path, target: Path) -> None:
    """Rename a file on the same file system, durably."""
    about_to("rename", target)
    path.rename(target)
    fsync(target.parent)


def free_bytes(path: Path) -> int:
    """Return the free bytes on the file system of `path`, which need not exist yet."""
    about_to("look", path)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def is_partial(name: str) -> bool:
    """Return whether `name` is that of an unfinished file, which a process is writing or left when it was killed."""
    return name.startswith(PARTIAL_PREFIX)


def remove_partials(directory: Path) -> int:
    """Remove the unfinished files of killed writers; return their bytes. Call this only while holding the lock."""
    leftovers = {name: stat for name, stat in list_files(directory).items() if is_partial(name)}
    for name in leftovers:
        remove(directory / name)
    return sum(found.st_size for found in leftovers.values())
