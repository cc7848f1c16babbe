"""The index as a file: opened, made, brought up to date, read and changed, set aside when it is damaged.

What it holds, `index` knows.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.core.errors import CacheError, IndexDamagedError

logger = logging.getLogger(__name__)

VERSION = 3
_SCHEMA = """
CREATE TABLE shards (
    id INTEGER PRIMARY KEY, space TEXT NOT NULL, name TEXT NOT NULL, bytes INTEGER NOT NULL,
    rows INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'good', problem TEXT, UNIQUE (space, name));
CREATE TABLE rows (
    shard INTEGER NOT NULL REFERENCES shards (id) ON DELETE CASCADE, position INTEGER NOT NULL,
    key BLOB NOT NULL, view INTEGER NOT NULL, PRIMARY KEY (shard, position)) WITHOUT ROWID;
CREATE INDEX rows_by_key ON rows (key, view);
CREATE TABLE files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL, ctime INTEGER NOT NULL,
    inode INTEGER NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE urls (url TEXT PRIMARY KEY, validator TEXT, digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE quarantine (
    key BLOB NOT NULL, decoder TEXT NOT NULL, max_pixels INTEGER NOT NULL, reason TEXT NOT NULL,
    since TEXT, PRIMARY KEY (key, decoder, max_pixels)) WITHOUT ROWID;
"""
_FROM_VERSION_2 = """
CREATE TABLE urls (url TEXT PRIMARY KEY, validator TEXT, digest BLOB NOT NULL) WITHOUT ROWID;
"""
_FROM_VERSION_1 = f"""{_FROM_VERSION_2}
ALTER TABLE shards ADD COLUMN state TEXT NOT NULL DEFAULT 'good';
ALTER TABLE shards ADD COLUMN problem TEXT;
ALTER TABLE quarantine ADD COLUMN since TEXT;
"""
# What a file of ours holds: anything more, a trigger say, is somebody else's.
_OLD_OBJECTS = {"shards", "rows", "rows_by_key", "files", "quarantine"}
_OBJECTS = {0: set[str](), 1: _OLD_OBJECTS, 2: _OLD_OBJECTS, VERSION: {*_OLD_OBJECTS, "urls"}}
_NOT_WRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what SQLite raises on a damaged file into one error; what else it raises goes on."""
    try:
        yield
    except UnicodeDecodeError as error:  # what SQLite says of a damaged schema has its bytes in it
        raise IndexDamagedError(path, f"what it holds is no text: {error}", certain=True) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_READONLY_DBMOVED:
            raise IndexDamagedError(path, "it was removed while it was in use") from error
        if (code & 0xFF) in _DAMAGED:
            raise IndexDamagedError(path, str(error), foreign=code == sqlite3.SQLITE_NOTADB) from error
        if "unsupported file format" in str(error):  # a byte of the header was flipped
            raise IndexDamagedError(path, str(error), certain=True) from error
        if "decode to UTF-8" in str(error):  # a name that is no text any more: SQLite sees no fault in that
            raise IndexDamagedError(path, str(error), certain=True) from error
        raise


class IndexFile:
    """The open database, and the ways in which statements are run on it.

    A file that is no index, or no longer one, is set aside and a new one begun, unless a person named it, who may have
    meant another. Such a one is `of` one cache: shards are known by the name of their space, which two caches share.
    """

    def __init__(self, path: Path, of: Path | None = None) -> None:
        self.path = path
        self._of = of
        try:
            files.make_folder(path.parent)
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

    def require_writable(self) -> None:
        """Raise CacheError unless the index can be written: what is computed could not be noted in it."""
        try:
            with self._reading() as db:
                db.execute("BEGIN IMMEDIATE")
                db.execute(f"PRAGMA user_version = {VERSION}")  # as it is; the first change makes the journal, too
                db.rollback()
        except sqlite3.OperationalError as error:
            if not _is_unwritable(error):
                raise
            raise CacheError(
                f"the index {self.path} cannot be written ({error}), so nothing is computed; see the permissions of it "
                "and of its folder (shared by a group: chmod g+w), or put an index of your own elsewhere by "
                "ICEBOX_INDEX=FILE"
            ) from error

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
        """Do the same for what is read in bulk, where looking at each value would take as long as reading it."""
        try:
            yield
        except (ValueError, TypeError, OverflowError, IndexError) as error:
            raise IndexDamagedError(self.path, f"it holds what it cannot: {error}", certain=True) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        files.about_to("query", self.path)
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
            if not _is_unwritable(error):
                raise
            logger.warning("the index %s cannot be written: digests and failures are not remembered", self.path)

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Run the statements inside as one transaction: all of them take effect, or none."""
        with self._reading() as db:
            try:
                yield db
                files.about_to("commit", self.path)
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


def _is_unwritable(error: sqlite3.Error) -> bool:
    """Return whether the file, or its folder, where SQLite keeps a journal, may not be written."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_WRITABLE


def set_aside(damage: IndexDamagedError) -> None:
    """Move a damaged index out of the way; whoever opens the cache next derives a new one from the shards."""
    if not damage.certain and _sound(damage.path):  # another process has done so already
        return
    aside = damage.path.with_name(f"{damage.path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S}")
    logger.warning("%s; it is moved to %s and derived again from the shards", damage.text, aside.name)
    # The journal first: SQLite would take it for the new file's and undo what that never did.
    for ending in ("-journal", "-wal", "-shm", ""):
        found = damage.path.with_name(damage.path.name + ending)
        if files.exists(found):
            files.move(found, aside.with_name(aside.name + ending))


def _sound(path: Path) -> bool:
    try:
        with closing(connect(path)) as db, damage_named(path):
            return db.execute("PRAGMA integrity_check(1)").fetchall() == [("ok",)]
    except IndexDamagedError:
        return False


def connect(path: Path) -> sqlite3.Connection:
    """Open the index at `path`, made or brought up to date if need be. Raises IndexDamagedError and CacheError."""
    if not files.exists(path):
        files.make_file(path)  # SQLite's own are closed to the group, whatever the umask says; its journals follow
    files.about_to("open index", path)
    db = sqlite3.connect(path, timeout=60)
    try:
        with damage_named(path):
            _prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    # Keys are hashes: neighbours in a shard are far apart in the index, so that much of it is gone through at once.
    for setting in ("trusted_schema = OFF", "temp_store = MEMORY", "foreign_keys = ON", "cache_size = -32768"):
        db.execute(f"PRAGMA {setting}")
    version, objects = _version(db)
    if version > VERSION:
        raise CacheError(
            f"the index {path} is of version {version}, this program reads {VERSION}; delete it, it is "
            "derived again from the shards"
        )
    if objects != _OBJECTS.get(version):
        raise IndexDamagedError(path, "it is not one that Icebox made", foreign=True)
    if version < VERSION:  # one that is up to date may lie where nothing can be written
        files.about_to("make index", path)
        _bring_up_to_date(db)


def _version(db: sqlite3.Connection) -> tuple[int, set[str]]:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    objects = db.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'").fetchall()
    return version, {name for (name,) in objects}


def _bring_up_to_date(db: sqlite3.Connection) -> None:
    with closing(db.cursor()) as cursor:
        # Nobody else may do the same meanwhile: the lock comes first, then the question what there is to do.
        cursor.execute("BEGIN IMMEDIATE")
        try:
            version, _ = _version(db)
            statements = {0: _SCHEMA, 1: _FROM_VERSION_1, 2: _FROM_VERSION_2}.get(version, "")
            for statement in filter(str.strip, statements.split(";")):
                cursor.execute(statement)
            cursor.execute(f"PRAGMA user_version = {VERSION}")
            cursor.execute("COMMIT")
        except BaseException:
            db.rollback()
            raise
