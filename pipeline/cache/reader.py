"""Rows of many shards, read in the order they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.cache.index import RowLocations
from pipeline.cache.shard import read_rows, row_layout
from pipeline.core.errors import CacheError, MissingRowsError


class ShardReader:
    """Reads rows of one dataset from many shards. Holds no database, so any thread may use it."""

    def __init__(self, directory: Path, names: Mapping[int, str], dataset: str) -> None:
        self._directory = directory.absolute()  # it may be sent to a process elsewhere
        self._names = names
        self._dataset = dataset

    def read(self, located: RowLocations, out: np.ndarray | None = None) -> np.ndarray:
        """Return the located rows in their order, in `out` if given; each shard is opened once, in file order."""
        if not len(located.shards):
            raise MissingRowsError("no rows were asked for")
        order = np.lexsort((located.positions, located.shards))
        starts = np.flatnonzero(np.diff(located.shards[order], prepend=-2))
        if out is None:
            shape, dtype = self.layout(located)
            out = np.empty((len(order), *shape), dtype)
        for at in np.split(order, starts[1:]):
            path = self._path(int(located.shards[at[0]]))
            part = located.take(at)
            read_rows(path, self._dataset, part.positions, part.keys, part.views, out, at)
        return out

    def layout(self, located: RowLocations) -> tuple[tuple[int, ...], np.dtype]:
        """Return the shape and dtype of one row."""
        return row_layout(self._path(int(located.shards[0])), self._dataset)

    def _path(self, shard: int) -> Path:
        if shard not in self._names:
            raise CacheError("a shard was removed while it was to be read; run the command again")
        return self._directory / f"{self._names[shard]}.h5"
