"""The index: a SQLite file that maps each row to the shard that stores it.

The index can be derived again: its rows from the shards, its digests from the files. The next `features` finds
the quarantined images again. Each machine may have an index of its own. `Index` is the main class.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.cache.index_file import IndexFile
from pipeline.cache.keys import KEY_BYTES, comparable, in_order, raw, split
from pipeline.cache.shard import ShardInfo
from pipeline.core.errors import IndexDamagedError

logger = logging.getLogger(__name__)

_LOOK_UP = 1 << 12  # keys looked up at a time
_SCAN = 1 << 16  # keys for which one range of the index is read at a time
_SCAN_BELOW = 3  # with fewer index rows per requested key, reading all rows is faster than a query for each key
_QUARANTINE = (bytes, str, int, str, str | None)  # the types of the columns of the quarantine table

State = Literal["good", "bad", "settled"]


class FileStamp(NamedTuple):
    """Size, times (ns) and inode of a file. A remembered digest is trusted only while all of them are unchanged."""

    size: int
    mtime: int
    ctime: int
    inode: int


@dataclass(frozen=True)
class ShardRecord:
    """One shard as the index records it. Rows of a shard that is not "good" count as missing.

    A "bad" shard is damaged or gone, and `verify` reports it. `verify --repair` moved a "settled" shard aside.
    """

    id: int
    name: str
    bytes: int
    rows: int
    state: State
    problem: str | None


CONDEMNED = 0  # stored as `max_pixels`: the image is refused at every limit, even if it has a row


@dataclass(frozen=True)
class Quarantine:
    """An image, known by the sha256 of its bytes, that a decoder refused."""

    key: bytes
    decoder: str
    max_pixels: int
    reason: str
    since: str | None  # ISO 8601, UTC; None if an older version stored the entry, without a date


@dataclass(frozen=True)
class RowLocations:
    """Where n rows are stored, and the key and view of each.

    `shards` are ids, (n,) int64, -1 where missing; `positions` (n,) int64; `keys` (n, 32) uint8; `views` (n,) int64.
    """

    shards: np.ndarray
    positions: np.ndarray
    keys: np.ndarray
    views: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """The mask of the keys that have a row, (n,) bool."""
        return self.shards >= 0

    def take(self, at: np.ndarray) -> RowLocations:
        """Return the locations selected by the indices or the mask `at`."""
        return RowLocations(self.shards[at], self.positions[at], self.keys[at], self.views[at])


def row_mark(key: bytes, view: int) -> int:
    """Return a 64-bit hash of a row. Two rows may share one (rare), so a later check must correct the result."""
    return int.from_bytes(key[:8], "big") ^ (view * 0x9E3779B97F4A7C15 % 2**64)


class Index(IndexFile):
    """The index of shards, rows and images. One process may open several; SQLite serialises their writes."""

    # Shards

    def shards(self, space: str) -> dict[str, ShardRecord]:
        """Return name → record of the shards of `space`."""
        query = "SELECT id, name, bytes, rows, state, problem FROM shards WHERE space = ?"
        found = self._all(query, (space,), int, str, int, int, str, str | None)
        return {row[1]: ShardRecord(*row) for row in found}

    def spaces(self) -> list[str]:
        """Return the names of the spaces that have shards in the index, sorted."""
        return [name for (name,) in self._all("SELECT DISTINCT space FROM shards ORDER BY space", (), str)]

    def totals(self, space: str) -> tuple[int, int, int]:
        """Return (shards, rows, bytes) of the good shards of `space`; a row that is in two shards counts twice."""
        query = """SELECT count(*), coalesce(sum(rows), 0), coalesce(sum(bytes), 0) FROM shards
            WHERE space = ? AND state = 'good'"""
        return self._all(query, (space,), int, int, int)[0]

    def add_shard(self, space: str, info: ShardInfo) -> None:
        """Add a published shard and its rows, in one transaction. Nothing changes if it is already listed as good."""
        query = "SELECT state FROM shards WHERE space = ? AND name = ?"
        if self._all(query, (space, info.name), str) == [("good",)]:
            return
        with self._changing() as db:
            db.execute("DELETE FROM shards WHERE space = ? AND name = ?", (space, info.name))
            insert = "INSERT OR IGNORE INTO shards (space, name, bytes, rows) VALUES (?, ?, ?, ?)"
            done = db.execute(insert, (space, info.name, info.bytes, len(info.keys)))
            if done.rowcount == 0:  # another process has added the shard meanwhile
                return
            rows = (
                (done.lastrowid, position, key.tobytes(), int(view))
                for position, (key, view) in enumerate(zip(info.keys, info.views, strict=True))
            )
            db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", rows)
            if not self._has_lost(space):
                return
            # Rows that a good shard now stores are no longer lost.
            db.execute(
                """DELETE FROM rows WHERE shard IN (SELECT id FROM shards WHERE space = ? AND state != 'good')
                AND (key, view) IN (SELECT key, view FROM rows WHERE shard = ?)""",
                (space, done.lastrowid),
            )
            db.execute(
                """DELETE FROM shards WHERE space = ? AND state != 'good'
                AND NOT EXISTS (SELECT 1 FROM rows WHERE shard = shards.id)""",
                (space,),
            )

    def mark_shard(self, space: str, name: str, size: int, state: State, problem: str) -> None:
        """Record that a shard must not be read. Its rows stay in the index, so that lost rows can be reported."""
        query = """INSERT INTO shards (space, name, bytes, rows, state, problem) VALUES (?, ?, ?, 0, ?, ?)
            ON CONFLICT (space, name) DO UPDATE SET state = excluded.state, problem = excluded.problem"""
        with self._changing() as db:
            db.execute(query, (space, name, size, state, problem))

    def forget_shards(self, space: str, names: Iterable[str]) -> None:
        """Delete shards and their rows from the index."""
        with self._changing() as db:
            db.executemany("DELETE FROM shards WHERE space = ? AND name = ?", [(space, name) for name in names])

    # Rows

    def rows(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return keys (n, 32) uint8 and views (n,) int64 of a shard's rows, by position. Raises IndexDamagedError."""
        query = "SELECT position, key, view FROM rows WHERE shard = ? ORDER BY position"
        found = self._all(query, (shard,), int, bytes, int)
        whole = [position for position, _, _ in found] == list(range(len(found)))
        if not whole or any(len(key) != 32 for _, key, _ in found):
            raise IndexDamagedError(self.path, f"it has other rows than shard {shard} can have", certain=True)
        keys = np.frombuffer(b"".join(key for _, key, _ in found), np.uint8).reshape(-1, 32)
        return keys, np.array([view for _, _, view in found], np.int64)

    def locate(self, space: str, keys: Sequence[bytes], views: Sequence[int] | None = None) -> RowLocations:
        """Return the locations of the rows of `keys`; `views` names a view for each key, by default the plain one.

        For a row that is in several shards, one of them is returned.
        """
        shards = np.full(len(keys), -1, np.int64)
        positions = np.zeros(len(keys), np.int64)
        digests = raw(keys)
        seen = np.zeros(len(keys), np.int64) if views is None else np.array(views, np.int64)
        order = in_order(digests)
        for view in np.unique(seen).tolist():
            at = order[seen[order] == view]
            for part, *found in self._rows_of(space, digests, at, view):
                shards[at[part]], positions[at[part]] = found
        return RowLocations(shards, positions, digests, seen)

    def has_rows(self, space: str, digests: np.ndarray, at: np.ndarray, view: int) -> np.ndarray:
        """Return for each key of `digests[at]` whether it has a row in `view`, (m,) bool.

        `digests` is (n, 32) uint8. `at` is (m,) int64 and must list the keys in ascending order.
        """
        there = np.zeros(len(at), bool)
        for part, shards, _ in self._rows_of(space, digests, at, view):
            there[part] = shards >= 0
        return there

    def has_any(self, space: str, digests: np.ndarray, at: np.ndarray, view: int) -> bool:
        """Return whether any key of `digests[at]` has a row in `view`; the search ends at the first block with one."""
        return any((shards >= 0).any() for _, shards, _ in self._rows_of(space, digests, at, view))

    def _rows_of(
        self, space: str, digests: np.ndarray, at: np.ndarray, view: int
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield, block by block, a slice of `at` with the shards (-1 for none) and positions of its rows."""
        scan = len(at) > _LOOK_UP and self._rows_known() < _SCAN_BELOW * len(at)
        good = self._good(space) if scan else np.zeros(0, np.int64)
        size = _SCAN if scan else _LOOK_UP
        for start in range(0, len(at), size):
            part = slice(start, min(start + size, len(at)))
            keys = digests[at[part]]
            with self._believed():
                yield part, *(self._scan(good, keys, view) if scan else self._look_up(space, keys, view))

    def _good(self, space: str) -> np.ndarray:
        """Return the ids of the good shards of `space`, sorted, (s,) int64."""
        query = "SELECT id FROM shards WHERE space = ? AND state = 'good' ORDER BY id"
        return np.array(self._all(query, (space,), int), np.int64).ravel()

    def _rows_known(self) -> int:
        return self._all("SELECT coalesce(sum(rows), 0) FROM shards", (), int)[0][0]

    def _look_up(self, space: str, keys: np.ndarray, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards (-1 for none) and positions of the rows of (m, 32) `keys`, looking up each key."""
        shards, positions = np.full(len(keys), -1, np.int64), np.zeros(len(keys), np.int64)
        # CROSS JOIN fixes the order of the tables. Without it SQLite's planner reads all rows of the space.
        query = """SELECT w.ordinal, r.shard, r.position FROM wanted w
            CROSS JOIN rows r ON r.key = w.key AND r.view = w.view
            CROSS JOIN shards s ON s.id = r.shard AND s.space = ? AND s.state = 'good'"""
        with self._wanted(split(keys), [view] * len(keys)) as db:
            for ordinal, shard, position in db.execute(query, (space,)):
                shards[ordinal], positions[ordinal] = shard, position
        return shards, positions

    def _scan(self, good: np.ndarray, keys: np.ndarray, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the same as `_look_up` for sorted `keys`, by reading all rows between the first and the last key.

        Rows of shards outside `good` are dropped in NumPy: a SQL join is slower, as shards are not in key order.
        """
        shards, positions = np.full(len(keys), -1, np.int64), np.zeros(len(keys), np.int64)
        wanted = comparable(keys)
        query = "SELECT key, shard, position FROM rows WHERE key BETWEEN ? AND ? AND view = ? ORDER BY key"
        with self._reading() as db:
            rows = db.execute(query, (keys[0].tobytes(), keys[-1].tobytes(), view))
            while block := rows.fetchmany(_LOOK_UP):
                found, *where = zip(*block, strict=True)
                if set(map(len, found)) != {KEY_BYTES}:
                    raise ValueError("a key of another length")
                there, where = comparable(b"".join(found)), np.array(where, np.int64)
                usable = np.isin(where[0], good)
                there, where = there[usable], where[:, usable]
                if len(there):
                    low, high = np.searchsorted(wanted, there[0]), np.searchsorted(wanted, there[-1], "right")
                    near = np.searchsorted(there, wanted[low:high])
                    hit = np.flatnonzero(there[near] == wanted[low:high])
                    shards[low + hit], positions[low + hit] = where[:, near[hit]]
        return shards, positions

    def lost(self, space: str, keys: Sequence[bytes], views: Sequence[int] | None = None) -> dict[bytes, str]:
        """Return key → the shard and its problem, for each key whose row is in a shard that is not good.

        `views` names a view for each key, by default the plain one.
        """
        query = """SELECT w.key, s.name, s.problem FROM wanted w
            CROSS JOIN rows r ON r.key = w.key AND r.view = w.view
            CROSS JOIN shards s ON s.id = r.shard AND s.space = ? AND s.state != 'good'"""
        if not self._has_lost(space):  # the usual case
            return {}
        with self._believed(), self._wanted(keys, views) as db:
            return {key: f"{name[:12]}…: {problem}" for key, name, problem in db.execute(query, (space,))}

    def count_lost(self, space: str, digests: np.ndarray, at: np.ndarray, view: int) -> int:
        """Return how many keys of `digests[at]`, distinct and ordered as for `has_rows`, have a lost row in `view`."""
        if not self._has_lost(space):
            return 0
        blocks = (split(digests[at[start : start + _LOOK_UP]]) for start in range(0, len(at), _LOOK_UP))
        return sum(len(self.lost(space, block, [view] * len(block))) for block in blocks)

    def _has_lost(self, space: str) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM shards WHERE space = ? AND state != 'good')"
        return self._all(query, (space,), int) == [(1,)]

    def views(self, space: str) -> list[tuple[str, int]]:
        """Return for each view in good shards of `space` the name of a shard that has it, and the view's number."""
        query = """SELECT s.name, r.view FROM shards s JOIN rows r ON r.shard = s.id
            WHERE s.space = ? AND s.state = 'good' GROUP BY r.view"""
        return self._all(query, (space,), str, int)

    def row_marks(self, space: str) -> np.ndarray:
        """Return the `row_mark` of each row in good shards of `space`, (n,) uint64."""
        query = """SELECT r.key, r.view FROM shards s JOIN rows r ON r.shard = s.id
            WHERE s.space = ? AND s.state = 'good'"""
        with self._believed(), self._reading() as db:
            return np.fromiter((row_mark(*row) for row in db.execute(query, (space,))), np.uint64)

    # Digests of files

    def file_digests(self, paths: Iterable[Path]) -> list[tuple[FileStamp, bytes] | None]:
        """Return for each path its remembered stamp and digest, or None."""
        names = [os.fsencode(path) for path in paths]
        query = "SELECT path, size, mtime, ctime, inode, digest FROM files WHERE path"
        found = self._digests_of(names, query, bytes, int, int, int, int)
        known = {path: (FileStamp(*stamp), digest) for path, *stamp, digest in found}
        return [known.get(name) for name in names]

    def remember_digests(self, digests: Mapping[Path, tuple[FileStamp, bytes]]) -> None:
        """Store the stamp and digest of each file."""
        rows = [
            (os.fsencode(path), stamp.size, stamp.mtime, stamp.ctime, stamp.inode, digest)
            for path, (stamp, digest) in digests.items()
        ]
        self._remember("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)

    def forget_digests(self, paths: Iterable[Path]) -> None:
        """Forget the digests of these files, so that they are hashed again."""
        with self._changing() as db:
            db.executemany("DELETE FROM files WHERE path = ?", [(os.fsencode(path),) for path in paths])

    def files_with_digest(self, digest: bytes) -> list[Path]:
        """Return the paths last recorded with this digest; the files may have changed since."""
        rows = self._all("SELECT path FROM files WHERE digest = ?", (digest,), bytes)
        return [Path(os.fsdecode(row[0])) for row in rows]

    def files(self) -> dict[Path, bytes]:
        """Return path → digest of every recorded file; the files may have changed since."""
        found = self._all("SELECT path, digest FROM files", (), bytes, bytes)
        return {Path(os.fsdecode(path)): digest for path, digest in found}

    # Digests of images at URLs

    def url_digests(self, urls: Iterable[str]) -> list[tuple[str | None, bytes] | None]:
        """Return for each URL its remembered validator (ETag or Last-Modified) and digest, or None."""
        names = list(urls)
        found = self._digests_of(names, "SELECT url, validator, digest FROM urls WHERE url", str, str | None)
        known = {url: (validator, digest) for url, validator, digest in found}
        return [known.get(name) for name in names]

    def remember_urls(self, digests: Mapping[str, tuple[str | None, bytes]]) -> None:
        """Store for each URL the validator that its server sent, and the digest of the content."""
        rows = [(url, validator, digest) for url, (validator, digest) in digests.items()]
        self._remember("INSERT OR REPLACE INTO urls VALUES (?, ?, ?)", rows)

    def forget_urls(self, urls: Iterable[str]) -> None:
        """Forget the digests of these URLs, so that they are downloaded again."""
        with self._changing() as db:
            db.executemany("DELETE FROM urls WHERE url = ?", [(url,) for url in urls])

    def _digests_of(self, names: Sequence[Any], query: str, *kinds: Any) -> Iterator[Any]:
        """Yield the rows for `names`; `query` ends with the name's column, and the last column is the digest."""
        for start in range(0, len(names), _LOOK_UP):  # one query for many names, as each query locks the file
            some = names[start : start + _LOOK_UP]
            found = self._all(f"{query} IN ({','.join('?' * len(some))})", some, *kinds, bytes)
            if any(len(row[-1]) != KEY_BYTES for row in found):
                raise IndexDamagedError(self.path, "it has digests of no length", certain=True)
            yield from found

    # Quarantine

    def quarantined(self, keys: Sequence[bytes], decoder: str, max_pixels: int) -> dict[bytes, Quarantine]:
        """Return key → quarantine entry, for the keys of `keys` that this decoder is known to refuse."""
        query = """SELECT q.key, q.decoder, q.max_pixels, q.reason, q.since FROM wanted w
            JOIN quarantine q ON q.key = w.key WHERE q.decoder = ? AND q.max_pixels = ? OR q.max_pixels = ?"""
        with self._wanted(keys) as db:
            found = db.execute(query, (decoder, max_pixels, CONDEMNED)).fetchall()
        self._check(found, _QUARANTINE)
        return {row[0]: Quarantine(*row) for row in found}

    def refused(self, decoder: str, max_pixels: int) -> dict[bytes, Quarantine]:
        """Return key → quarantine entry of every image that this decoder is known to refuse."""
        query = "SELECT key, decoder, max_pixels, reason, since FROM quarantine WHERE decoder = ? AND max_pixels = ?"
        found = self._all(query, (decoder, max_pixels), *_QUARANTINE)
        if any(len(row[0]) != KEY_BYTES for row in found):
            raise IndexDamagedError(self.path, "it has keys of another length in its quarantine", certain=True)
        return {row[0]: Quarantine(*row) for row in found}

    def condemned(self) -> dict[bytes, Quarantine]:
        """Return key → quarantine entry of every image that is refused although it has a row."""
        query = "SELECT key, decoder, max_pixels, reason, since FROM quarantine WHERE max_pixels = ?"
        return {row[0]: Quarantine(*row) for row in self._all(query, (CONDEMNED,), *_QUARANTINE)}

    def all_quarantined(self) -> list[Quarantine]:
        """Return all quarantine entries, the latest first."""
        query = "SELECT key, decoder, max_pixels, reason, since FROM quarantine ORDER BY since DESC, key"
        return [Quarantine(*row) for row in self._all(query, (), *_QUARANTINE)]

    def remember_quarantined(self, reasons: Mapping[bytes, str], decoder: str, max_pixels: int) -> None:
        """Store that this decoder refuses these images; `reasons` maps each key to the reason."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [(key, decoder, max_pixels, reason, now) for key, reason in reasons.items()]
        self._remember("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?, ?)", rows)

    def forget_quarantined(self, keys: Iterable[bytes], *, condemned: bool = False) -> None:
        """Delete the condemned entries of these images, or with `condemned` false all others, of every decoder."""
        with self._changing() as db:
            rows = ((key, CONDEMNED, condemned) for key in keys)
            db.executemany("DELETE FROM quarantine WHERE key = ? AND (max_pixels = ?) = ?", rows)
