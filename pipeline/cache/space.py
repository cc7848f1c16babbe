"""The feature cache (`Cache`): a folder of feature spaces (`FeatureSpace`), each with its shards, and one index.

<root>/<space>/space.json        the full spec, and the program and versions that made it
<root>/<space>/shards/<hash>.h5
<root>/cache.db                  the index, or the file named by ICEBOX_INDEX
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.index import Index, RowLocations, ShardRecord
from pipeline.cache.keys import Keys
from pipeline.cache.reader import ShardReader
from pipeline.cache.shard import Rows, ShardInfo, check_bytes, read_info, read_recipes, row_layout, write_shard
from pipeline.core import files, machine
from pipeline.core.errors import CacheError, MissingRowsError, ShardDamagedError, SpecError, did_you_mean
from pipeline.core.locks import exclusive, shared, without_locks
from pipeline.core.progress import Progress, silent
from pipeline.core.spec import Augmentation, FeatureRequest, FeatureSpec

logger = logging.getLogger(__name__)

GONE = "is gone from the disk"
MOST_DESCRIPTION = 2**20  # bytes of a space.json at most; those of Icebox have about 1,000
_SHARD_NAME = re.compile(r"[0-9a-f]{64}\.h5")


@dataclass(frozen=True)
class SpaceTotals:
    """The numbers of shards, rows and bytes in a space."""

    shards: int
    rows: int
    bytes: int

    @property
    def bytes_per_row(self) -> int | None:
        """Bytes on disk per row; None if the space has no row."""
        return round(self.bytes / self.rows) if self.rows else None


class FeatureSpace:
    """One feature space on disk, open for reading and adding rows."""

    def __init__(
        self, path: Path, spec: FeatureSpec, provenance: Mapping[str, Any], index: Index, progress: Progress = silent
    ) -> None:
        self.path = path
        self.spec = spec
        self.provenance = provenance
        self.index = index
        self.progress = progress
        self.shards = path / "shards"
        self._row_shape: tuple[int, ...] | None = None  # of a row's features, once it is known

    @property
    def name(self) -> str:
        """The folder's name, which `--space` takes."""
        return self.path.name

    def sync(self) -> None:
        """Update the index from the shards on disk: add unlisted shards, mark damaged and deleted ones.

        A shard is added if the sha256 of its bytes is its name. A listed shard of unchanged size is not read again.
        Rows of all other shards count as missing.
        """
        with shared(self.path / ".reading"):  # no process removes a shard between listing the folder and reading it
            # The index is read first: a shard published in between is then unlisted, not mistaken for a deleted one.
            known = self.index.shards(self.name)
            sizes = {name.removesuffix(".h5"): stat.st_size for name, stat in self.shard_files().items()}
            changed = {name for name, size in sizes.items() if name in known and known[name].bytes != size}
            good = {name for name, record in known.items() if record.state == "good"}
            gone = sorted(good - sizes.keys())
            for name in gone:  # before adding: shards that another machine's `gc` repacked replace the lost rows
                self.index.mark_shard(self.name, name, known[name].bytes, "bad", GONE)
            self._adopt(sorted(sizes.keys() - (good - changed)), known)
            left = self.index.shards(self.name) if gone else {}
            for name in gone:
                if name in left:
                    self._warn(known[name], GONE)

    def shard_files(self) -> dict[str, os.stat_result]:
        """Return file name → stat of the files in the shards' folder that have the name of a shard."""
        found = files.list_files(self.shards)
        return {name: stat for name, stat in found.items() if _SHARD_NAME.fullmatch(name)}

    def examine(self, name: str) -> ShardInfo:
        """Return the keys and views of a shard after checking every byte. Raises ShardDamagedError."""
        path = self.shard_path(name)
        check_bytes(path)
        return read_info(path, self.spec)

    def check_row_shape(self, info: ShardInfo) -> None:
        """Raise ShardDamagedError if a shard's rows have another shape than those of this space."""
        self._row_shape = self._row_shape or self._described_shape() or self._usual_shape() or info.row_shape
        if self._row_shape != info.row_shape:
            found, expected = ("x".join(map(str, shape)) for shape in (info.row_shape, self._row_shape))
            raise ShardDamagedError(
                self.shard_path(info.name), f"is not of this space: its rows are {found}, those of others {expected}"
            )

    def _described_shape(self) -> tuple[int, ...] | None:
        stored = self.provenance.get("row_shape")
        plain = isinstance(stored, list) and all(isinstance(side, int) for side in stored)
        return tuple(stored) if plain and stored else None

    def _usual_shape(self) -> tuple[int, ...] | None:
        """Return the row shape of most shards: a foreign shard in the folder must not make the others look damaged."""
        good = [record.name for record in self.index.shards(self.name).values() if record.state == "good"]
        found = Counter[tuple[int, ...]]()
        for name in good or [name.removesuffix(".h5") for name in self.shard_files()]:
            with suppress(CacheError):  # a damaged shard does not count here; it is reported when it is read
                found[row_layout(self.shard_path(name), "features")[0]] += 1
        return found.most_common(1)[0][0] if found else None

    def shard_path(self, name: str) -> Path:
        """Return the file of the shard `name`."""
        return self.shards / f"{name}.h5"

    def _adopt(self, names: Sequence[str], known: Mapping[str, ShardRecord]) -> None:
        if not names:
            return
        with (
            ThreadPoolExecutor(machine.reading_threads()) as pool,
            self.progress("checking shards the index does not know", len(names), "shards") as advance,
        ):
            for name, found in zip(names, pool.map(self._examined, names), strict=True):
                try:
                    if isinstance(found, ShardDamagedError):
                        raise found
                    self.check_row_shape(found)
                    self.register(found)
                except ShardDamagedError as error:
                    record = known.get(name) or ShardRecord(0, name, 0, 0, "good", None)
                    self._pass_over(record, error.problem)
                advance(1)

    def _examined(self, name: str) -> ShardInfo | ShardDamagedError:
        try:
            return self.examine(name)
        except ShardDamagedError as error:
            return error

    def _pass_over(self, record: ShardRecord, problem: str) -> None:
        self._warn(record, problem)
        if (record.state, record.problem) != ("bad", problem):
            self.index.mark_shard(self.name, record.name, record.bytes, "bad", problem)

    def _warn(self, record: ShardRecord, problem: str) -> None:
        rows = f"its {record.rows:,} rows count" if record.rows else "what rows it has count"
        path = self.shard_path(record.name)
        logger.warning("shard %s %s; %s as missing; `cache verify` tells more", path, problem, rows)

    def totals(self) -> SpaceTotals:
        """Return the numbers of shards, rows and bytes."""
        return SpaceTotals(*self.index.totals(self.name))

    def locate(self, keys: Sequence[bytes], views: Sequence[int] | None = None) -> RowLocations:
        """Return where the row of each key is stored; `views` names a view for each key, by default the plain one."""
        return self.index.locate(self.name, keys, views)

    def has_rows(self, digests: np.ndarray, at: np.ndarray, view: int) -> np.ndarray:
        """Return for each key of `digests[at]` whether it has a row in `view`, (m,) bool.

        `digests` is (n, 32) uint8. `at` is (m,) int64 and must list the keys in ascending order.
        """
        return self.index.has_rows(self.name, digests, at, view)

    @contextmanager
    def lock(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Hold the space as its only writer. On entry the index is synchronised with shards that others wrote."""
        with exclusive(self.path / ".lock", on_wait):
            files.make_folder(self.shards)  # a program that copied the cache may have left out empty folders
            self.sync()
            yield

    def require_writable(self) -> None:
        """Raise CacheError unless shards and index can be written. `gc` skips this: it must work on a full disk."""
        files.require_writable(self.shards)
        self.index.require_writable()

    def remove_leftovers(self) -> None:
        """Remove the partial files of killed writers. Call this only while holding `lock`."""
        if without_locks():  # another process may be writing them
            return
        files.remove_partials(self.shards)
        files.remove_partials(self.path)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep `gc` from removing shards while they are read. On entry the index is synchronised with the disk."""
        with shared(self.path / ".reading"):
            self.sync()
            yield

    @contextmanager
    def removing(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Wait until no process reads, and keep readers out. Call this only while holding `lock`."""
        with exclusive(self.path / ".reading", on_wait, needed=True):
            yield

    def recipes(self) -> dict[int, Augmentation | None]:
        """Return view number → augmentation, for each view in this space; None is the plain image.

        Views of another augmentation policy, as of another version of Icebox, are left out.
        """
        found: dict[int, Augmentation | None] = {0: None}
        for shard, view in self.index.views(self.name):
            if view not in found:
                about = read_recipes(self.shard_path(shard))[view]
                with suppress(ValueError, KeyError, TypeError):  # the stored description may be any JSON value
                    found[view] = Augmentation.from_view(about, view)
        return found

    def write(self, rows: Rows) -> ShardInfo:
        """Publish `rows` as a shard. Any thread or machine may call this, as the index is not used."""
        return write_shard(self.shards, rows, self.spec)

    def register(self, info: ShardInfo) -> None:
        """Add a published shard and its rows to the index."""
        self.index.add_shard(self.name, info)

    def read(self, keys: Sequence[bytes], dataset: str) -> np.ndarray:
        """Return the rows of `keys`, in their order: "features" (n, h, w, c) or "pooled" (n, c) float32.

        Raises
        ------
        MissingRowsError
            If a key has no row.
        CacheError
            If a shard is damaged.
        """
        located = self.locate(keys)
        self.require(located)
        return self.reader(dataset).read(located)

    def require(self, located: RowLocations) -> None:
        """Raise MissingRowsError if a row was not found."""
        if not located.found.all():
            lost = int((~located.found).sum())
            raise MissingRowsError(f"{lost:,} of {len(located.found):,} rows are not in {self.name}; run `features`")

    def reader(self, dataset: str) -> ShardReader:
        """Return a reader of `dataset`, "features" or "pooled", from this space's shards."""
        names = {record.id: name for name, record in self.index.shards(self.name).items()}
        return ShardReader(self.shards, names, dataset)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


def is_lost(folder: Path) -> bool:
    """Return whether a folder holds shards but no space.json."""
    described = files.exists(folder / "space.json")
    return not described and not all(map(files.is_partial, files.list_files(folder / "shards")))


class Cache:
    """All feature spaces under one folder."""

    def __init__(self, root: Path, progress: Progress = silent) -> None:
        self.root = root
        self.progress = progress
        named = os.environ.get("ICEBOX_INDEX")
        self.index_path, self._index_of = Path(named or root / "cache.db"), root if named else None

    @cached_property
    def index(self) -> Index:
        """The index, opened or created at first use, so that a command that only lists creates no file."""
        return Index(self.index_path, self._index_of)

    def close(self) -> None:
        """Close the index."""
        if "index" in vars(self):
            self.index.close()

    def names(self) -> list[str]:
        """Return the names of the spaces on disk, sorted."""
        return [name for name in files.list_folders(self.root) if files.exists(self.root / name / "space.json")]

    def spaces(self) -> list[FeatureSpace]:
        """Return every space on disk that can be opened; a warning gives the reason for each other one."""
        found = []
        for name in files.list_folders(self.root):
            if is_lost(self.root / name):
                logger.warning(
                    "%s holds shards but no space.json, and is passed over; `cache verify --repair` writes it again",
                    self.root / name,
                )
        for name in self.names():
            try:
                found.append(self.open(name))
            except SpecError as error:
                logger.warning("the space %s is passed over: %s", name, error)
        return found

    def open(self, name: str, *, sync: bool = True) -> FeatureSpace:
        """Return the space in folder `name`; with `sync`, update its index from the shards on disk first.

        Raises
        ------
        SpecError
            If there is no such space, or this version cannot read its space.json.
        """
        path = self.root / name
        if name not in self.names():
            have = ", ".join(self.names()) or "none"
            near = did_you_mean(name, self.names())
            raise SpecError(f"no feature space named {name!r} in {self.root}; there are: {have}{near}")
        try:
            text = files.read_small(path / "space.json", MOST_DESCRIPTION)
            stored = json.loads(text, parse_constant=_no_number, parse_float=_finite)
            spec = FeatureSpec.from_dict(stored["spec"])
            made_by = dict(stored["made_by"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SpecError(f"{path / 'space.json'} is not readable ({error}); see `cache verify`") from error
        except OSError as error:
            raise SpecError(f"{path / 'space.json'} cannot be read ({error}); see `cache verify`") from error
        if spec.directory != name:
            raise SpecError(f"{path} holds another feature space than its name says; move it away")
        space = FeatureSpace(path, spec, made_by, self.index, self.progress)
        if sync:
            space.sync()
        return space

    def create(self, spec: FeatureSpec, made_by: Mapping[str, Any]) -> FeatureSpace:
        """Return the space of `spec`, creating it unless it is on disk already.

        Raises
        ------
        SpecError
            If the folder of that name holds another spec. The whole spec is compared, not its hash.
        CacheError
            If the folder cannot be written.
        """
        path = self.root / spec.directory
        if not files.exists(path / "space.json"):
            try:
                files.make_folder(path / "shards")
                with exclusive(path / ".lock", lambda holder: None):  # a holder of this lock removes partial files
                    self.describe(path, spec, made_by)
            except CacheError:
                raise
            except OSError as error:
                raise CacheError(f"{path} cannot be written ({error}); make room, or see its permissions") from error
        space = self.open(spec.directory)
        if space.spec != spec:  # two specs have the same hash
            raise SpecError(f"{path} holds another feature space; move it away")
        return space

    def describe(self, path: Path, spec: FeatureSpec, made_by: Mapping[str, Any]) -> None:
        """Write space.json, the description of the space in folder `path`."""
        text = json.dumps({"spec": spec.to_dict(), "made_by": dict(made_by)}, indent=1)
        files.write_whole(path / "space.json", text.encode())

    def choose(self, request: FeatureRequest, keys: Keys, views: Sequence[int] = (0,)) -> FeatureSpace | None:
        """Return the space that matches `request` and has the most rows of `keys` in `views`; None if none has any.

        Rows in damaged shards count only if two spaces have equally many rows in good shards. After that, trained
        weights come before untrained ones, then the first name wins.
        """
        agreeing = [space for space in self.spaces() if not request.differences(space.spec)]
        if not agreeing:
            return None
        first = keys.grouped().first
        best, most = None, (0, 0, False)
        for space in agreeing:
            if len(agreeing) > 1:
                found = sum(int(space.has_rows(keys.digests, first, view).sum()) for view in views)
            else:  # the usual case: with one candidate, one row is enough
                found = any(self.index.has_any(space.name, keys.digests, first, view) for view in views)
            lost = sum(self.index.count_lost(space.name, keys.digests, first, view) for view in views)
            rank = (found, lost, not space.spec.untrained)
            if found + lost > 0 and rank > most:
                best, most = space, rank
        return best
