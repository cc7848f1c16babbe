"""Read cached rows as training data: into memory if they fit, else streamed from the shards."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.cache.index import RowLocations
from pipeline.cache.space import FeatureSpace, ShardReader
from pipeline.core import machine
from pipeline.core.errors import UsageError
from pipeline.core.units import size_text

logger = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.5  # of the available memory that training itself does not need
_AT_ONCE = 3  # parts of streamed rows in memory together: the one in use, a copy derived from it, the one being read
_PASS_BYTES = 2**24  # bytes of a block in a sequential pass


class Rows(Protocol):
    """Protocol of n rows that are read by an array of indices; a NumPy array satisfies it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, …)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray: ...


class StoredRows:
    """Rows on disk, of which at most `room` bytes are in memory at any time. Can be pickled, and is thread-safe."""

    def __init__(
        self, reader: ShardReader, located: RowLocations, shape: tuple[int, ...], row_bytes: int, room: int
    ) -> None:
        self._reader = reader
        self._located = located
        self.shape = (len(located.shards), *shape)
        self.row_bytes = row_bytes
        self.room = room

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self._reader.read(self._located.take(indices))

    def read_into(self, out: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Read the rows at `indices` into `out` and return it.

        Indices in the order of `as_stored` are fastest, because they need no intermediate copy.
        """
        return self._reader.read(self._located.take(indices), out)

    def buffer(self, rows: int) -> np.ndarray:
        """Return an uninitialised array for `rows` rows."""
        shape, dtype = self._reader.layout(self._located)
        return np.empty((rows, *shape), dtype)

    def take(self, at: np.ndarray) -> StoredRows:
        """Return the rows at these indices, still on disk."""
        return StoredRows(self._reader, self._located.take(at), self.shape[1:], self.row_bytes, self.room)

    def within(self, room: int) -> StoredRows:
        """Return the same rows, of which at most `room` bytes are in memory at any time."""
        return StoredRows(self._reader, self._located, self.shape[1:], self.row_bytes, room)

    @property
    def rows_at_once(self) -> int:
        """The number of rows that may be read at a time, as rows in use and rows read ahead share the room."""
        return self.room // (_AT_ONCE * self.row_bytes)

    def least_room(self, rows: int) -> int:
        """Return the least room, in bytes, that allows reading `rows` rows at a time."""
        return _AT_ONCE * self.row_bytes * rows

    def as_stored(self) -> np.ndarray:
        """Return the indices (n,) in the order in which the rows are stored on disk."""
        return np.lexsort((self._located.positions, self._located.shards))


class _Selected:
    """Some rows of other rows in memory, selected without copying."""

    def __init__(self, rows: Rows, at: np.ndarray) -> None:
        self.whole = rows
        self._at = at
        self.shape = (len(at), *rows.shape[1:])

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self.whole[self._at[indices]]


def select(rows: Rows, at: np.ndarray) -> Rows:
    """Return the rows at these indices, without reading or copying any."""
    return rows.take(at) if isinstance(rows, StoredRows) else _Selected(rows, at)


@dataclass(frozen=True)
class RowSelection:
    """The images of a split, as (n,) indices into a list of keys, and the numbers of the views to read.

    Rows are ordered view by view: all images in the first of `views`, then all images in the next.
    """

    at: np.ndarray
    views: Sequence[int] = (0,)


def stored_rows(
    space: FeatureSpace, keys: Sequence[bytes], dataset: str, splits: Sequence[RowSelection]
) -> list[StoredRows]:
    """Return the rows on disk of `dataset` ("features" or "pooled") for each split of the images `keys`.

    Raises
    ------
    MissingRowsError
        If a row is missing.
    """
    reader, found = space.reader(dataset), []
    for split in splits:
        some = [keys[i] for i in split.at.tolist()]
        located = space.locate(some * len(split.views), np.repeat(split.views, len(some)).tolist())
        space.require(located)
        shape, dtype = reader.layout(located)
        found.append(StoredRows(reader, located, shape, math.prod(shape) * dtype.itemsize, 0))
    return found


def room_for(
    stored: Sequence[StoredRows], *, memory: int | None = None, needed: int = 0, available: int | None = None
) -> int | None:
    """Return None if all rows fit into memory, else the bytes that streamed rows may take. Log the decision.

    Parameters
    ----------
    memory
        Bytes that rows may take; by default half of `available` minus `needed`.
    needed
        Bytes that training takes beside the rows.
    available
        Bytes of memory available; by default those available to this process.

    Raises
    ------
    UsageError
        If the rows do not fit, and `memory` has no room for 48 rows.
    """
    count, row_bytes = sum(map(len, stored)), stored[0].row_bytes
    if memory is None:
        available = machine.available_memory() if available is None else available
        memory = round(_SHARE_OF_MEMORY * max(0, available - needed))
    fits = count * row_bytes <= memory
    if not fits and memory < _AT_ONCE * row_bytes * 16:
        least = _AT_ONCE * 16
        raise UsageError(
            f"--memory must hold {least} rows of {row_bytes:,} bytes, {least * row_bytes:,} in all; found {memory:,}"
        )
    where = "read into memory" if fits else "streamed from disk"
    logger.info(
        "%s rows, %s, are %s (%s allowed)", f"{count:,}", size_text(count * row_bytes), where, size_text(memory)
    )
    return None if fits else memory


def load_or_stream(rows: StoredRows, room: int | None) -> Rows:
    """Return the rows read into memory if `room` is None, else streamed rows that take at most `room` bytes."""
    return rows[np.arange(len(rows))] if room is None else rows.within(room)


def load_or_stream_all(
    stored: Sequence[StoredRows], *, memory: int | None = None, needed: int = 0, available: int | None = None
) -> list[Rows]:
    """Return all rows in memory if they fit together, else streamed rows, as `room_for` decides."""
    room = room_for(stored, memory=memory, needed=needed, available=available)
    return [load_or_stream(rows, room) for rows in stored]


def open_rows(
    space: FeatureSpace,
    keys: Sequence[bytes],
    dataset: str,
    splits: Sequence[RowSelection],
    *,
    memory: int | None = None,
    needed: int = 0,
) -> list[Rows]:
    """Return the rows of `stored_rows`, in memory or streamed as `load_or_stream_all` decides."""
    return load_or_stream_all(stored_rows(space, keys, dataset, splits), memory=memory, needed=needed)


def read_ahead(rows: Rows, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield `rows[part]` for each part in turn; a part on disk is read while the previous one is in use."""
    if _in_memory(rows):
        yield from (rows[part] for part in parts)
    else:
        yield from _ahead(rows.__getitem__, parts)


def _in_memory(rows: Rows) -> bool:
    return isinstance(rows, np.ndarray) or (isinstance(rows, _Selected) and _in_memory(rows.whole))


def read_ahead_in_place(rows: StoredRows, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield `rows[part]` for each part in turn; each array is valid only until the next one is requested.

    Two buffers are reused for all parts, because allocating new memory takes as long as reading.
    """
    buffers = itertools.cycle([rows.buffer(max(map(len, parts))) for _ in range(2)])
    yield from _ahead(lambda part: rows.read_into(next(buffers)[: len(part)], part), parts)


def _ahead(read: Callable[[np.ndarray], np.ndarray], parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield `read(part)` for each part in turn; only the next part is read while one is in use."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        waiting: Future[np.ndarray] | None = None
        for part in parts:
            following = pool.submit(read, part)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _row_bytes(rows: Rows) -> int:
    return math.prod(rows.shape[1:]) * 4


def blocks(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices, rows) of consecutive blocks, for passes that must not load all rows at once."""
    stored = isinstance(rows, StoredRows)
    most = min(_PASS_BYTES // rows.row_bytes, rows.rows_at_once) if stored else _PASS_BYTES // _row_bytes(rows)
    size = max(1, min(1024, most))
    parts = [np.arange(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    yield from zip(parts, read_ahead(rows, parts), strict=True)
