"""A dataset's rows as one HDF5 file, to be taken elsewhere or read by other programs.

    features (n, h, w, c) or pooled (n, c)   as in the shards
    label    (n,) int32, indices into class_names (k,)
    path, split (n,) text; key (n, 32) uint8, sha256 of the image's bytes; present (n,) bool

Self-contained, or virtual: then the rows stay in the shards, and what is missing there reads as NaN.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from pipeline.cache import storage
from pipeline.cache.index import Located
from pipeline.cache.shard import check_bytes, damage_named, h5_in, opened, row_filters, row_layout
from pipeline.cache.space import FeatureSpace
from pipeline.errors import CacheError, MissingRowsError, ShardDamagedError
from pipeline.progress import size_text
from pipeline.spelling import spelt

FORMAT = "icebox-export"
VERSION = 1
What = Literal["features", "pooled"]
_MARGIN = 1.05  # HDF5's own bookkeeping on top of the rows
_VIRTUAL_ROW_BYTES = 200  # about what key, name, label and split of an image take


@dataclass(frozen=True)
class Columns:
    """What is known of n images beside their features."""

    dataset: str
    keys: Sequence[bytes]
    names: Sequence[str]
    labels: np.ndarray  # (n,) int32
    splits: Sequence[str]
    classes: Sequence[str]


def export(space: FeatureSpace, columns: Columns, out: Path, what: What, *, virtual: bool) -> int:
    """Write the rows of `columns.keys`, in that order, to the new file `out`; return its bytes.

    It appears whole or not at all. With `virtual` it refers to the shards by absolute path, and a row that is
    missing, now or later, is NaN; without, every row must be there.

    Raises
    ------
    MissingRowsError
        If a row is missing and the file is not to be virtual, or none is there.
    CacheError
        If a shard is damaged, or there is no room.
    """
    with space.reading():
        located = space.locate(columns.keys)
        if not virtual:
            space.require(located)
        if not located.found.any():
            raise MissingRowsError(f"none of the rows is in {space.name}; run `features`")
        job = _Export(space, columns, located, what)
        partial = out.with_name(f"{storage.PARTIAL_PREFIX}{out.name}")
        try:
            job.check_room(out, virtual)
            with _written(partial) as (file, sink):
                job.write_columns(file)
                if virtual:
                    job.write_virtual(file)
                else:
                    job.write_rows(file, sink)
            storage.publish(partial, out)
        except BlockingIOError as error:
            raise CacheError(f"another process is writing {out}; wait for it, or name another file") from error
        except OSError as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"cannot write {out}: {error.strerror or error}; make room, or name another file"
            ) from error
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return storage.size(out)


class _Export:
    def __init__(self, space: FeatureSpace, columns: Columns, located: Located, what: What) -> None:
        self._space = space
        self._columns = columns
        self._located = located
        self._what = what
        self._names = {record.id: name for name, record in space.index.shards(space.name).items()}
        first = self._path(int(located.shards[located.found][0]))
        self._shape, self._dtype = row_layout(first, what)  # of one row

    def _path(self, shard: int) -> Path:
        return self._space.shard_path(self._names[shard])

    def check_room(self, out: Path, virtual: bool) -> None:
        """Refuse before a byte is written if the rows cannot fit."""
        totals = self._space.totals()
        row = totals.bytes / totals.rows if self._what == "features" else math.prod(self._shape) * self._dtype.itemsize
        row = _VIRTUAL_ROW_BYTES if virtual else row
        needed, free = round(len(self._columns.keys) * row * _MARGIN), storage.free_bytes(out.parent)
        if needed > free:
            raise CacheError(f"{out} needs about {size_text(needed)}, {size_text(free)} are free; make room")

    def write_columns(self, file: h5py.File) -> None:
        columns, text = self._columns, h5py.string_dtype()
        file.attrs.update({"format": FORMAT, "version": VERSION, "dataset": spelt(columns.dataset)})
        file.attrs["spec"] = json.dumps(self._space.spec.to_dict())
        file["label"] = columns.labels.astype(np.int32)
        file["key"] = self._located.keys
        file["present"] = self._located.found
        for name, values in (("path", columns.names), ("split", columns.splits), ("class_names", columns.classes)):
            file.create_dataset(name, data=np.array([spelt(value).encode() for value in values], object), dtype=text)

    def write_rows(self, file: h5py.File, sink: _Sink) -> None:
        """Copy the rows. Chunks of features are taken as they lie in the shards, without unpacking them."""
        n = len(self._columns.keys)
        filters = row_filters(self._what, (n, *self._shape), self._dtype)
        target: Any = file.create_dataset(self._what, (n, *self._shape), self._dtype, **filters)
        copy = _copy_chunks if self._what == "features" else _copy_values
        with self._space.progress("exporting", n, "rows") as advance:
            for shard, at in self._by_shard():
                path = self._path(shard)
                check_bytes(path)  # an unpacked chunk would tell of damage; these are passed on unseen
                with opened(path) as source:
                    self._check_keys(source, shard, at)
                    copy(source[self._what], self._located.positions[at], target, at)
                if sink.error is not None:  # the rest would be written to nowhere
                    return
                advance(len(at))

    def _by_shard(self) -> Iterator[tuple[int, np.ndarray]]:
        shards = self._located.shards
        order = np.lexsort((self._located.positions, shards))
        for at in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            yield int(shards[at[0]]), at

    def _check_keys(self, source: h5py.File, shard: int, at: np.ndarray) -> None:
        stored: Any = source["key"]
        keys, positions = stored[:], self._located.positions[at]
        row: Any = source[self._what]
        alike = row.shape[1:] == self._shape and positions.max() < len(keys)
        if not alike or not np.array_equal(keys[positions], self._located.keys[at]):
            raise ShardDamagedError(self._path(shard), "holds other rows than the index says")

    def write_virtual(self, file: h5py.File) -> None:
        """Map runs of rows that lie side by side in a shard."""
        n = len(self._columns.keys)
        layout = h5py.VirtualLayout((n, *self._shape), self._dtype)
        shards, positions = self._located.shards, self._located.positions
        ends = np.flatnonzero((np.diff(shards) != 0) | (np.diff(positions) != 1)) + 1
        sources = {shard: self._source(shard, at) for shard, at in self._by_shard() if shard >= 0}
        for run in np.split(np.arange(n), ends):
            shard, start = int(shards[run[0]]), int(positions[run[0]])
            if shard < 0:
                continue
            layout[int(run[0]) : int(run[-1]) + 1] = sources[shard][start : start + len(run)]
        file.create_virtual_dataset(self._what, layout, fillvalue=np.nan)

    def _source(self, shard: int, at: np.ndarray) -> h5py.VirtualSource:
        path = self._path(shard)
        with damage_named(path), opened(path) as file:
            self._check_keys(file, shard, at)
            found: Any = file[self._what]
            return h5py.VirtualSource(str(path.absolute()), self._what, found.shape, found.dtype)


def _copy_chunks(source: Any, positions: np.ndarray, target: Any, at: np.ndarray) -> None:
    zeros = (0,) * (source.ndim - 1)
    for position, place in zip(positions.tolist(), at.tolist(), strict=True):
        mask, chunk = source.id.read_direct_chunk((position, *zeros))
        target.id.write_direct_chunk((place, *zeros), chunk, mask)


def _copy_values(source: Any, positions: np.ndarray, target: Any, at: np.ndarray) -> None:
    rows, order = source[:][positions], np.argsort(at)
    target[at[order]] = rows[order]  # HDF5 takes ascending places only


@contextmanager
def _written(path: Path) -> Iterator[tuple[h5py.File, _Sink]]:
    """Give a new HDF5 file whose disk may fill up: HDF5 would crash the process at its end, so it is not told.

    Raises BlockingIOError if another process is writing it; what a killed one left is begun anew.
    """
    storage.about_to("create", path)
    with storage.open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW) as raw:
        fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raw.truncate(0)
        sink = _Sink(raw.fileno(), lambda: storage.about_to("write", path))
        with h5_in(sink) as file:
            yield file, sink
        if sink.error is not None:
            raise sink.error


class _Sink(io.RawIOBase):
    """A file that takes every write: after the first that fails it keeps them in memory, and remembers why.

    HDF5 reads back what it wrote; were that missing, it would crash.
    """

    def __init__(self, handle: int, before_write: Callable[[], None]) -> None:
        self._handle = handle
        self._before_write = before_write
        self._at = 0
        self._size = 0
        self._kept: list[tuple[int, bytes]] = []  # (offset, block), the later ones over the earlier ones
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        block = bytes(data)
        if self.error is None:
            try:
                self._before_write()
                done = 0
                while done < len(block):
                    done += os.pwrite(self._handle, block[done:], self._at + done)
            except OSError as error:
                self.error = error
        if self.error is not None:
            self._kept.append((self._at, block))
        self._at += len(block)
        self._size = max(self._size, self._at)
        return len(block)

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), self._size - self._at))
        found = bytearray(os.pread(self._handle, size, self._at).ljust(size, b"\0"))
        for start, block in self._kept:
            low, high = max(start, self._at), min(start + len(block), self._at + size)
            if low < high:
                found[low - self._at : high - self._at] = block[low - start : high - start]
        view[:size] = found
        self._at += size
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None, /) -> int:
        self._size = self._at if size is None else size
        if self.error is None:
            try:
                os.ftruncate(self._handle, self._size)
            except OSError as error:
                self.error = error
        return self._size
