"""The feature cache: a folder of feature spaces, each a folder of shards, and the index beside them.

<root>/<space>/space.json        the full spec and who made it
<root>/<space>/shards/<hash>.h5
<root>/cache.db                  or wherever ICEBOX_INDEX says
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import storage
from pipeline.cache.index import Index, Located
from pipeline.cache.lock import exclusive
from pipeline.cache.shard import Rows, ShardInfo, read_info, read_rows, row_layout, write_shard
from pipeline.errors import CacheError, MissingRowsError, SpecError
from pipeline.spec import FeatureRequest, FeatureSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpaceTotals:
    """How much a space holds."""

    shards: int
    rows: int
    bytes: int


class FeatureSpace:
    """One feature space on disk, open for reading and adding rows."""

    def __init__(self, path: Path, spec: FeatureSpec, provenance: Mapping[str, Any], index: Index) -> None:
        self.path = path
        self.spec = spec
        self.provenance = provenance
        self._index = index
        self._shards = path / "shards"
        self.sync()

    @property
    def name(self) -> str:
        """The folder's name, which `--space` takes."""
        return self.path.name

    def sync(self) -> None:
        """Make the index agree with the shards on disk: adopt the unknown, forget the vanished.

        A shard's name is the hash of its bytes, so one known by name needs no second look.
        """
        # In this order: a shard published in between is then met as unknown, not taken for vanished.
        known = self._index.shards(self.name)
        present = {path.stem for path in self._shards.glob("[!.]*.h5")}
        for name in sorted(present - known.keys()):
            self.register(read_info(self._shards / f"{name}.h5", self.spec))
        for name in sorted(known.keys() - present):
            self._index.forget_shard(self.name, name)

    def totals(self) -> SpaceTotals:
        """Return the numbers of shards, rows and bytes."""
        return SpaceTotals(*self._index.totals(self.name))

    def locate(self, keys: Sequence[bytes]) -> Located:
        """Return where the plain view of each key is stored."""
        return self._index.locate(self.name, keys)

    @contextmanager
    def lock(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Be the only writer of this space; on entry what others wrote meanwhile is known."""
        with exclusive(self.path / ".lock", on_wait):
            storage.remove_partials(self._shards)
            self.sync()
            yield

    def write(self, rows: Rows) -> ShardInfo:
        """Publish `rows` as a shard. Touches no database, so any thread or machine may call it."""
        return write_shard(self._shards, rows, self.spec)

    def register(self, info: ShardInfo) -> None:
        """Make a published shard's rows known to the index."""
        self._index.add_shard(self.name, info)

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
        if not located.found.all():
            lost = int((~located.found).sum())
            raise MissingRowsError(f"{lost:,} of {len(keys):,} rows are not in {self.name}; run `features`")
        return self.reader(dataset).read(located)

    def reader(self, dataset: str) -> ShardReader:
        """Return a reader of one dataset of this space's shards."""
        names = {number: name for name, number in self._index.shards(self.name).items()}
        return ShardReader(self._shards, names, dataset)


class ShardReader:
    """Reads rows of one dataset from many shards. Holds no database, so any thread may use it."""

    def __init__(self, directory: Path, names: Mapping[int, str], dataset: str) -> None:
        self._directory = directory
        self._names = names
        self._dataset = dataset

    def read(self, located: Located) -> np.ndarray:
        """Return the located rows in their order; each shard is opened once, its rows read in file order."""
        if not len(located.shards):
            raise MissingRowsError("no rows were asked for")
        order = np.lexsort((located.positions, located.shards))
        starts = np.flatnonzero(np.diff(located.shards[order], prepend=-2))
        shape, dtype = self.layout(located)
        out = np.empty((len(order), *shape), dtype)
        for at in np.split(order, starts[1:]):
            path = self._path(int(located.shards[at[0]]))
            read_rows(path, self._dataset, located.positions[at], out, at)
        return out

    def layout(self, located: Located) -> tuple[tuple[int, ...], np.dtype]:
        """Return the shape and dtype of one row."""
        return row_layout(self._path(int(located.shards[0])), self._dataset)

    def _path(self, shard: int) -> Path:
        if shard not in self._names:
            raise CacheError("a shard was removed while it was to be read; run the command again")
        return self._directory / f"{self._names[shard]}.h5"


class Cache:
    """All feature spaces under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index = Index(Path(os.environ.get("ICEBOX_INDEX") or root / "cache.db"))

    def close(self) -> None:
        """Close the index."""
        self.index.close()

    def names(self) -> list[str]:
        """Return the names of the spaces on disk, sorted."""
        return sorted(path.parent.name for path in self.root.glob("*/space.json"))

    def spaces(self) -> list[FeatureSpace]:
        """Return every space on disk that can be opened; of the others it is said why not."""
        found = []
        for name in self.names():
            try:
                found.append(self.open(name))
            except (SpecError, CacheError) as error:
                logger.warning("the space %s is passed over: %s", name, error)
        return found

    def open(self, name: str) -> FeatureSpace:
        """Return the space in folder `name`.

        Raises
        ------
        SpecError
            If there is none, or its description is not one this version reads.
        """
        path = self.root / name
        if name not in self.names():
            have = ", ".join(self.names()) or "none"
            raise SpecError(f"no feature space named {name!r} in {self.root}; there are: {have}")
        try:
            stored = json.loads((path / "space.json").read_text())
            spec = FeatureSpec.from_dict(stored["spec"])
            made_by = dict(stored["made_by"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpecError(f"{path / 'space.json'} is not readable ({error}); move {path} away") from error
        if spec.directory != name:
            raise SpecError(f"{path} holds another feature space than its name says; move it away")
        return FeatureSpace(path, spec, made_by, self.index)

    def create(self, spec: FeatureSpec, made_by: Mapping[str, Any]) -> FeatureSpace:
        """Return the space of `spec`, made now unless it is on disk already.

        Raises
        ------
        SpecError
            If the folder of that name holds another spec: the whole spec is compared, not its hash.
        """
        path = self.root / spec.directory
        if not (path / "space.json").exists():
            (path / "shards").mkdir(parents=True, exist_ok=True)
            text = json.dumps({"spec": spec.to_dict(), "made_by": dict(made_by)}, indent=1)
            storage.write_whole(path / "space.json", text.encode())
        space = self.open(spec.directory)
        if space.spec != spec:  # two specs under one hash
            raise SpecError(f"{path} holds another feature space; move it away")
        return space

    def choose(self, request: FeatureRequest, keys: Sequence[bytes]) -> FeatureSpace | None:
        """Return the space that agrees with all stated fields and holds most of `keys`; None if none holds any.

        Among equals trained weights come before untrained ones, then the name decides.
        """
        best, most = None, (0, False)
        for space in self.spaces():
            if request.differences(space.spec):
                continue
            rank = (int(space.locate(keys).found.sum()), not space.spec.untrained)
            if rank[0] > 0 and rank > most:
                best, most = space, rank
        return best
