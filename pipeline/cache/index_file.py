"""The index as a file: opened, made, brought up to date, set aside when it is damaged. What it holds, `index` knows."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

from pipeline.cache import storage
from pipeline.errors import CacheError, IndexDamagedError

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
        if "decode to UTF-8" in str(error):  # a name that is no text any more: SQLite sees no fault in that
            raise IndexDamagedError(path, str(error), certain=True) from error
        raise


def set_aside(damage: IndexDamagedError) -> None:
    """Move a damaged index out of the way; whoever opens the cache next derives a new one from the shards."""
    if not damage.certain and _sound(damage.path):  # another process has done so already
        return
    aside = damage.path.with_name(f"{damage.path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S}")
    logger.warning("%s; it is moved to %s and derived again from the shards", damage.text, aside.name)
    # The journal first: SQLite would take it for the new file's and undo what that never did.
    for ending in ("-journal", "-wal", "-shm", ""):
        found = damage.path.with_name(damage.path.name + ending)
        if storage.exists(found):
            storage.move(found, aside.with_name(aside.name + ending))


def _sound(path: Path) -> bool:
    try:
        with closing(connect(path)) as db, damage_named(path):
            return db.execute("PRAGMA integrity_check(1)").fetchall() == [("ok",)]
    except IndexDamagedError:
        return False


def connect(path: Path) -> sqlite3.Connection:
    """Open the index at `path`, made or brought up to date if need be. Raises IndexDamagedError and CacheError."""
    storage.about_to("open index", path)
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
        storage.about_to("make index", path)
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
