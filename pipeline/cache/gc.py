"""Free disk space (`cache gc`): remove shards without a row to keep, repack wasteful ones, remove leftover files.

A row to keep is called living, any other one dead. A shard is repacked if at least half of its rows are dead or if it
is very small. A new shard is published before those that it replaces are removed. So every living row is in at least
one shard even if the process is killed. A row may then be in two shards; the next run finds and repairs that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.cache.index import Index, ShardRecord
from pipeline.cache.shard import SHARD_BYTES, Rows, read_info, read_whole, row_layout
from pipeline.cache.space import Cache, FeatureSpace
from pipeline.cache.verify import ASIDE
from pipeline.core import files
from pipeline.core.errors import ShardDamagedError, ShardUnreadableError

logger = logging.getLogger(__name__)

SHARD_ROWS = 256  # of a repacked shard, at most
SMALL_ROWS = 64  # shards of fewer rows are merged; if rows are large, those up to a quarter of the largest number
_DEAD_SHARE = 0.5  # a shard is repacked if at least this share of its rows is dead

Row = tuple[bytes, int]  # key and view


@dataclass(frozen=True)
class Retention:
    """The rows to keep: all of them by default, else the rows of `keys` and all rows of `spaces`."""

    keys: Collection[bytes] | None = None
    spaces: Collection[str] = ()

    def everything_of(self, space: str) -> bool:
        """Return whether all rows of the space are kept."""
        return space in self.spaces or (self.keys is None and not self.spaces)

    def lives(self, key: bytes) -> bool:
        """Return whether the rows of `key` are kept in a space that is not kept whole."""
        return self.keys is not None and key in self.keys


@dataclass
class GcResult:
    """The numbers of rows, shards and bytes that were removed and rewritten, or would be with `dry_run`."""

    rows_removed: int = 0
    shards_removed: int = 0
    shards_repacked: int = 0
    shards_written: int = 0
    leftovers: int = 0
    bytes_freed: int = 0
    removed: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Shard:
    record: ShardRecord
    living: np.ndarray  # positions, ascending


def collect(cache: Cache, keep: Retention, *, damaged: bool = False, dry_run: bool = False) -> GcResult:
    """Remove from all spaces the rows that `keep` does not name, and leftover files; return the numbers.

    With `damaged`, shards that `verify` moved aside are removed too. With `dry_run` nothing changes, and the sizes of
    repacked shards are estimated.
    """
    done = GcResult()
    for space in cache.spaces():
        if dry_run:
            _collect_space(space, keep, damaged, True, done)
            continue
        with space.lock(_waiting(space)):
            _collect_space(space, keep, damaged, False, done)
    _tidy_index(cache, dry_run, done)
    return done


def _waiting(space: FeatureSpace) -> Callable[[str], None]:
    return lambda holder: logger.warning("waiting: %s is using %s", holder, space.name)


def _collect_space(space: FeatureSpace, keep: Retention, damaged: bool, dry_run: bool, done: GcResult) -> None:
    for folder in (space.path, space.shards):
        _remove_files(folder, list(filter(files.is_partial, files.list_files(folder))), dry_run, done)
    if damaged:
        _remove_aside(space.path / ASIDE, dry_run, done)
    dead, spent = _disposable(space, keep, dry_run)
    done.rows_removed += sum(shard.record.rows - len(shard.living) for shard in (*dead, *spent))
    done.shards_removed += len(dead)
    done.shards_repacked += len(spent)
    _remove_shards(space, dead, dry_run, done)  # first, as on a full disk repacking needs the freed space
    written = _repack(space, spent, dry_run, done)
    _remove_shards(space, [shard for shard in spent if shard.record.name not in written], dry_run, done)


def _remove_aside(folder: Path, dry_run: bool, done: GcResult) -> None:
    if folder.is_symlink():  # files outside the cache must not be removed
        logger.warning("%s is a link, and is left as it is", folder)
        return
    _remove_files(folder, list(files.list_files(folder)), dry_run, done)


def _disposable(space: FeatureSpace, keep: Retention, dry_run: bool) -> tuple[list[_Shard], list[_Shard]]:
    """Return the shards to remove, which have no living row, and the shards to repack.

    Each of these is checked against the index first, and so is a shard that keeps a row which is in another one too.
    In the latter two cases the sha256 is checked as well. A shard that fails is left for `verify`, with a warning.
    """
    fine: dict[bool, set[str]] = {False: set(), True: set()}  # whether the sha256 was checked → sound shards
    broken = set[str]()
    while True:
        shards, relied_on = _living(space, keep, broken)
        spent = _worth_repacking(space, shards)
        dead = [shard for shard in shards if not len(shard.living)]
        needed = relied_on | {shard.record.name for shard in spent}
        unknown = {True: needed - fine[True], False: {shard.record.name for shard in dead} - needed - fine[False]}
        if not any(unknown.values()):
            return dead, spent
        for every_byte, names in unknown.items():
            for name in sorted(names):
                (fine[every_byte] if _is_sound(space, name, every_byte, dry_run) else broken).add(name)


def _is_sound(space: FeatureSpace, name: str, every_byte: bool, dry_run: bool) -> bool:
    """Return whether a shard agrees with its name and the index; if not, warn and, without `dry_run`, mark it."""
    record = space.index.shards(space.name)[name]
    try:
        info = space.examine(name) if every_byte else read_info(space.shard_path(name), space.spec)
        space.check_row_shape(info)
        keys, views = space.index.rows(record.id)
        if np.array_equal(info.keys, keys) and np.array_equal(info.views, views):
            return True
        problem = "holds other rows than the index says"
        if not dry_run:  # index or shard is wrong: the next process that opens the space checks the shard again
            space.index.forget_shards(space.name, [name])
    except ShardDamagedError as error:
        problem = error.problem
        if not dry_run:
            space.index.mark_shard(space.name, name, record.bytes, "bad", problem)
    except ShardUnreadableError as error:
        problem = error.problem
    logger.warning("shard %s %s; it is left as it is, see `cache verify`", space.shard_path(name), problem)
    return False


def _living(space: FeatureSpace, keep: Retention, broken: Collection[str]) -> tuple[list[_Shard], set[str]]:
    """Return the good shards, each with its living rows, and the names of shards that keep rows of other shards too.

    A row that is in several shards counts as living only in the shard with the most rows.
    """
    records = [r for r in space.index.shards(space.name).values() if r.state == "good" and r.name not in broken]
    everything, seen = keep.everything_of(space.name), dict[Row, str]()
    found, relied_on = [], set[str]()
    for record in sorted(records, key=lambda record: (-record.rows, record.name)):
        keys, views = space.index.rows(record.id)
        living = []
        for position, row in enumerate(zip(map(bytes, keys), views.tolist(), strict=True)):
            if row in seen:
                relied_on.add(seen[row])
            elif everything or keep.lives(row[0]):
                seen[row] = record.name
                living.append(position)
        found.append(_Shard(record, np.array(living, np.int64)))
    return found, relied_on


def _worth_repacking(space: FeatureSpace, shards: Sequence[_Shard]) -> list[_Shard]:
    some = [shard for shard in shards if len(shard.living)]
    spent = [shard for shard in some if len(shard.living) <= (1 - _DEAD_SHARE) * shard.record.rows]
    few = [shard for shard in some if shard not in spent and len(shard.living) < SMALL_ROWS]
    # If rows are large, a full shard has few rows, and is not small.
    small = [shard for shard in few if len(shard.living) <= _most_rows(space, shard) // 4]
    # A single small shard cannot be merged with another one.
    return spent + (small if len(small) + len(spent) > 1 else [])


def _most_rows(space: FeatureSpace, shard: _Shard) -> int:
    """Return the largest number of rows of a repacked shard."""
    try:
        shape, dtype = row_layout(space.shard_path(shard.record.name), "features")
    except (ShardDamagedError, ShardUnreadableError):  # the check of its bytes reports the problem later
        return SHARD_ROWS
    return max(1, min(SHARD_ROWS, SHARD_BYTES // (math.prod(shape) * dtype.itemsize)))


def _repack(space: FeatureSpace, spent: Sequence[_Shard], dry_run: bool, done: GcResult) -> set[str]:
    """Write the living rows of `spent` to new shards; return their names."""
    if dry_run:
        living = sum(len(shard.living) for shard in spent)
        done.shards_written += math.ceil(living / _most_rows(space, spent[0])) if spent else 0
        done.bytes_freed -= sum(round(s.record.bytes * len(s.living) / s.record.rows) for s in spent)
        return set()
    written = set()
    with space.progress("repacking", len(spent), "shards") as advance:
        for rows in _gathered(space, spent, advance):
            info = space.write(rows)
            space.register(info)
            written.add(info.name)
            done.shards_written += 1
            done.bytes_freed -= info.bytes
    return written


def _gathered(space: FeatureSpace, spent: Sequence[_Shard], advance: Callable[[int], None]) -> Iterator[Rows]:
    """Yield the living rows of `spent` in parts of the size of a full shard; the last part may be smaller."""
    waiting: list[Rows] = []
    for shard in spent:
        path, most = space.shard_path(shard.record.name), _most_rows(space, shard)
        for start in range(0, len(shard.living), most):
            waiting.append(read_whole(path, shard.living[start : start + most]))
            while sum(map(len, waiting)) >= most:
                rows = Rows.join(waiting)
                yield rows.take(slice(0, most))
                waiting = [rows.take(slice(most, None))]
        advance(1)
    if rest := [rows for rows in waiting if len(rows)]:
        yield Rows.join(rest)


def _remove_shards(space: FeatureSpace, shards: Sequence[_Shard], dry_run: bool, done: GcResult) -> None:
    done.removed.extend(space.shard_path(shard.record.name) for shard in shards)
    done.bytes_freed += sum(shard.record.bytes for shard in shards)
    if dry_run or not shards:
        return
    with space.removing(_waiting(space)):
        # The index first: if the process is killed in between, the shard is unlisted and is added again later.
        space.index.forget_shards(space.name, [shard.record.name for shard in shards])
        for shard in shards:
            files.remove(space.shard_path(shard.record.name))
        files.fsync(space.shards)


def _remove_files(folder: Path, names: Sequence[str], dry_run: bool, done: GcResult) -> None:
    sizes = files.list_files(folder)
    for name in names:
        done.leftovers += 1
        done.bytes_freed += sizes[name].st_size if name in sizes else 0
        done.removed.append(folder / name)
        if not dry_run:
            files.remove(folder / name)


def _tidy_index(cache: Cache, dry_run: bool, done: GcResult) -> None:
    """Remove deleted files and spaces from the index, and delete damaged index files that were moved aside."""
    path = cache.index.path
    old = [name for name in files.list_files(path.parent) if name.startswith(f"{path.name}.damaged-")]
    _remove_files(path.parent, old, dry_run, done)
    if not dry_run:
        _forget_vanished(cache.index, set(cache.names()))


def _forget_vanished(index: Index, spaces: Collection[str]) -> None:
    index.forget_digests([path for path in index.files() if not files.exists(path)])
    for space in set(index.spaces()) - set(spaces):
        index.forget_shards(space, index.shards(space))
