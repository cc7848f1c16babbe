"""The index: a SQLite file that says which shard holds which row.

It is each machine's own and derivable: rows come from the shards, digests from the files. What cannot be
derived, the quarantine, is met again by the next `features`.
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
_SCAN = 1 << 16  # keys whose neighbourhood in the index is read at a time
_SCAN_BELOW = 3  # rows of the index for each key that is wanted: to read them all is quicker then than to look up each
_QUARANTINE = (bytes, str, int, str, str | None)  # the types of its columns

State = Literal["good", "bad", "settled"]


class FileStamp(NamedTuple):
    """What must be unchanged for a remembered digest to be trusted; times in nanoseconds."""

    size: int
    mtime: int
    ctime: int
    inode: int


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a shard. Rows of a shard that is not "good" count as missing.

    "bad" is damaged or gone, and `verify` says so; "settled" is one that `verify --repair` moved aside.
    """

    id: int
    name: str
    bytes: int
    rows: int
    state: State
    problem: str | None


CONDEMNED = 0  # as `max_pixels`: whatever the limit, and though it has a row


@dataclass(frozen=True)
class Quarantine:
    """A content that a decoder refused."""

    key: bytes
    decoder: str
    max_pixels: int
    reason: str
    since: str | None  # ISO 8601, UTC; None if it was remembered by a version that kept no dates


@dataclass(frozen=True)
class RowLocations:
    """Where n rows are stored, and whose they are.

    `shards` are ids, (n,) int64, -1 where missing; `positions` (n,) int64; `keys` (n, 32) uint8; `views` (n,) int64.
    """

    shards: np.ndarray
    positions: np.ndarray
    keys: np.ndarray
    views: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """Return a mask (n,) of those that have a row."""
        return self.shards >= 0

    def take(self, at: np.ndarray) -> RowLocations:
        """Return the part at the indices or the mask `at`."""
        return RowLocations(self.shards[at], self.positions[at], self.keys[at], self.views[at])


def row_mark(key: bytes, view: int) -> int:
    """Return a number of 64 bits that tells rows apart well enough for what another look sets right."""
    return int.from_bytes(key[:8], "big") ^ (view * 0x9E3779B97F4A7C15 % 2**64)


