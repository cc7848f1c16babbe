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

from pipeline.cache.index import FileStamp, Index
from pipeline.cache.keys import Keys
from pipeline.core.errors import CacheError, read_failure
from pipeline.core.hashing import image_key
from pipeline.dataset import Dataset, remote

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

    `unread` says why an image could not be read; `unseen` are those that nobody has read yet, or not since they
    changed, and `twins` is the first of these of an address → the others of it. `fetched` has what is to be
    remembered of addresses that were read: validator and digest.
    """

    keys: Keys
    unread: dict[int, str]
    unseen: set[int] = field(default_factory=set)
    twins: dict[int, list[int]] = field(default_factory=dict)
    fetched: dict[str, tuple[str | None, bytes]] = field(default_factory=dict)

    @property
    def to_read(self) -> list[int]:
        """The unseen images, of each address the first."""
        others = {i for some in self.twins.values() for i in some}
        return sorted(self.unseen - others)

    def remember_fetched(self, index: Index) -> None:
        """Have the index remember what was fetched, and forget it here."""
        index.remember_urls(self.fetched)
        self.fetched.clear()


def identify(
    dataset: Dataset,
    index: Index,
    advance: Callable[[int], None],
    *,
    remember: bool = True,
    read_unseen: bool = True,
    much_to_hash: Callable[[Keys], None] = lambda keys: None,
) -> Identities:
    """Return the keys of all images of `dataset`, hashing only files whose digest is not remembered.

    `advance(n)` is called after every n images; `much_to_hash`, with the keys found just now, when some of thousands of
    files turn out to be new and there are more. Without `remember` the index learns nothing. Without `read_unseen`
    what is behind an address and was never read, or changed since, is not read now either, but noted as unseen.
    """
    remote.forget_fetched()  # of what an earlier plan may have left
    found = Identities(Keys.unknown(len(dataset)), {})
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(dataset), _BLOCK):
            block = range(start, min(start + _BLOCK, len(dataset)))
            fresh = _identify_block(dataset, block, index, pool, found)
            if fresh and block.stop < len(dataset):
                much_to_hash(found.keys[block.start : block.stop])
            _identify_urls(dataset, block, index, found, read_unseen)
            if remember:
                index.remember_digests(fresh)
                found.remember_fetched(index)
            advance(len(block))
    first: dict[str | None, int] = {}
    for i in sorted(found.unseen):
        if (at := first.setdefault(dataset.url(i), i)) != i:
            found.twins.setdefault(at, []).append(i)
    return found


def _identify_block(
    dataset: Dataset, block: range, index: Index, pool: ThreadPoolExecutor, found: Identities
) -> dict[Path, tuple[FileStamp, bytes]]:
    """Find the keys of some images; return the digests worth remembering."""
    files: dict[int, Path] = {}
    for i in block:
        path = dataset.path(i)
        if path is not None:
            files[i] = path.absolute()
        elif dataset.url(i) is None:
            found.keys[i] = image_key(dataset.read(i))
    paths = list(files.values())
    known = index.file_digests(paths)
    together = max(1, min(_TOGETHER, -(-len(paths) // _THREADS)))
    parts = [slice(start, start + together) for start in range(0, len(paths), together)]
    parted = pool.map(lambda part: list(map(_identify_file, paths[part], known[part])), parts)
    results = _looked_at_again(paths, list(chain.from_iterable(parted)), pool)
    fresh: dict[Path, tuple[FileStamp, bytes]] = {}
    for (i, path), result in zip(files.items(), results, strict=True):
        if isinstance(result, str):
            found.unread[i] = result
            continue
        stamp, key, remember = result
        found.keys[i] = key
        if remember:
            fresh[path] = (stamp, key)
    return fresh


def _identify_urls(dataset: Dataset, block: range, index: Index, found: Identities, read_unseen: bool) -> None:
    """Find the keys of the images among these that are behind addresses."""
    urls = {i: url for i in block if (url := dataset.url(i)) is not None}
    if not urls:
        return
    known = dict(zip(urls, index.url_digests(urls.values()), strict=True))
    with ThreadPoolExecutor(remote.connections()) as pool:
        # Of many images in one archive, the archive is asked for once.
        urls_to_ask = list(dict.fromkeys(remote.fetch_whole(url) for i, url in urls.items() if known[i]))
        said = dict(zip(urls_to_ask, pool.map(_ask, urls_to_ask), strict=True))
        to_read: dict[str, list[int]] = {}
        for i, url in urls.items():
            before, now = known[i], said.get(remote.fetch_whole(url))
            if isinstance(now, OSError):
                found.unread[i] = read_failure(now)
            elif before and now is not None and now == before[0]:
                found.keys[i] = before[1]
            elif read_unseen or (before and now is None):  # it may be what it was
                to_read.setdefault(url, []).append(i)
            else:
                found.unseen.add(i)
        for (url, some), read in zip(to_read.items(), pool.map(_read, to_read), strict=True):
            if isinstance(read, OSError):
                found.unread.update(dict.fromkeys(some, read_failure(read)))
                continue
            found.fetched[url] = read
            for i in some:
                found.keys[i] = read[1]


def read_some(dataset: Dataset, found: Identities) -> None:
    """Read a few of the unseen images if no image is known, so that it can be told which space has their rows.

    What was fetched is held for whoever computes.
    """
    if found.keys.known.any():
        return
    urls = {i: url for i in found.to_read[: remote.connections()] if (url := dataset.url(i)) is not None}
    with ThreadPoolExecutor(remote.connections()) as pool:
        for (i, url), read in zip(urls.items(), pool.map(_fetch, urls.values()), strict=True):
            remote.hold(url, read)
            if isinstance(read, OSError):
                continue
            key = image_key(read.data)
            found.fetched[url] = read.validator, key
            for twin in (i, *found.twins.pop(i, ())):
                found.keys[twin] = key
                found.unseen.discard(twin)


def _ask(url: str) -> str | OSError | None:
    try:
        return remote.validator(url)
    except OSError as error:
        return error


def _fetch(url: str) -> remote.Fetched | OSError:
    try:
        return remote.fetch(url)
    except OSError as error:
        return error


def _read(url: str) -> tuple[str | None, bytes] | OSError:
    """Return validator and digest of what is behind an address, or why it cannot be read."""
    fetched = _fetch(url)
    return fetched if isinstance(fetched, OSError) else (fetched.validator, image_key(fetched.data))


_Identified = tuple[FileStamp, bytes, bool]  # stamp, key, and whether to remember it


def _looked_at_again(
    paths: list[Path], results: list[_Identified | FileStamp | str], pool: ThreadPoolExecutor
) -> list[_Identified | str]:
    """Return the results, the files that were dated in the future being hashed once they have lain still."""
    dated = {at: result for at, result in enumerate(results) if isinstance(result, FileStamp)}
    if dated:
        time.sleep(_GRAIN_NS / 1e9)
    again = dict(zip(dated, pool.map(lambda at: _identify_dated(paths[at], dated[at]), dated), strict=True))
    return [again[at] if isinstance(result, FileStamp) else result for at, result in enumerate(results)]


def _identify_file(path: Path, known: tuple[FileStamp, bytes] | None) -> _Identified | FileStamp | str:
    """Return stamp, key and whether to remember it, or why the file cannot be read.

    Of a file whose ctime lies in the future, as by the clock of a server, return the stamp alone: `_identify_dated`
    goes on with it when the clock's grain has passed.
    """
    try:
        found = path.stat()
        stamp = _stamp(found)
        if known is not None and known[0] == stamp:
            return stamp, known[1], False
        if not stat.S_ISREG(found.st_mode):
            return "cannot be read: not a regular file"  # a pipe would be waited for, a device read for ever
        now = time.time_ns()
        if stamp.ctime > now:
            return stamp
        # Whoever changes the file sets its ctime to the present; an mtime that is yet to come says nothing of that.
        touched = stamp.ctime if stamp.mtime > now else max(stamp.mtime, stamp.ctime)
        return _hashed(path, stamp, now - touched > _GRAIN_NS)
    except OSError as error:
        return read_failure(error)


def _identify_dated(path: Path, before: FileStamp) -> _Identified | str:
    """Return the same of a file that looked like `before` a grain of the clock ago."""
    try:
        stamp = file_stamp(path)
        return _hashed(path, stamp, stamp == before)
    except OSError as error:
        return read_failure(error)


def _hashed(path: Path, stamp: FileStamp, lay_still: bool) -> _Identified:
    with path.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").digest()
    return stamp, key, lay_still and file_stamp(path) == stamp


def file_stamp(path: Path) -> FileStamp:
    """Return what `path` looks like now."""
    return _stamp(path.stat())


def _stamp(found: os.stat_result) -> FileStamp:
    return FileStamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino % 2**63)  # SQLite's largest


def remembered_digest(path: Path, index: Index) -> bytes:
    """Return the sha256 of the file `path`, hashing it only if it changed since it was last asked for.

    Where it was seen is remembered even if its digest may not be trusted yet: `Index.files_with_digest` finds it.
    """
    path = path.absolute()
    known = index.file_digests([path])[0]
    result = _identify_file(path, known)
    if isinstance(result, FileStamp):
        time.sleep(_GRAIN_NS / 1e9)
        result = _identify_dated(path, result)
    if isinstance(result, str):
        raise CacheError(f"{path} {result}")
    stamp, key, remember = result
    if known is None or known != (stamp, key):
        index.remember_digests({path: (stamp if remember else _NO_STAMP, key)})
    return key
