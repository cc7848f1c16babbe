"""Check the cache for damage (`cache verify`): report every problem, and with `repair` move damaged shards aside.

Each shard's name, layout, number of rows and keys are checked, and the index is compared with the shards. With
`sample` above 0, that share of the shards is read completely: a shard is named by its sha256, so any change is found.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pipeline.cache.index import ShardRecord
from pipeline.cache.shard import ShardInfo, check_bytes, read_info, read_spec
from pipeline.cache.space import GONE, MOST_DESCRIPTION, Cache, FeatureSpace, is_lost
from pipeline.core import files, machine
from pipeline.core.errors import CacheError, IndexDamagedError, ShardDamagedError, ShardUnreadableError, SpecError
from pipeline.core.locks import exclusive

logger = logging.getLogger(__name__)

ASIDE = "aside"  # the folder in a space where damaged shards are moved


@dataclass(frozen=True)
class Problem:
    """A problem of one file, the number of rows that it affects, and whether it was repaired."""

    path: Path
    problem: str
    rows: int = 0
    repaired: bool = False


@dataclass
class Verification:
    """The numbers of spaces, shards, rows and bytes that were checked, and the problems that were found."""

    spaces: int = 0
    shards: int = 0
    rows: int = 0
    bytes: int = 0
    bytes_read: int = 0  # size of the shards that were read completely
    problems: list[Problem] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether no problem was found, or all were repaired."""
        return all(problem.repaired for problem in self.problems)


def verify(cache: Cache, *, space: str | None = None, sample: float = 0.0, repair: bool = False) -> Verification:
    """Check all spaces, or one; the share `sample` (0 to 1) of each space's shards is read completely.

    With `repair`, damaged shards are moved aside, and their rows count as missing from then on. An index that
    disagrees with undamaged shards is corrected. A lost space.json is written again from the spec in the shards.

    Raises
    ------
    SpecError
        If there is no space of that name.
    """
    done = Verification()
    _check_index(cache, done)
    for name in _folders(cache, space):
        lock = exclusive(cache.root / name / ".lock", _waiting, needed=True) if repair else nullcontext()
        with lock:
            found = _open(cache, name, repair, done)
            if found is not None:
                _Space(found, sample, repair, done).check()
    return done


def _waiting(holder: str) -> None:
    logger.warning("waiting: %s is writing to this feature space", holder)


def _check_index(cache: Cache, done: Verification) -> None:
    try:
        cache.index.check()
    except IndexDamagedError as error:  # repaired even without `repair`, as every command does that
        cache.index.renew(error)
        done.problems.append(Problem(error.path, error.reason, repaired=True))


def _folders(cache: Cache, space: str | None) -> list[str]:
    """Return the folders of spaces, also of those that have shards but have lost their space.json."""
    names = [name for name in files.list_folders(cache.root) if _holds_something(cache.root / name)]
    if space is None:
        return names
    if space not in names:
        raise SpecError(f"no feature space named {space!r} in {cache.root}; there are: {', '.join(names) or 'none'}")
    return [space]


def _holds_something(folder: Path) -> bool:
    """Return whether a folder has a space.json or shards; a process killed while creating a space leaves neither."""
    return files.exists(folder / "space.json") or is_lost(folder)


def _open(cache: Cache, name: str, repair: bool, done: Verification) -> FeatureSpace | None:
    path = cache.root / name
    try:
        return cache.open(name, sync=False)
    except SpecError as error:
        problem = str(error) if files.exists(path / "space.json") else "is missing"
        mended = repair and _may_be_replaced(path / "space.json") and _describe_again(cache, path)
        rows = sum(record.rows for record in cache.index.shards(name).values())
        done.problems.append(Problem(path / "space.json", problem, rows, repaired=mended))
        return cache.open(name, sync=False) if mended else None


def _may_be_replaced(path: Path) -> bool:
    """Return whether space.json is missing, or readable and so damaged; without read permission it may be sound."""
    try:
        files.read_small(path, MOST_DESCRIPTION)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _describe_again(cache: Cache, path: Path) -> bool:
    """Write space.json from the spec stored in a shard; return whether a shard with a matching spec was found."""
    for name in files.list_files(path / "shards"):
        try:
            spec = read_spec(path / "shards" / name)
        except (CacheError, SpecError):
            continue
        if spec.directory == path.name:
            cache.describe(path, spec, {"described_again": datetime.now(UTC).isoformat(timespec="seconds")})
            return True
    return False


