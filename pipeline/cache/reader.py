"""Read rows from many shards, in the requested order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.cache.index import RowLocations
from pipeline.cache.shard import read_rows, row_layout
from pipeline.core.errors import CacheError, MissingRowsError


class ShardReader:
    """Reader of one dataset, "features" or "pooled", from many shards. Any thread may use it, as it opens no database.

    `names` maps the index's shard ids to shard names.
    """

    def __init__(self, directory: Path, names: Mapping[int, str], dataset: str) -> None:
        self._directory = directory.absolute()  # the reader may be sent to a process in another working directory
        self._names = names
        self._dataset = dataset

    def read(self, located: RowLocations, out: np.ndarray | None = None) -> np.ndarray:
        """Return the located rows, in their order, in `out` if given; each shard is opened once, read in file order.

        Raises MissingRowsError if `located` is empty, and CacheError if a shard is gone or damaged.
        """
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
