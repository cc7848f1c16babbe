"""The feature cache: a folder of feature spaces, each a folder of shards, and the index beside them.

<root>/<space>/space.json        the full spec and who made it
<root>/<space>/shards/<hash>.h5
<root>/cache.db                  or wherever ICEBOX_INDEX says
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
MOST_DESCRIPTION = 2**20  # bytes of a space.json; ours have about 1,000
_SHARD_NAME = re.compile(r"[0-9a-f]{64}\.h5")


@dataclass(frozen=True)
class SpaceTotals:
    """How much a space holds."""

    shards: int
    rows: int
    bytes: int

    @property
    def bytes_per_row(self) -> int | None:
        """Bytes on disk over rows; None without rows."""
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
        """Make the index agree with the shards on disk: adopt the unknown, note the damaged and the vanished.

        A shard is adopted if its bytes hash to its name; one known by name and size needs no second look. Rows
        of all others count as missing.
        """
        with shared(self.path / ".reading"):  # nobody removes a shard between the look at the folder and at the file
            # In this order: a shard published in between is then met as unknown, not taken for vanished.
            known = self.index.shards(self.name)
            sizes = {name.removesuffix(".h5"): stat.st_size for name, stat in self.shard_files().items()}
            changed = {name for name, size in sizes.items() if name in known and known[name].bytes != size}
            good = {name for name, record in known.items() if record.state == "good"}
            gone = sorted(good - sizes.keys())
            for name in gone:  # first: if another machine's `gc` put its rows elsewhere, adopting that settles it
                self.index.mark_shard(self.name, name, known[name].bytes, "bad", GONE)
            self._adopt(sorted(sizes.keys() - (good - changed)), known)
            left = self.index.shards(self.name) if gone else {}
            for name in gone:
                if name in left:
                    self._warn(known[name], GONE)

    def shard_files(self) -> dict[str, os.stat_result]:
        """Return name → stat of the files in the shards' folder that are named as shards are."""
        found = files.list_files(self.shards)
        return {name: stat for name, stat in found.items() if _SHARD_NAME.fullmatch(name)}

    def examine(self, name: str) -> ShardInfo:
        """Return keys and views of a shard, every byte of it checked. Raises ShardDamagedError."""
        path = self.shard_path(name)
        check_bytes(path)
        return read_info(path, self.spec)

    def check_row_shape(self, info: ShardInfo) -> None:
        """Raise ShardDamagedError if a shard's rows are of another shape than those of this space."""
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
        """Return the shape of the rows of most shards: one that somebody laid beside them must not outlaw the rest."""
        good = [record.name for record in self.index.shards(self.name).values() if record.state == "good"]
        found = Counter[tuple[int, ...]]()
        for name in good or [name.removesuffix(".h5") for name in self.shard_files()]:
            with suppress(CacheError):  # a damaged one tells nothing; it is met on its own
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
        """Return where each key is stored, in its one of `views`, by default the plain one."""
        return self.index.locate(self.name, keys, views)

    def has_rows(self, digests: np.ndarray, at: np.ndarray, view: int) -> np.ndarray:
        """Return whether the keys `digests[at]` have a row in one view, (m,) bool.

        `digests` is (n, 32) uint8, and `at` (m,) int64 must be in the order of the keys.
        """
        return self.index.has_rows(self.name, digests, at, view)

    @contextmanager
    def lock(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Be the only writer of this space; on entry what others wrote meanwhile is known."""
        with exclusive(self.path / ".lock", on_wait):
            files.make_folder(self.shards)  # what copies a cache may leave empty folders out
            self.sync()
            yield

    def require_writable(self) -> None:
        """Raise CacheError unless rows can be added and noted. Not for `gc`, which makes room on a full disk."""
        files.require_writable(self.shards)
        self.index.require_writable()

    def remove_leftovers(self) -> None:
        """Remove what killed writers left behind. Only the holder of `lock` may call this."""
        if without_locks():  # somebody may be writing them
            return
        files.remove_partials(self.shards)
        files.remove_partials(self.path)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep `gc` from removing shards that are being read; on entry the index knows what there is."""
        with shared(self.path / ".reading"):
            self.sync()
            yield

    @contextmanager
    def removing(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Wait until nobody reads, and keep readers out. Only the holder of `lock` may call this."""
        with exclusive(self.path / ".reading", on_wait, needed=True):
            yield

    def recipes(self) -> dict[int, Augmentation | None]:
        """Return the number of each view in this space → how it is made, None being the plain image.

        Views that another version made by other means are left out.
        """
        found: dict[int, Augmentation | None] = {0: None}
        for shard, view in self.index.views(self.name):
            if view not in found:
                about = read_recipes(self.shard_path(shard))[view]
                with suppress(ValueError, KeyError, TypeError):  # it may be anything that is JSON
                    found[view] = Augmentation.from_view(about, view)
        return found

    def write(self, rows: Rows) -> ShardInfo:
        """Publish `rows` as a shard. Touches no database, so any thread or machine may call it."""
        return write_shard(self.shards, rows, self.spec)

    def register(self, info: ShardInfo) -> None:
        """Make a published shard's rows known to the index."""
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
        """Return a reader of one dataset of this space's shards."""
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
    """Return whether a folder was a space, and holds shards, but has lost its description."""
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
        """The index, opened, or made, when it is first needed: a command that only lists leaves no cache behind."""
        return Index(self.index_path, self._index_of)

    def close(self) -> None:
        """Close the index."""
        if "index" in vars(self):
            self.index.close()

    def names(self) -> list[str]:
        """Return the names of the spaces on disk, sorted."""
        return [name for name in files.list_folders(self.root) if files.exists(self.root / name / "space.json")]

    def spaces(self) -> list[FeatureSpace]:
        """Return every space on disk that can be opened; of the others it is said why not."""
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
        """Return the space in folder `name`; with `sync`, after a look at which shards there are.

        Raises
        ------
        SpecError
            If there is none, or its description is not one this version reads.
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
        """Return the space of `spec`, made now unless it is on disk already.

        Raises
        ------
        SpecError
            If the folder of that name holds another spec: the whole spec is compared, not its hash.
        CacheError
            If it cannot be written.
        """
        path = self.root / spec.directory
        if not files.exists(path / "space.json"):
            try:
                files.make_folder(path / "shards")
                with exclusive(path / ".lock", lambda holder: None):  # leftovers are removed by whoever holds it
                    self.describe(path, spec, made_by)
            except CacheError:
                raise
            except OSError as error:
                raise CacheError(f"{path} cannot be written ({error}); make room, or see its permissions") from error
        space = self.open(spec.directory)
        if space.spec != spec:  # two specs under one hash
            raise SpecError(f"{path} holds another feature space; move it away")
        return space

    def describe(self, path: Path, spec: FeatureSpec, made_by: Mapping[str, Any]) -> None:
        """Write the description of the space in folder `path`."""
        text = json.dumps({"spec": spec.to_dict(), "made_by": dict(made_by)}, indent=1)
        files.write_whole(path / "space.json", text.encode())

    def choose(self, request: FeatureRequest, keys: Keys, views: Sequence[int] = (0,)) -> FeatureSpace | None:
        """Return the space that agrees with all stated fields and holds most of `keys` in `views`; None if none does.

        Rows in shards that are damaged count only where no space has whole ones. Among equals trained weights come
        before untrained ones, then the name decides.
        """
        agreeing = [space for space in self.spaces() if not request.differences(space.spec)]
        if not agreeing:
            return None
        first = keys.grouped().first
        best, most = None, (0, 0, False)
        for space in agreeing:
            if len(agreeing) > 1:
                found = sum(int(space.has_rows(keys.digests, first, view).sum()) for view in views)
            else:  # as a rule: one row is enough
                found = any(self.index.has_any(space.name, keys.digests, first, view) for view in views)
            lost = sum(self.index.count_lost(space.name, keys.digests, first, view) for view in views)
            rank = (found, lost, not space.spec.untrained)
            if found + lost > 0 and rank > most:
                best, most = space, rank
        return best