class _Space:
    """The check of one space."""

    def __init__(self, space: FeatureSpace, sample: float, repair: bool, done: Verification) -> None:
        self._space = space
        self._index = space.index
        self._sample = sample
        self._repair = repair
        self._done = done

    def check(self) -> None:
        # The index is read first: a shard published in between is then only unlisted, which is no problem.
        known = self._index.shards(self._space.name)
        shards = self._space.shard_files()
        self._foreign(files.list_entries(self._space.shards) - shards.keys())
        sizes = {name.removesuffix(".h5"): stat.st_size for name, stat in shards.items()}
        if sizes.keys() - known.keys() and known.keys() - sizes.keys():
            # Another machine with its own index may have repacked shards: then no row is lost.
            self._space.sync()
            known = self._index.shards(self._space.name)
        self._done.spaces += 1
        self._shards(sizes, known)
        self._gone(known, sizes)

    def _foreign(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            if not files.is_partial(name):
                path = self._space.shards / name
                self._report(Problem(path, "is not named as a shard is, by the hash of its bytes"))

    def _shards(self, sizes: Mapping[str, int], known: Mapping[str, ShardRecord]) -> None:
        names = sorted(sizes)
        to_read = set(random.sample(names, math.ceil(self._sample * len(names))))
        title = f"checking {self._space.name}"
        with (
            ThreadPoolExecutor(machine.reading_threads()) as pool,
            self._space.progress(title, len(names), "shards") as advance,
        ):
            found = pool.map(lambda name: self._examined(name, name in to_read), names)
            for name, result in zip(names, found, strict=True):
                self._one(name, result, known.get(name), sizes[name])
                self._done.bytes_read += sizes[name] if name in to_read else 0
                advance(1)

    def _examined(self, name: str, to_read: bool) -> ShardInfo | CacheError:
        path = self._space.shard_path(name)
        try:
            if to_read:
                check_bytes(path)
            return read_info(path, self._space.spec)
        except CacheError as error:
            return error

    def _one(self, name: str, result: ShardInfo | CacheError, record: ShardRecord | None, size: int) -> None:
        path, rows = self._space.shard_path(name), record.rows if record else 0
        if isinstance(result, ShardInfo):
            try:
                self._space.check_row_shape(result)
            except ShardDamagedError as error:
                result = error
        if isinstance(result, CacheError):
            if files.exists(path) or self._still_good(name):  # otherwise `gc` has removed the shard meanwhile
                self._report(Problem(path, _reason(result), rows), name, is_damage=_is_damage(result))
            return
        self._done.shards += 1
        self._done.rows += len(result.keys)
        self._done.bytes += size
        if record is None or record.state != "good" or self._agrees(record, result):
            return
        # The index or the shard is wrong; the sha256 of the shard decides.
        if isinstance(again := self._examined(name, to_read=True), CacheError):
            self._report(Problem(path, _reason(again), rows), name)
        elif self._still_good(name):
            self._disagreement(name, result)

    def _agrees(self, record: ShardRecord, info: ShardInfo) -> bool:
        try:
            keys, views = self._index.rows(record.id)
        except IndexDamagedError:
            return False
        same_rows = np.array_equal(keys, info.keys) and np.array_equal(views, info.views)
        return same_rows and (record.bytes, record.rows) == (info.bytes, len(info.keys))

    def _disagreement(self, name: str, info: ShardInfo) -> None:
        if self._repair:
            self._index.forget_shards(self._space.name, [name])
            self._space.register(info)
        text = f"says otherwise of shard {self._space.shard_path(name)}, which is sound"
        self._done.problems.append(Problem(self._index.path, text, len(info.keys), repaired=self._repair))

    def _gone(self, known: Mapping[str, ShardRecord], present: Iterable[str]) -> None:
        missing = [record for record in known.values() if record.state != "settled" and record.name not in present]
        for record in missing:
            if record.name in self._index.shards(self._space.name):  # otherwise `gc` has removed the shard meanwhile
                self._report(Problem(self._space.shard_path(record.name), GONE, record.rows), record.name)

    def _still_good(self, name: str) -> bool:
        record = self._index.shards(self._space.name).get(name)
        return record is not None and record.state == "good"

    def _report(self, problem: Problem, shard: str | None = None, *, is_damage: bool = True) -> None:
        """Record a problem of a file; with `repair`, move the file aside, so that its rows count as missing.

        A file that may be sound but cannot be read, for example without permission, is left where it is.
        """
        repair = self._repair and is_damage
        if repair:
            self._move_aside(problem.path)
            if shard is not None:
                self._index.mark_shard(self._space.name, shard, 0, "settled", problem.problem)
        self._done.problems.append(replace(problem, repaired=repair))

    def _move_aside(self, path: Path) -> None:
        if not files.exists(path):
            return
        aside = self._space.path / ASIDE
        files.make_folder(aside)
        target = aside / path.name
        if files.exists(target):
            target = aside / f"{path.stem}-{datetime.now():%Y%m%d-%H%M%S-%f}{path.suffix}"
        files.move(path, target)


def _is_damage(error: CacheError) -> bool:
    """Return whether a shard is damaged: its content is wrong, or the disk fails to read it."""
    return isinstance(error, ShardDamagedError) or (isinstance(error, ShardUnreadableError) and error.from_disk)


def _reason(error: CacheError) -> str:
    return error.problem if isinstance(error, ShardDamagedError | ShardUnreadableError) else str(error)
