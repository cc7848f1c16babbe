"""Who an image is: the sha256 of its bytes, remembered as long as its file has not been touched."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from pipeline.cache.index import FileStamp, Index
from pipeline.cache.keys import Keys
from pipeline.dataset import Dataset
from pipeline.errors import CacheError

# A file touched less than this before it was hashed may be touched again within the clock's grain and look
# the same. Two seconds is the coarsest grain in use (FAT).
_GRAIN_NS = 2_000_000_000
_NO_STAMP = FileStamp(-1, -1, -1, -1)  # agrees with no file, so that it is hashed again
_BLOCK = 4096  # images looked up, hashed and remembered at a time
_TOGETHER = 64  # of these handed to one thread at most: a task for each file takes longer than a look at it
_THREADS = 16  # a file system far away answers many at once, each slowly


@dataclass(frozen=True)
class Identities:
    """The key of each image: 32 bytes, or None where it is not known.

    `unread` says why an image could not be read; `unseen` are those that nobody has read yet.
    """

    keys: Keys
    unread: dict[int, str]
    unseen: set[int] = field(default_factory=set)


def digest(data: bytes | np.ndarray) -> bytes:
    """Return the key of an image: sha256 of its encoded bytes, or of its raw pixels in C order."""
    return hashlib.sha256(np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data).digest()


def identify(dataset: Dataset, index: Index, advance: Callable[[int], None], *, remember: bool = True) -> Identities:
    """Return the keys of all images of `dataset`, hashing only files whose digest is not remembered.

    `advance(n)` is called after every n images. Without `remember` the index learns nothing.
    """
    found = Identities(Keys.unknown(len(dataset)), {})
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(dataset), _BLOCK):
            block = range(start, min(start + _BLOCK, len(dataset)))
            fresh = _identify_block(dataset, block, index, pool, found)
            if remember:
                index.remember_digests(fresh)
            advance(len(block))
    return found


def _identify_block(
    dataset: Dataset, block: range, index: Index, pool: ThreadPoolExecutor, found: Identities
) -> dict[Path, tuple[FileStamp, bytes]]:
    """Find the keys of some images; return the digests worth remembering."""
    paths = [dataset.path(i) for i in block]
    if paths[0] is None:
        for i in block:
            found.keys[i] = digest(dataset.read(i))
        return {}
    files = [path.absolute() for path in paths if path is not None]
    known = index.file_digests(files)
    together = min(_TOGETHER, -(-len(files) // _THREADS))
    parts = [slice(start, start + together) for start in range(0, len(files), together)]
    results = chain.from_iterable(pool.map(lambda part: list(map(_identify_file, files[part], known[part])), parts))
    fresh: dict[Path, tuple[FileStamp, bytes]] = {}
    for i, path, result in zip(block, files, results, strict=True):
        if isinstance(result, str):
            found.unread[i] = result
            continue
        stamp, key, remember = result
        found.keys[i] = key
        if remember:
            fresh[path] = (stamp, key)
    return fresh


def _identify_file(path: Path, known: tuple[FileStamp, bytes] | None) -> tuple[FileStamp, bytes, bool] | str:
    """Return (stamp, key, whether to remember it), or why the file cannot be read."""
    try:
        found = path.stat()
        stamp = _stamp(found)
        if known is not None and known[0] == stamp:
            return stamp, known[1], False
        if not stat.S_ISREG(found.st_mode):
            return "cannot be read: not a regular file"  # a pipe would be waited for, a device read for ever
        now = time.time_ns()
        with path.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").digest()
        settled = now - max(stamp.mtime, stamp.ctime) > _GRAIN_NS and file_stamp(path) == stamp
    except OSError as error:
        return unreadable(error)
    return stamp, key, settled


def file_stamp(path: Path) -> FileStamp:
    """Return what `path` looks like now."""
    return _stamp(path.stat())


def _stamp(found: os.stat_result) -> FileStamp:
    return FileStamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino % 2**63)  # SQLite's largest


def unreadable(error: OSError) -> str:
    """Return the reason to list for a file that could not be read; such a failure is never remembered."""
    return f"cannot be read: {error.strerror or error}"


def remembered_digest(path: Path, index: Index) -> bytes:
    """Return the sha256 of the file `path`, hashing it only if it changed since it was last asked for.

    Where it was seen is remembered even if its digest may not be trusted yet: `Index.files_with_digest` finds it.
    """
    path = path.absolute()
    known = index.file_digests([path])[0]
    result = _identify_file(path, known)
    if isinstance(result, str):
        raise CacheError(f"{path} {result}")
    stamp, key, remember = result
    if known is None or known != (stamp, key):
        index.remember_digests({path: (stamp if remember else _NO_STAMP, key)})
    return key
