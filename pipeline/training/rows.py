"""Cached rows as training data: in memory when they fit, else read from the shards as they are needed."""

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

_SHARE_OF_MEMORY = 0.5  # of what is available and not needed otherwise
_AT_ONCE = 3  # parts of what is streamed that are in memory together: in use, what is made of it, being read
_PASS_BYTES = 2**24  # read at once where rows are gone through in order


class Rows(Protocol):
    """n rows that can be asked for by index; a numpy array is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, …)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray: ...


class StoredRows:
    """Rows left on disk, of which at most `room` bytes are held at any time. May be pickled and used by any thread."""

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
        """Return the rows in `out`; quickest in the order of `as_stored`, which needs no copy in between."""
        return self._reader.read(self._located.take(indices), out)

    def buffer(self, rows: int) -> np.ndarray:
        """Return room for so many rows."""
        shape, dtype = self._reader.layout(self._located)
        return np.empty((rows, *shape), dtype)

    def take(self, at: np.ndarray) -> StoredRows:
        """Return the rows at these indices, still on disk."""
        return StoredRows(self._reader, self._located.take(at), self.shape[1:], self.row_bytes, self.room)

    def within(self, room: int) -> StoredRows:
        """Return the same rows, of which at most `room` bytes are held."""
        return StoredRows(self._reader, self._located, self.shape[1:], self.row_bytes, room)

    @property
    def rows_at_once(self) -> int:
        """How many rows may be read at a time, the room being shared by those in use and those read ahead."""
        return self.room // (_AT_ONCE * self.row_bytes)

    def least_room(self, rows: int) -> int:
        """Return the bytes that must be allowed to read so many rows at a time."""
        return _AT_ONCE * self.row_bytes * rows

    def as_stored(self) -> np.ndarray:
        """Return the indices (n,) in the order in which the rows lie on disk."""
        return np.lexsort((self._located.positions, self._located.shards))


class _Selected:
    """Some rows of others that are in memory, not copied."""

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
    """The images of a split, as (n,) indices into some keys, and the numbers of the views to read them in.

    Their rows come view by view: first all images in the first of `views`, then all in the next.
    """

    at: np.ndarray
    views: Sequence[int] = (0,)


def stored_rows(
    space: FeatureSpace, keys: Sequence[bytes], dataset: str, splits: Sequence[RowSelection]
) -> list[StoredRows]:
    """Return the rows of `dataset` ("features" or "pooled") for each split of the images `keys`.

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
    """Return None if all rows fit into `memory` bytes, else how many bytes those that are streamed may take.

    By default it is half of what is `available`, to this process if that is not given, beside the `needed` bytes.
    Which of the two it is, is said.

    Raises
    ------
    UsageError
        If `memory` holds less than a few rows.
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
    """Return rows in memory, or such as take no more than `room` bytes of it."""
    return rows[np.arange(len(rows))] if room is None else rows.within(room)


def load_or_stream_all(
    stored: Sequence[StoredRows], *, memory: int | None = None, needed: int = 0, available: int | None = None
) -> list[Rows]:
    """Return all rows in memory if they fit together, else streamed ones, as `room_for` says."""
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
    """Return `stored_rows` as `hold` has them."""
    return load_or_stream_all(stored_rows(space, keys, dataset, splits), memory=memory, needed=needed)


def read_ahead(rows: Rows, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield `rows[part]` for each part in turn; what is not in memory is read while the part before is in use."""
    if _in_memory(rows):
        yield from (rows[part] for part in parts)
    else:
        yield from _ahead(rows.__getitem__, parts)


def _in_memory(rows: Rows) -> bool:
    return isinstance(rows, np.ndarray) or (isinstance(rows, _Selected) and _in_memory(rows.whole))


def read_ahead_in_place(rows: StoredRows, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield `rows[part]` for each part in turn, good only until the next is asked for.

    Two pieces of memory serve all parts: getting new ones from the system takes as long as the reading.
    """
    buffers = itertools.cycle([rows.buffer(max(map(len, parts))) for _ in range(2)])
    yield from _ahead(lambda part: rows.read_into(next(buffers)[: len(part)], part), parts)


def _ahead(read: Callable[[np.ndarray], np.ndarray], parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield `read(part)` for each part in turn, the next one being read, and no other, while one is in use."""
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
    """Yield indices and rows, block after block, for passes that must not hold them all."""
    stored = isinstance(rows, StoredRows)
    most = min(_PASS_BYTES // rows.row_bytes, rows.rows_at_once) if stored else _PASS_BYTES // _row_bytes(rows)
    size = max(1, min(1024, most))
    parts = [np.arange(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    yield from zip(parts, read_ahead(rows, parts), strict=True)
