"""The index: a SQLite file that says which shard holds which row.

It is each machine's own and derivable: rows come from the shards, digests from the files. What cannot be
derived, the quarantine, is met again by the next `features`.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cache.shard import ShardInfo
from pipeline.errors import CacheError

VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (
    id INTEGER PRIMARY KEY, space TEXT NOT NULL, name TEXT NOT NULL, bytes INTEGER NOT NULL,
    rows INTEGER NOT NULL, UNIQUE (space, name));
CREATE TABLE IF NOT EXISTS rows (
    shard INTEGER NOT NULL REFERENCES shards (id) ON DELETE CASCADE, position INTEGER NOT NULL,
    key BLOB NOT NULL, view INTEGER NOT NULL, PRIMARY KEY (shard, position)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS rows_by_key ON rows (key, view);
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL, ctime INTEGER NOT NULL,
    inode INTEGER NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS quarantine (
    key BLOB NOT NULL, decoder TEXT NOT NULL, max_pixels INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (key, decoder, max_pixels)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class FileStamp:
    """What must be unchanged for a remembered digest to be trusted; times in nanoseconds."""

    size: int
    mtime: int
    ctime: int
    inode: int


@dataclass(frozen=True)
class Located:
    """Where n keys are stored: shard ids (n,) int64, -1 where missing, and positions (n,) int64."""

    shards: np.ndarray
    positions: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """Return a mask (n,) of the keys that have a row."""
        return self.shards >= 0


class Index:
    """The open database. One process may hold several; SQLite serialises their writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path)
        except CacheError:
            raise
        except (sqlite3.Error, OSError) as error:
            raise CacheError(
                f"the index {path} cannot be opened ({error}); it can be deleted, it is derived again from "
                "the shards; ICEBOX_INDEX=FILE puts it elsewhere"
            ) from error

    def close(self) -> None:
        """Close the database; the object is of no use afterwards."""
        self._db.close()

    # Rows and shards

    def shards(self, space: str) -> dict[str, int]:
        """Return name → id of the shards known in `space`."""
        query = "SELECT name, id FROM shards WHERE space = ?"
        return dict(self._db.execute(query, (space,)).fetchall())

    def totals(self, space: str) -> tuple[int, int, int]:
        """Return (shards, rows, bytes) of `space`; a row that stands in two shards counts twice."""
        query = "SELECT count(*), coalesce(sum(rows), 0), coalesce(sum(bytes), 0) FROM shards WHERE space = ?"
        return self._db.execute(query, (space,)).fetchone()

    def add_shard(self, space: str, info: ShardInfo) -> None:
        """Make the rows of a published shard known, all or none; a shard known already changes nothing."""
        insert = "INSERT OR IGNORE INTO shards (space, name, bytes, rows) VALUES (?, ?, ?, ?)"
        with self._db:
            done = self._db.execute(insert, (space, info.name, info.bytes, len(info.keys)))
            if done.rowcount == 0:
                return
            rows = (
                (done.lastrowid, position, key.tobytes(), int(view))
                for position, (key, view) in enumerate(zip(info.keys, info.views, strict=True))
            )
            self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", rows)

    def forget_shard(self, space: str, name: str) -> None:
        """Drop a shard that is no longer on disk, and its rows."""
        with self._db:
            self._db.execute("DELETE FROM shards WHERE space = ? AND name = ?", (space, name))

    def locate(self, space: str, keys: Sequence[bytes], view: int = 0) -> Located:
        """Return where the rows of `keys` are; a row in several shards is found in one of them."""
        shards = np.full(len(keys), -1, np.int64)
        positions = np.zeros(len(keys), np.int64)
        # CROSS JOIN is SQLite's way to fix the order: left to itself it goes through all rows of the space.
        query = """SELECT w.ordinal, r.shard, r.position FROM wanted w
            CROSS JOIN rows r ON r.key = w.key AND r.view = ?
            CROSS JOIN shards s ON s.id = r.shard AND s.space = ?"""
        with self._wanted(keys):
            for ordinal, shard, position in self._db.execute(query, (view, space)):
                shards[ordinal], positions[ordinal] = shard, position
        return Located(shards, positions)

    # Digests of files

    def file_digests(self, paths: Iterable[Path]) -> list[tuple[FileStamp, bytes] | None]:
        """Return for each path the stamp and digest that were remembered, or None."""
        query = "SELECT size, mtime, ctime, inode, digest FROM files WHERE path = ?"
        found = (self._db.execute(query, (os.fsencode(path),)).fetchone() for path in paths)
        return [(FileStamp(*row[:4]), row[4]) if row else None for row in found]

    def remember_digests(self, digests: Mapping[Path, tuple[FileStamp, bytes]]) -> None:
        """Remember the digest of each file as it was at the time of its stamp."""
        rows = (
            (os.fsencode(path), stamp.size, stamp.mtime, stamp.ctime, stamp.inode, digest)
            for path, (stamp, digest) in digests.items()
        )
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)

    def files_with_digest(self, digest: bytes) -> list[Path]:
        """Return the paths that were last seen with this digest; they may have changed since."""
        rows = self._db.execute("SELECT path FROM files WHERE digest = ?", (digest,))
        return [Path(os.fsdecode(row[0])) for row in rows]

    # Quarantine

    def quarantined(self, keys: Sequence[bytes], decoder: str, max_pixels: int) -> dict[bytes, str]:
        """Return key → reason for those of `keys` that this decoder is known to refuse."""
        query = """SELECT q.key, q.reason FROM wanted w
            JOIN quarantine q ON q.key = w.key WHERE q.decoder = ? AND q.max_pixels = ?"""
        with self._wanted(keys):
            return dict(self._db.execute(query, (decoder, max_pixels)).fetchall())

    def remember_quarantined(self, reasons: Mapping[bytes, str], decoder: str, max_pixels: int) -> None:
        """Remember that this decoder refuses these contents."""
        rows = ((key, decoder, max_pixels, reason) for key, reason in reasons.items())
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?)", rows)

    def forget_quarantined(self, keys: Sequence[bytes]) -> None:
        """Forget what was remembered of these contents, by whatever decoder."""
        with self._db:
            self._db.executemany("DELETE FROM quarantine WHERE key = ?", ((key,) for key in keys))

    @contextmanager
    def _wanted(self, keys: Sequence[bytes]) -> Iterator[None]:
        """Offer `keys` as a temporary table to join with: one pass instead of a query for every key."""
        self._db.execute("CREATE TEMP TABLE wanted (ordinal INTEGER PRIMARY KEY, key BLOB NOT NULL)")
        try:
            self._db.executemany("INSERT INTO wanted VALUES (?, ?)", enumerate(keys))
            yield
        finally:
            self._db.execute("DROP TABLE temp.wanted")
            self._db.commit()


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60)
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, VERSION):
        db.close()
        raise CacheError(
            f"the index {path} is of version {version}, this program reads {VERSION}; delete it, it is "
            "derived again from the shards"
        )
    db.execute("PRAGMA foreign_keys = ON")
    if version == 0:  # new; one that is there may lie where nothing can be written
        with db:
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {VERSION}")
    return db
