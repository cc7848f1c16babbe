"""Cached rows as training data: in memory when they fit, else read from the shards batch by batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pipeline.cache.index import Located
from pipeline.cache.space import FeatureSpace, ShardReader

logger = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.5  # of what is available now; training needs room beside the rows


class Rows(Protocol):
    """n rows that can be asked for by index; a numpy array is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, …)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray: ...


class StoredRows:
    """Rows left on disk. One image is one chunk, so a shuffled batch reads no byte it does not need."""

    def __init__(self, reader: ShardReader, located: Located, shape: tuple[int, ...]) -> None:
        self._reader = reader
        self._located = located
        self.shape = (len(located.shards), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self._reader.read(self._located.take(indices))


def open_rows(space: FeatureSpace, keys: Sequence[bytes], dataset: str, splits: Sequence[np.ndarray]) -> list[Rows]:
    """Return the rows of `dataset` ("features" or "pooled") for each split, given as indices into `keys`.

    They are read into memory if all of them fit into half of what is available, which is said; pooled rows
    always are.
    """
    import psutil

    located = space.locate(keys)
    space.require(located)
    reader = space.reader(dataset)
    shape, dtype = reader.layout(located)
    size = sum(map(len, splits)) * math.prod(shape) * dtype.itemsize
    room = psutil.virtual_memory().available
    fits = dataset == "pooled" or size <= _SHARE_OF_MEMORY * room
    where = "read into memory" if fits else "read from disk batch by batch"
    logger.info("%s rows, %.2f GB, are %s (%.1f GB free)", f"{sum(map(len, splits)):,}", size / 1e9, where, room / 1e9)
    stored = [StoredRows(reader, located.take(at), shape) for at in splits]
    return [rows[np.arange(len(rows))] for rows in stored] if fits else list(stored)


def blocks(rows: Rows, size: int = 256) -> list[np.ndarray]:
    """Return consecutive index ranges that cover `rows`, for passes that must not hold them all."""
    return [np.arange(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
