"""The key of each image of a dataset: the sha256 of its bytes, remembered in the index while its file is unchanged.

`identify` finds the keys of all images of a dataset, `remembered_digest` the sha256 of one file.
"""

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

# Resolution of file times in nanoseconds; the coarsest in use is 2 s (FAT). A file changed less than this before it
# was hashed may change again and keep the same times, so its digest is not remembered.
_GRAIN_NS = 2_000_000_000
_NO_STAMP = FileStamp(-1, -1, -1, -1)  # matches no file, so that the file is hashed again
_BLOCK = 4096  # images looked up, hashed and remembered at a time
_TOGETHER = 64  # files per thread task, at most: starting a task takes longer than one `stat` call
_THREADS = 16  # network file systems are slow per request, but serve many requests at once


@dataclass(frozen=True)
class Identities:
    """The key of each image: 32 bytes, or None where it is not known.

    `unread` maps images that cannot be read to the reason. `unseen` are images at URLs that were never read, or
    not since they changed. Of unseen images with the same URL, `twins` maps the first to the others. `fetched` maps
    URLs that were read to the validator (ETag or Last-Modified) and digest to remember.
    """

    keys: Keys
    unread: dict[int, str]
    unseen: set[int] = field(default_factory=set)
    twins: dict[int, list[int]] = field(default_factory=dict)
    fetched: dict[str, tuple[str | None, bytes]] = field(default_factory=dict)

    @property
    def to_read(self) -> list[int]:
        """The unseen images, one for each URL, sorted."""
        others = {i for some in self.twins.values() for i in some}
        return sorted(self.unseen - others)

    def remember_fetched(self, index: Index) -> None:
        """Store the digests of `fetched` in the index, and clear `fetched`."""
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

    Parameters
    ----------
    advance
        Called with n after every n images.
    remember
        Whether to store new digests in the index.
    read_unseen
        Whether to read URLs that were never read, or changed since; otherwise their images are listed as unseen.
    much_to_hash
        Called with the keys of a block of 4,096 images in which files were new, if more blocks follow.
    """
    remote.forget_fetched()  # an earlier plan may have left downloads
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
    """Set the keys of the images in `block` that are not at URLs; return the stamps and digests to remember."""
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
    """Set the keys of the images in `block` that are at URLs."""
    urls = {i: url for i in block if (url := dataset.url(i)) is not None}
    if not urls:
        return
    known = dict(zip(urls, index.url_digests(urls.values()), strict=True))
    with ThreadPoolExecutor(remote.connections()) as pool:
        # For many images in one archive, the server is asked once, about the archive.
        urls_to_ask = list(dict.fromkeys(remote.fetch_whole(url) for i, url in urls.items() if known[i]))
        said = dict(zip(urls_to_ask, pool.map(_ask, urls_to_ask), strict=True))
        to_read: dict[str, list[int]] = {}
        for i, url in urls.items():
            before, now = known[i], said.get(remote.fetch_whole(url))
            if isinstance(now, OSError):
                found.unread[i] = read_failure(now)
            elif before and now is not None and now == before[0]:
                found.keys[i] = before[1]
            elif read_unseen or (before and now is None):  # without a validator the image may still be unchanged
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
    """Read a few of the unseen images if no key is known, so that the space with their rows can be found.

    The downloads are kept in memory for the computation that may follow.
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
    """Return the validator and digest of the image at `url`, or the error that prevents reading it."""
    fetched = _fetch(url)
    return fetched if isinstance(fetched, OSError) else (fetched.validator, image_key(fetched.data))


_Identified = tuple[FileStamp, bytes, bool]  # stamp, key, and whether to remember it


def _looked_at_again(
    paths: list[Path], results: list[_Identified | FileStamp | str], pool: ThreadPoolExecutor
) -> list[_Identified | str]:
    """Return the results, after hashing the files dated in the future once the clock's resolution has passed."""
    dated = {at: result for at, result in enumerate(results) if isinstance(result, FileStamp)}
    if dated:
        time.sleep(_GRAIN_NS / 1e9)
    again = dict(zip(dated, pool.map(lambda at: _identify_dated(paths[at], dated[at]), dated), strict=True))
    return [again[at] if isinstance(result, FileStamp) else result for at, result in enumerate(results)]


def _identify_file(path: Path, known: tuple[FileStamp, bytes] | None) -> _Identified | FileStamp | str:
    """Return stamp, key and whether to remember it, or the reason why the file cannot be read.

    For a file whose ctime is in the future, as a server's clock may set it, return the stamp alone. `_identify_dated`
    then hashes the file after a wait of `_GRAIN_NS`.
    """
    try:
        found = path.stat()
        stamp = _stamp(found)
        if known is not None and known[0] == stamp:
            return stamp, known[1], False
        if not stat.S_ISREG(found.st_mode):
            return "cannot be read: not a regular file"  # reading a pipe or a device may never end
        now = time.time_ns()
        if stamp.ctime > now:
            return stamp
        # A change of the file sets its ctime to the present. An mtime in the future was set by a program: ignore it.
        touched = stamp.ctime if stamp.mtime > now else max(stamp.mtime, stamp.ctime)
        return _hashed(path, stamp, now - touched > _GRAIN_NS)
    except OSError as error:
        return read_failure(error)


def _identify_dated(path: Path, before: FileStamp) -> _Identified | str:
    """Return stamp, key and whether to remember it, of a file whose stamp was `before` some `_GRAIN_NS` ago."""
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
    """Return the present stamp of the file `path`."""
    return _stamp(path.stat())


def _stamp(found: os.stat_result) -> FileStamp:
    return FileStamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino % 2**63)  # SQLite's integers


def remembered_digest(path: Path, index: Index) -> bytes:
    """Return the sha256 of the file `path` as 32 bytes, hashing it only if it changed since the last call.

    The path is stored in the index even while the digest is too new to be trusted, so that
    `Index.files_with_digest` finds it. Raises CacheError if the file cannot be read.
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