class Index(IndexFile):
    """What is known of shards, rows, and images. One process may hold several; SQLite serialises their writes."""

    # Shards

    def shards(self, space: str) -> dict[str, ShardRecord]:
        """Return name → what is known, of the shards of `space`."""
        query = "SELECT id, name, bytes, rows, state, problem FROM shards WHERE space = ?"
        found = self._all(query, (space,), int, str, int, int, str, str | None)
        return {row[1]: ShardRecord(*row) for row in found}

    def spaces(self) -> list[str]:
        """Return the names of the spaces that have shards here, sorted."""
        return [name for (name,) in self._all("SELECT DISTINCT space FROM shards ORDER BY space", (), str)]

    def totals(self, space: str) -> tuple[int, int, int]:
        """Return (shards, rows, bytes) of `space`; a row that stands in two shards counts twice."""
        query = """SELECT count(*), coalesce(sum(rows), 0), coalesce(sum(bytes), 0) FROM shards
            WHERE space = ? AND state = 'good'"""
        return self._all(query, (space,), int, int, int)[0]

    def add_shard(self, space: str, info: ShardInfo) -> None:
        """Make the rows of a published shard known, all or none; a good shard known already changes nothing."""
        query = "SELECT state FROM shards WHERE space = ? AND name = ?"
        if self._all(query, (space, info.name), str) == [("good",)]:
            return
        with self._changing() as db:
            db.execute("DELETE FROM shards WHERE space = ? AND name = ?", (space, info.name))
            insert = "INSERT OR IGNORE INTO shards (space, name, bytes, rows) VALUES (?, ?, ?, ?)"
            done = db.execute(insert, (space, info.name, info.bytes, len(info.keys)))
            if done.rowcount == 0:  # another process was quicker
                return
            rows = (
                (done.lastrowid, position, key.tobytes(), int(view))
                for position, (key, view) in enumerate(zip(info.keys, info.views, strict=True))
            )
            db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", rows)
            if not self._has_lost(space):
                return
            # What is stored well again need no longer be known as lost.
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
        """Note that a shard is not to be read from; its rows stay known, so that it can be said what was lost."""
        query = """INSERT INTO shards (space, name, bytes, rows, state, problem) VALUES (?, ?, ?, 0, ?, ?)
            ON CONFLICT (space, name) DO UPDATE SET state = excluded.state, problem = excluded.problem"""
        with self._changing() as db:
            db.execute(query, (space, name, size, state, problem))

    def forget_shards(self, space: str, names: Iterable[str]) -> None:
        """Drop shards and their rows."""
        with self._changing() as db:
            db.executemany("DELETE FROM shards WHERE space = ? AND name = ?", [(space, name) for name in names])

    # Rows

    def rows(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what is known of a shard's rows, by position: keys (n, 32) uint8 and views (n,) int64."""
        query = "SELECT position, key, view FROM rows WHERE shard = ? ORDER BY position"
        found = self._all(query, (shard,), int, bytes, int)
        whole = [position for position, _, _ in found] == list(range(len(found)))
        if not whole or any(len(key) != 32 for _, key, _ in found):
            raise IndexDamagedError(self.path, f"it has other rows than shard {shard} can have", certain=True)
        keys = np.frombuffer(b"".join(key for _, key, _ in found), np.uint8).reshape(-1, 32)
        return keys, np.array([view for _, _, view in found], np.int64)

    def locate(self, space: str, keys: Sequence[bytes], views: Sequence[int] | None = None) -> RowLocations:
        """Return where the rows of `keys` are, each in its one of `views`, by default the plain one.

        A row in several shards is found in one of them.
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
        """Return whether the keys `digests[at]` have a row in one view, (m,) bool.

        `digests` is (n, 32) uint8, and `at` (m,) int64 must be in the order of the keys.
        """
        there = np.zeros(len(at), bool)
        for part, shards, _ in self._rows_of(space, digests, at, view):
            there[part] = shards >= 0
        return there

    def has_any(self, space: str, digests: np.ndarray, at: np.ndarray, view: int) -> bool:
        """Return whether any of them has, without a look at more than it takes to find one."""
        return any((shards >= 0).any() for _, shards, _ in self._rows_of(space, digests, at, view))

    def _rows_of(
        self, space: str, digests: np.ndarray, at: np.ndarray, view: int
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield, a block after the other, where the rows of `digests[at]` are: shards, -1 for none, and positions."""
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
        """Return shards, -1 for none, and positions of the rows of (m, 32) `keys`, by a query for each."""
        shards, positions = np.full(len(keys), -1, np.int64), np.zeros(len(keys), np.int64)
        # CROSS JOIN is SQLite's way to fix the order: left to itself it goes through all rows of the space.
        query = """SELECT w.ordinal, r.shard, r.position FROM wanted w
            CROSS JOIN rows r ON r.key = w.key AND r.view = w.view
            CROSS JOIN shards s ON s.id = r.shard AND s.space = ? AND s.state = 'good'"""
        with self._wanted(split(keys), [view] * len(keys)) as db:
            for ordinal, shard, position in db.execute(query, (space,)):
                shards[ordinal], positions[ordinal] = shard, position
        return shards, positions

    def _scan(self, good: np.ndarray, keys: np.ndarray, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the same of sorted `keys`, from all rows between the first and the last of them.

        Those of other shards than `good` are left out here: a join takes longer, as shards are not in this order.
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
        """Return key → what became of its shard, for those whose row was in one that is not good.

        Each of `keys` is looked up in its one of `views`.
        """
        query = """SELECT w.key, s.name, s.problem FROM wanted w
            CROSS JOIN rows r ON r.key = w.key AND r.view = w.view
            CROSS JOIN shards s ON s.id = r.shard AND s.space = ? AND s.state != 'good'"""
        if not self._has_lost(space):  # as a rule
            return {}
        with self._believed(), self._wanted(keys, views) as db:
            return {key: f"{name[:12]}…: {problem}" for key, name, problem in db.execute(query, (space,))}

    def count_lost(self, space: str, digests: np.ndarray, at: np.ndarray, view: int) -> int:
        """Return how many of the distinct keys `digests[at]`, as `has_rows` takes them, had such a row in one view."""
        if not self._has_lost(space):
            return 0
        blocks = (split(digests[at[start : start + _LOOK_UP]]) for start in range(0, len(at), _LOOK_UP))
        return sum(len(self.lost(space, block, [view] * len(block))) for block in blocks)

    def _has_lost(self, space: str) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM shards WHERE space = ? AND state != 'good')"
        return self._all(query, (space,), int) == [(1,)]

    def views(self, space: str) -> list[tuple[str, int]]:
        """Return for each view in good shards of `space` the name of one that has it, and its number."""
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
        """Return for each path the stamp and digest that were remembered, or None."""
        names = [os.fsencode(path) for path in paths]
        query = "SELECT path, size, mtime, ctime, inode, digest FROM files WHERE path"
        found = self._digests_of(names, query, bytes, int, int, int, int)
        known = {path: (FileStamp(*stamp), digest) for path, *stamp, digest in found}
        return [known.get(name) for name in names]

    def remember_digests(self, digests: Mapping[Path, tuple[FileStamp, bytes]]) -> None:
        """Remember the digest of each file as it was at the time of its stamp."""
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
        """Return the paths that were last seen with this digest; they may have changed since."""
        rows = self._all("SELECT path FROM files WHERE digest = ?", (digest,), bytes)
        return [Path(os.fsdecode(row[0])) for row in rows]

    def files(self) -> dict[Path, bytes]:
        """Return path → digest of every file that was ever hashed; they may have changed since."""
        found = self._all("SELECT path, digest FROM files", (), bytes, bytes)
        return {Path(os.fsdecode(path)): digest for path, digest in found}

    # Digests of what is behind addresses

    def url_digests(self, urls: Iterable[str]) -> list[tuple[str | None, bytes] | None]:
        """Return for each address the validator and digest that were remembered, or None."""
        names = list(urls)
        found = self._digests_of(names, "SELECT url, validator, digest FROM urls WHERE url", str, str | None)
        known = {url: (validator, digest) for url, validator, digest in found}
        return [known.get(name) for name in names]

    def remember_urls(self, digests: Mapping[str, tuple[str | None, bytes]]) -> None:
        """Remember of each address what its server said before it was read, and the digest of what it gave."""
        rows = [(url, validator, digest) for url, (validator, digest) in digests.items()]
        self._remember("INSERT OR REPLACE INTO urls VALUES (?, ?, ?)", rows)

    def forget_urls(self, urls: Iterable[str]) -> None:
        """Forget the digests of these addresses, so that they are read again."""
        with self._changing() as db:
            db.executemany("DELETE FROM urls WHERE url = ?", [(url,) for url in urls])

    def _digests_of(self, names: Sequence[Any], query: str, *kinds: Any) -> Iterator[Any]:
        """Yield what a query, up to its name's column, finds of these names; a digest is its last column."""
        for start in range(0, len(names), _LOOK_UP):  # one query for many: each begins with a lock of the file
            some = names[start : start + _LOOK_UP]
            found = self._all(f"{query} IN ({','.join('?' * len(some))})", some, *kinds, bytes)
            if any(len(row[-1]) != KEY_BYTES for row in found):
                raise IndexDamagedError(self.path, "it has digests of no length", certain=True)
            yield from found

    # Quarantine

    def quarantined(self, keys: Sequence[bytes], decoder: str, max_pixels: int) -> dict[bytes, Quarantine]:
        """Return key → what is remembered, for those of `keys` that this decoder is known to refuse."""
        query = """SELECT q.key, q.decoder, q.max_pixels, q.reason, q.since FROM wanted w
            JOIN quarantine q ON q.key = w.key WHERE q.decoder = ? AND q.max_pixels = ? OR q.max_pixels = ?"""
        with self._wanted(keys) as db:
            found = db.execute(query, (decoder, max_pixels, CONDEMNED)).fetchall()
        self._check(found, _QUARANTINE)
        return {row[0]: Quarantine(*row) for row in found}

    def refused(self, decoder: str, max_pixels: int) -> dict[bytes, Quarantine]:
        """Return key → what is remembered, of all that this decoder is known to refuse."""
        query = "SELECT key, decoder, max_pixels, reason, since FROM quarantine WHERE decoder = ? AND max_pixels = ?"
        found = self._all(query, (decoder, max_pixels), *_QUARANTINE)
        if any(len(row[0]) != KEY_BYTES for row in found):
            raise IndexDamagedError(self.path, "it has keys of another length in its quarantine", certain=True)
        return {row[0]: Quarantine(*row) for row in found}

    def condemned(self) -> dict[bytes, Quarantine]:
        """Return key → what is remembered, of what was refused although it has a row."""
        query = "SELECT key, decoder, max_pixels, reason, since FROM quarantine WHERE max_pixels = ?"
        return {row[0]: Quarantine(*row) for row in self._all(query, (CONDEMNED,), *_QUARANTINE)}

    def all_quarantined(self) -> list[Quarantine]:
        """Return everything that is remembered, the latest first."""
        query = "SELECT key, decoder, max_pixels, reason, since FROM quarantine ORDER BY since DESC, key"
        return [Quarantine(*row) for row in self._all(query, (), *_QUARANTINE)]

    def remember_quarantined(self, reasons: Mapping[bytes, str], decoder: str, max_pixels: int) -> None:
        """Remember that this decoder refuses these contents."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [(key, decoder, max_pixels, reason, now) for key, reason in reasons.items()]
        self._remember("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?, ?)", rows)

    def forget_quarantined(self, keys: Iterable[bytes], *, condemned: bool = False) -> None:
        """Forget what was remembered of these contents, by whatever decoder: that they are `condemned`, or the rest."""
        with self._changing() as db:
            rows = ((key, CONDEMNED, condemned) for key in keys)
            db.executemany("DELETE FROM quarantine WHERE key = ? AND (max_pixels = ?) = ?", rows)
