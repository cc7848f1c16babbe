"""The few file-system calls the cache and the runs make, in one place.

A file appears under its final name only when it is whole and on the disk: written beside it under a
temporary name, fsynced, renamed, and the directory fsynced after.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

PARTIAL_PREFIX = ".partial-"


def partial_name(directory: Path, suffix: str = "") -> Path:
    """Return a name in `directory` that nobody else uses; readers skip names with this prefix."""
    return directory / f"{PARTIAL_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}{suffix}"


def publish(partial: Path, final: Path) -> None:
    """Make the closed file `partial` durable and give it its final name, replacing any file there."""
    fsync(partial)
    partial.replace(final)
    fsync(final.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` such that a reader sees all of it or nothing of it."""
    partial = partial_name(path.parent)
    try:
        partial.write_bytes(data)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file's or a directory's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Return the bytes a user may still write on the file system that holds `path` or will hold it."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def remove_partials(directory: Path) -> None:
    """Remove what killed writers left behind. Only the holder of the space's lock may call this."""
    for leftover in directory.glob(f"{PARTIAL_PREFIX}*"):
        leftover.unlink(missing_ok=True)
