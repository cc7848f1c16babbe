"""The SQLite file of the index: opening, schema and its migrations, transactions, and recovery from damage.

`IndexFile` runs the statements; its subclass `Index` in `index` has the queries.
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
_MOST_VERSION = 1000  # a larger number is no version of any program, but a damaged header
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
# The tables and SQL indexes of each version. A file with any other object, such as a trigger, was not made by Icebox.
_OLD_OBJECTS = {"shards", "rows", "rows_by_key", "files", "quarantine"}
_OBJECTS = {0: set[str](), 1: _OLD_OBJECTS, 2: _OLD_OBJECTS, VERSION: {*_OLD_OBJECTS, "urls"}}
_NOT_WRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn SQLite's errors about a damaged file into IndexDamagedError; other errors are raised unchanged."""
    try:
        yield
    except UnicodeDecodeError as error:  # SQLite's message about a damaged schema contains its bytes
        raise IndexDamagedError(path, f"what it holds is no text: {error}", certain=True) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_READONLY_DBMOVED:
            raise IndexDamagedError(path, "it was removed while it was in use") from error
        if (code & 0xFF) in _DAMAGED:
            raise IndexDamagedError(path, str(error), foreign=code == sqlite3.SQLITE_NOTADB) from error
        if "unsupported file format" in str(error):  # a byte of the header is wrong
            raise IndexDamagedError(path, str(error), certain=True) from error
        if "decode to UTF-8" in str(error):  # SQLite's own check accepts a damaged text column
            raise IndexDamagedError(path, str(error), certain=True) from error
        raise


class IndexFile:
    """The open database file, with methods to run statements on it.

    A file that is damaged, or is no index, is moved aside and a new one is created. A file named by ICEBOX_INDEX that
    is no index is refused instead, as the user may have named it by mistake. Such an index belongs to one cache, whose
    folder is `of`: shards are recorded by the name of their space, and two caches can have spaces of one name.
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
        """Mark an index named by ICEBOX_INDEX as this cache's. Raises CacheError if another cache has marked it."""
        if self._of is None:
            return db
        mark = int.from_bytes(hashlib.sha256(os.fsencode(self._of.resolve())).digest()[:4]) >> 1 or 1  # 31 bits
        with damage_named(self.path):
            (found,) = db.execute("PRAGMA application_id").fetchone()
            if not found:
                with suppress(sqlite3.OperationalError):  # a read-only index needs no mark: no cache can write to it
                    db.execute(f"PRAGMA application_id = {mark}")
        if found in (0, mark):
            return db
        db.close()
        raise CacheError(
            f"ICEBOX_INDEX names {self.path}, the index of another cache than {self._of}: name another file; if the "
            "cache was moved, delete this one, it is derived again from the shards"
        )

    def close(self) -> None:
        """Close the database; the object cannot be used afterwards."""
        self._db.close()

    def check(self) -> None:
        """Check every page of the file with SQLite's `integrity_check`.

        Raises
        ------
        IndexDamagedError
            If SQLite finds damage.
        """
        found = self._all("PRAGMA integrity_check(1)")
        if found != [("ok",)]:
            raise IndexDamagedError(self.path, str(found[0][0]) if found else "no answer")

    def require_writable(self) -> None:
        """Raise CacheError unless the index can be written: computed rows could not be added to it."""
        try:
            with self._reading() as db:
                db.execute("BEGIN IMMEDIATE")
                db.execute(f"PRAGMA user_version = {VERSION}")  # no change, but the write also creates the journal
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
        """Move the damaged file aside and create an empty one, to be filled from the shards."""
        self._db.close()
        set_aside(damage)
        self._db = self._claimed(connect(self.path))

    # Every statement runs through one of the following methods

    def _all(self, query: str, values: Sequence[Any] = (), *kinds: Any) -> list[Any]:
        """Return the rows that a query finds; if `kinds` are given, they are the required types of the columns."""
        with self._reading() as db:
            found = db.execute(query, values).fetchall()
        self._check(found, kinds)
        return found

    def _check(self, rows: Sequence[Sequence[Any]], kinds: Sequence[Any]) -> None:
        """Raise IndexDamagedError if a column has another type than was written: SQLite does not check types."""
        if not rows or not kinds:
            return
        for column, kind in zip(zip(*rows, strict=True), kinds, strict=True):
            if not all(issubclass(found, kind) for found in set(map(type, column))):
                wrong = next(value for value in column if not isinstance(value, kind))
                raise IndexDamagedError(self.path, f"it holds {str(wrong)[:80]!r}, which it cannot", certain=True)

    @contextmanager
    def _believed(self) -> Iterator[None]:
        """Turn errors about wrong values into IndexDamagedError, for bulk reads, where `_check` would be too slow."""
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
        """Store rows that only save work later. If the index cannot be written, log a warning and go on."""
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
        """Run the statements inside as one transaction."""
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
        """Create the temporary table `wanted` of `keys` and `views`, to look up many rows by one join."""
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
    """Return whether the error means that the file, or its folder with SQLite's journal, cannot be written."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_WRITABLE


def set_aside(damage: IndexDamagedError) -> None:
    """Move a damaged index aside; the next process that opens the cache derives a new one from the shards."""
    if not damage.certain and _sound(damage.path):  # another process has replaced the file already
        return
    aside = damage.path.with_name(f"{damage.path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S}")
    logger.warning("%s; it is moved to %s and derived again from the shards", damage.text, aside.name)
    # The journal is moved first: SQLite would apply it to the new file, undoing changes that were never made there.
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
    """Open the index at `path`; create or migrate it if needed. Raises IndexDamagedError and CacheError."""
    if not files.exists(path):
        # SQLite creates files without write permission for the group, whatever the umask; journals copy the file's.
        files.make_file(path)
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
    # Keys are hashes: rows of one shard are spread over the whole index, so that a large cache (32 MiB) helps.
    for setting in ("trusted_schema = OFF", "temp_store = MEMORY", "foreign_keys = ON", "cache_size = -32768"):
        db.execute(f"PRAGMA {setting}")
    version, objects = _version(db)
    if version > _MOST_VERSION and objects in _OBJECTS.values():
        raise IndexDamagedError(path, f"its version is {version:,}")
    if VERSION < version <= _MOST_VERSION:
        raise CacheError(
            f"the index {path} is of version {version}, this program reads {VERSION}; delete it, it is "
            "derived again from the shards"
        )
    if objects != _OBJECTS.get(version):
        raise IndexDamagedError(path, "it is not one that Icebox made", foreign=True)
    if version < VERSION:  # an up-to-date index is not written to: it may be on a read-only file system
        files.about_to("make index", path)
        _bring_up_to_date(db)


def _version(db: sqlite3.Connection) -> tuple[int, set[str]]:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    objects = db.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'").fetchall()
    return version, {name for (name,) in objects}


def _bring_up_to_date(db: sqlite3.Connection) -> None:
    with closing(db.cursor()) as cursor:
        # The version is read again under the lock, as another process may have migrated the index meanwhile.
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
