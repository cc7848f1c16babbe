"""The index: a SQLite file that says which shard holds which row.

It is each machine's own and derivable: rows come from the shards, digests from the files. What cannot be
derived, the quarantine, is met again by the next `features`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.cache import storage
from pipeline.cache.index_file import connect, damage_named, set_aside
from pipeline.cache.keys import KEY_BYTES, comparable, in_order, raw, split
from pipeline.cache.shard import ShardInfo
from pipeline.errors import CacheError, IndexDamagedError

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


@dataclass(frozen=True)
class Quarantine:
    """A content that a decoder refused."""

    key: bytes
    decoder: str
    max_pixels: int
    reason: str
    since: str | None  # ISO 8601, UTC; None if it was remembered by a version that kept no dates


@dataclass(frozen=True)
class Located:
    """Where n rows are stored: shard ids (n,) int64, -1 where missing; positions (n,) int64; and whose rows they
    are: keys (n, 32) uint8, views (n,) int64.
    """

    shards: np.ndarray
    positions: np.ndarray
    keys: np.ndarray
    views: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """Return a mask (n,) of those that have a row."""
        return self.shards >= 0

    def take(self, at: np.ndarray) -> Located:
        """Return the part at the indices or the mask `at`."""
        return Located(self.shards[at], self.positions[at], self.keys[at], self.views[at])


def row_mark(key: bytes, view: int) -> int:
    """Return a number of 64 bits that tells rows apart well enough for what another look sets right."""
    return int.from_bytes(key[:8], "big") ^ (view * 0x9E3779B97F4A7C15 % 2**64)


class Index:
    """The open database. One process may hold several; SQLite serialises their writes.

    A file that is no index, or no longer one, is set aside and a new one begun, unless a person named it, who may have
    meant another. Such a one is `of` one cache: shards are known by the name of their space, which two caches share.
    """

    def __init__(self, path: Path, of: Path | None = None) -> None:
        self.path = path
        self._of = of
        try:
            storage.make_folder(path.parent)
            self._db = self._opened()
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"the index {path} cannot be opened ({error}); ICEBOX_INDEX=FILE puts it elsewhere"
            ) from error

    def _opened(self) -> sqlite3.Connection:
        try:
            return self._claimed(connect(self.path))
        except IndexDamagedError as error:
            if self._of is not None and error.foreign:
                raise CacheError(
                    f"ICEBOX_INDEX names {self.path}, which is no index of ours ({error.reason}); name another file, "
                    "or move this one away"
                ) from error
            set_aside(error)
            return self._claimed(connect(self.path))

    def _claimed(self, db: sqlite3.Connection) -> sqlite3.Connection:
        """Mark a named index as that of this cache. Raises CacheError if it is another's."""
        if self._of is None:
            return db
        mark = int.from_bytes(hashlib.sha256(os.fsencode(self._of.resolve())).digest()[:4]) >> 1 or 1  # 31 bits
        with damage_named(self.path):
            (found,) = db.execute("PRAGMA application_id").fetchone()
            if not found:
                with suppress(sqlite3.OperationalError):  # it cannot be written, so that nobody else fills it either
                    db.execute(f"PRAGMA application_id = {mark}")
        if found in (0, mark):
            return db
        db.close()
        raise CacheError(
            f"ICEBOX_INDEX names {self.path}, the index of another cache than {self._of}: name another file; if the "
            "cache was moved, delete this one, it is derived again from the shards"
        )

    def close(self) -> None:
        """Close the database; the object is of no use afterwards."""
        self._db.close()

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

    def locate(self, space: str, keys: Sequence[bytes], views: Sequence[int] | None = None) -> Located:
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
        return Located(shards, positions, digests, seen)

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
        """Return key → what became of its shard, for those of `keys` whose row, in its one of `views`, was in one that
        is not good.
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
        known: dict[bytes, tuple[FileStamp, bytes]] = {}
        for start in range(0, len(names), _LOOK_UP):  # one query for many: each begins with a lock of the file
            some = names[start : start + _LOOK_UP]
            query = f"SELECT path, size, mtime, ctime, inode, digest FROM files WHERE path IN ({_marks(some)})"
            found = self._all(query, some, bytes, int, int, int, int, bytes)
            if any(len(row[5]) != KEY_BYTES for row in found):
                raise IndexDamagedError(self.path, "it has digests of no length", certain=True)
            known |= {path: (FileStamp(*stamp), digest) for path, *stamp, digest in found}
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
        query = "SELECT validator, digest FROM urls WHERE url = ?"
        with self._reading() as db:
            found = [db.execute(query, (url,)).fetchone() for url in urls]
        self._check([row for row in found if row], (str | None, bytes))
        if any(row and len(row[1]) != 32 for row in found):
            raise IndexDamagedError(self.path, "it has digests of no length", certain=True)
        return found

    def remember_urls(self, digests: Mapping[str, tuple[str | None, bytes]]) -> None:
        """Remember of each address what its server said before it was read, and the digest of what it gave."""
        rows = [(url, validator, digest) for url, (validator, digest) in digests.items()]
        self._remember("INSERT OR REPLACE INTO urls VALUES (?, ?, ?)", rows)

    def forget_urls(self, urls: Iterable[str]) -> None:
        """Forget the digests of these addresses, so that they are read again."""
        with self._changing() as db:
            db.executemany("DELETE FROM urls WHERE url = ?", [(url,) for url in urls])

    # Quarantine

    def quarantined(self, keys: Sequence[bytes], decoder: str, max_pixels: int) -> dict[bytes, Quarantine]:
        """Return key → what is remembered, for those of `keys` that this decoder is known to refuse."""
        query = """SELECT q.key, q.decoder, q.max_pixels, q.reason, q.since FROM wanted w
            JOIN quarantine q ON q.key = w.key WHERE q.decoder = ? AND q.max_pixels = ?"""
        with self._wanted(keys) as db:
            found = db.execute(query, (decoder, max_pixels)).fetchall()
        self._check(found, _QUARANTINE)
        return {row[0]: Quarantine(*row) for row in found}

    def refused(self, decoder: str, max_pixels: int) -> dict[bytes, Quarantine]:
        """Return key → what is remembered, of all that this decoder is known to refuse."""
        query = "SELECT key, decoder, max_pixels, reason, since FROM quarantine WHERE decoder = ? AND max_pixels = ?"
        found = self._all(query, (decoder, max_pixels), *_QUARANTINE)
        if any(len(row[0]) != KEY_BYTES for row in found):
            raise IndexDamagedError(self.path, "it has keys of another length in its quarantine", certain=True)
        return {row[0]: Quarantine(*row) for row in found}

    def all_quarantined(self) -> list[Quarantine]:
        """Return everything that is remembered, the latest first."""
        query = "SELECT key, decoder, max_pixels, reason, since FROM quarantine ORDER BY since DESC, key"
        return [Quarantine(*row) for row in self._all(query, (), *_QUARANTINE)]

    def remember_quarantined(self, reasons: Mapping[bytes, str], decoder: str, max_pixels: int) -> None:
        """Remember that this decoder refuses these contents."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [(key, decoder, max_pixels, reason, now) for key, reason in reasons.items()]
        self._remember("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?, ?)", rows)

    def forget_quarantined(self, keys: Iterable[bytes]) -> None:
        """Forget what was remembered of these contents, by whatever decoder."""
        with self._changing() as db:
            db.executemany("DELETE FROM quarantine WHERE key = ?", ((key,) for key in keys))

    # The file itself

    def check(self) -> None:
        """Have SQLite look at every page of the file.

        Raises
        ------
        IndexDamagedError
            If it finds anything wrong.
        """
        found = self._all("PRAGMA integrity_check(1)")
        if found != [("ok",)]:
            raise IndexDamagedError(self.path, str(found[0][0]) if found else "no answer")

    def renew(self, damage: IndexDamagedError) -> None:
        """Set the damaged file aside and begin an empty one, to be filled from the shards."""
        self._db.close()
        set_aside(damage)
        self._db = self._claimed(connect(self.path))

    # Every statement goes through one of these

    def _all(self, query: str, values: Sequence[Any] = (), *kinds: Any) -> list[Any]:
        """Return what a query finds; each row must be of these `kinds`, if any are given."""
        with self._reading() as db:
            found = db.execute(query, values).fetchall()
        self._check(found, kinds)
        return found

    def _check(self, rows: Sequence[Sequence[Any]], kinds: Sequence[Any]) -> None:
        """Raise IndexDamagedError if a row is of other types than were written: SQLite sees no fault in that."""
        if not rows or not kinds:
            return
        for column, kind in zip(zip(*rows, strict=True), kinds, strict=True):
            if not all(issubclass(found, kind) for found in set(map(type, column))):
                wrong = next(value for value in column if not isinstance(value, kind))
                raise IndexDamagedError(self.path, f"it holds {str(wrong)[:80]!r}, which it cannot", certain=True)

    @contextmanager
    def _believed(self) -> Iterator[None]:
        """The same for what is read in bulk, where looking at each value would take as long as reading it."""
        try:
            yield
        except (ValueError, TypeError, OverflowError, IndexError) as error:
            raise IndexDamagedError(self.path, f"it holds what it cannot: {error}", certain=True) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        storage.about_to("query", self.path)
        with damage_named(self.path):
            yield self._db

    def _remember(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        """Keep what only spares work later: a cache that cannot be written can still be read."""
        if not rows:
            return
        try:
            with self._changing() as db:
                db.executemany(query, rows)
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_READONLY:
                raise
            logger.warning("the index %s cannot be written: digests and failures are not remembered", self.path)

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Run the statements inside as one transaction: all of them take effect, or none."""
        with self._reading() as db:
            try:
                yield db
                storage.about_to("commit", self.path)
                db.commit()
            except BaseException:
                db.rollback()
                raise

    @contextmanager
    def _wanted(self, keys: Sequence[bytes], views: Sequence[int] | None = None) -> Iterator[sqlite3.Connection]:
        """Offer `keys` and `views` as a temporary table to join with: one pass instead of a query for every row."""
        views = [0] * len(keys) if views is None else views
        with self._reading() as db:
            columns = "ordinal INTEGER PRIMARY KEY, key BLOB NOT NULL, view INTEGER NOT NULL"
            db.execute(f"CREATE TEMP TABLE wanted ({columns})")
            try:
                db.executemany("INSERT INTO wanted VALUES (?, ?, ?)", zip(range(len(keys)), keys, views, strict=True))
                yield db
            finally:
                db.execute("DROP TABLE temp.wanted")
                db.commit()


def _marks(values: Sequence[Any]) -> str:
    return ",".join("?" * len(values))
