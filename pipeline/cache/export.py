"""Export the rows of a dataset to one HDF5 file, to copy to another machine or read with other programs.

    features (n, h, w, c) or pooled (n, c)   as in the shards
    label    (n,) int32, indices into class_names (k,)
    path, split (n,) text; key (n, 32) uint8, sha256 of the image's bytes; present (n,) bool

The file contains the rows, or is virtual: it then refers to the shards, and missing rows read as NaN. HDF5 keeps open
every shard that a virtual dataset has read, nested ones too. The rows of a shard that HDF5 cannot open read as NaN,
without an error.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import h5py
import numpy as np

from pipeline.cache.index import RowLocations
from pipeline.cache.shard import check_bytes, damage_named, h5_in, opened, row_filters, row_layout
from pipeline.cache.space import FeatureSpace
from pipeline.core import files
from pipeline.core.errors import CacheError, MissingRowsError, ShardDamagedError
from pipeline.core.locks import hold_alone, without_locks
from pipeline.core.units import size_text
from pipeline.core.utf8 import to_utf8

FORMAT = "icebox-export"
VERSION = 1
What = Literal["features", "pooled"]
_MARGIN = 1.05  # estimated file size over the size of the rows, for HDF5's metadata
_VIRTUAL_ROW_BYTES = 200  # approximate size of an image's key, name, label and split
_BLOCK_BYTES = 2**26  # of rows in memory at a time
_OTHER_FILES = 64  # number of files that a process may have open beside the shards of a virtual file


@dataclass(frozen=True)
class Columns:
    """The columns of an export beside the features, for n images."""

    dataset: str
    keys: Sequence[bytes]
    names: Sequence[str]
    labels: np.ndarray  # (n,) int32
    splits: Sequence[str]
    classes: Sequence[str]


def export(space: FeatureSpace, columns: Columns, out: Path, what: What, *, virtual: bool) -> int:
    """Write the rows of `columns.keys`, in that order, to the new file `out`; return its bytes.

    The file appears whole or not at all. With `virtual` it refers to the shards by absolute path, and a row that is
    missing, now or later, reads as NaN. Without `virtual` every row must be in the cache.

    Raises
    ------
    MissingRowsError
        If a row is missing and `virtual` is false, or if all rows are missing.
    CacheError
        If a shard is damaged, another process writes `out`, or the disk is full.
    """
    with space.reading():
        located = space.locate(columns.keys)
        if not virtual:
            space.require(located)
        if not located.found.any():
            raise MissingRowsError(f"none of the rows is in {space.name}; run `features`")
        job = _Export(space, columns, located, what)
        partial = out.with_name(f"{files.PARTIAL_PREFIX}{out.name}")
        if without_locks():  # without a lock, two exports could write to the same file
            partial = files.partial_name(out.parent, ".h5")
        try:
            job.check_room(out, virtual)
            if virtual:
                job.check_open_files(out)
            with _locked(partial) as raw:
                with _written(raw, partial) as (file, sink):
                    job.write_columns(file)
                    if virtual:
                        job.write_virtual(file)
                    else:
                        job.write_rows(file, sink)
                job.read_back(partial, virtual)
                files.publish(partial, out)
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
    return files.size(out)


class _Export:
    def __init__(self, space: FeatureSpace, columns: Columns, located: RowLocations, what: What) -> None:
        self._space = space
        self._columns = columns
        self._located = located
        self._what = what
        self._names = {record.id: name for name, record in space.index.shards(space.name).items()}
        self._reader = space.reader(what)
        first = self._path(int(located.shards[located.found][0]))
        self._shape, self._dtype = row_layout(first, what)  # shape and dtype of one row

    def _path(self, shard: int) -> Path:
        return self._space.shard_path(self._names[shard])

    def check_room(self, out: Path, virtual: bool) -> None:
        """Raise CacheError before anything is written if the disk has too little free space for the rows."""
        totals = self._space.totals()
        row = totals.bytes / totals.rows if self._what == "features" else math.prod(self._shape) * self._dtype.itemsize
        row = _VIRTUAL_ROW_BYTES if virtual else row
        needed, free = round(len(self._columns.keys) * row * _MARGIN), files.free_bytes(out.parent)
        if needed > free:
            raise CacheError(f"{out} needs about {size_text(needed)}, {size_text(free)} are free; make room")

    def check_open_files(self, out: Path) -> None:
        """Raise CacheError if a virtual file needs more open shards than allowed: HDF5 would read NaN for the rest."""
        shards, may = len(self._shards), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if may != resource.RLIM_INFINITY and shards > may - _OTHER_FILES:
            raise CacheError(
                f"{out} would refer to {shards:,} shards, but only {may:,} files may be open at once here, and rows of "
                f"the others would read as NaN; leave out --virtual, or raise the limit (`ulimit -n "
                f"{shards + 2 * _OTHER_FILES}`) here and wherever the file is read"
            )

    @property
    def _shards(self) -> np.ndarray:
        """Return the ids of the shards that hold the rows, (s,) int64."""
        return np.unique(self._located.shards[self._located.found])

    def write_columns(self, file: h5py.File) -> None:
        columns, text = self._columns, h5py.string_dtype()
        file.attrs.update({"format": FORMAT, "version": VERSION, "dataset": to_utf8(columns.dataset)})
        file.attrs["spec"] = json.dumps(self._space.spec.to_dict())
        file["label"] = columns.labels.astype(np.int32)
        file["key"] = self._located.keys
        file["present"] = self._located.found
        for name, values in (("path", columns.names), ("split", columns.splits), ("class_names", columns.classes)):
            file.create_dataset(name, data=np.array([to_utf8(value).encode() for value in values], object), dtype=text)

    def write_rows(self, file: h5py.File, sink: _Sink) -> None:
        """Copy the rows. Compressed chunks of features are copied unchanged from shards with the same compression."""
        n = len(self._columns.keys)
        filters = row_filters(self._what, (n, *self._shape), self._dtype)
        target: Any = file.create_dataset(self._what, (n, *self._shape), self._dtype, **filters)
        with self._space.progress("exporting", n, "rows") as advance:
            for shard, at in self._by_shard():
                path = self._path(shard)
                check_bytes(path)  # raw chunks are copied without decompression, which would detect damage
                with opened(path) as source:
                    self._check_keys(source, shard, at)
                    raw = self._what == "features" and _packed_alike(source[self._what], target)
                    if raw:
                        _copy_chunks(source[self._what], self._located.positions[at], target, at)
                if not raw:
                    self._copy_values(target, at)
                if sink.error is not None:  # a write failed, so that the file will be discarded
                    return
                advance(len(at))

    def _copy_values(self, target: Any, at: np.ndarray) -> None:
        """Decompress the rows `at`, all of one shard and in its order, and write them to `target`."""
        for some in self._blocks(at):
            rows, order = self._reader.read(self._located.take(some)), np.argsort(some)
            target[some[order]] = rows[order]  # HDF5 accepts ascending indices only

    def _blocks(self, at: np.ndarray) -> list[np.ndarray]:
        """Split the row indices `at` into parts of up to `_BLOCK_BYTES` of features."""
        most = max(1, _BLOCK_BYTES // (math.prod(self._shape) * self._dtype.itemsize))
        return np.split(at, range(most, len(at), most))

    def read_back(self, path: Path, virtual: bool) -> None:
        """Compare the rows of the written file with those in the shards; of a virtual file, one row of each shard.

        Raises
        ------
        CacheError
            If a row differs, or cannot be read.
        """
        places = np.arange(len(self._columns.keys))
        if virtual:
            shards, first = np.unique(self._located.shards, return_index=True)
            places = np.sort(first[shards >= 0])
        in_shards = places[np.lexsort((self._located.positions[places], self._located.shards[places]))]
        expected = np.zeros(len(self._columns.keys), np.uint32)
        with self._space.progress("reading back", 2 * len(places), "rows") as advance:
            for some in self._blocks(in_shards):
                expected[some] = _checksums(self._reader.read(self._located.take(some)))
                advance(len(some))
            for some, found in zip(self._blocks(places), self._written_rows(path, places), strict=True):
                if not np.array_equal(_checksums(found), expected[some]):
                    raise CacheError(f"{path.name} does not read back as the rows in the shards; export them again")
                advance(len(some))

    def _written_rows(self, path: Path, places: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the rows at the ascending indices `places` of the written file, a block at a time."""
        try:
            with h5py.File(path, "r", locking=False) as file:
                written: Any = file[self._what]
                for some in self._blocks(places):
                    side_by_side = some[-1] - some[0] + 1 == len(some)
                    yield written[int(some[0]) : int(some[-1]) + 1] if side_by_side else written[some]
        except (OSError, RuntimeError, KeyError) as error:
            raise CacheError(f"{path.name} cannot be read back ({error}); export the rows again") from error

    def _by_shard(self) -> Iterator[tuple[int, np.ndarray]]:
        shards = self._located.shards
        order = np.lexsort((self._located.positions, shards))
        for at in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            yield int(shards[at[0]]), at

    def _check_keys(self, source: h5py.File, shard: int, at: np.ndarray) -> None:
        stored: Any = source["key"]
        keys, positions = stored[:], self._located.positions[at]
        row: Any = source[self._what]
        alike = row.shape[1:] == self._shape and row.dtype == self._dtype and positions.max() < len(keys)
        if not alike or not np.array_equal(keys[positions], self._located.keys[at]):
            raise ShardDamagedError(self._path(shard), "holds other rows than the index says")

    def write_virtual(self, file: h5py.File) -> None:
        """Create the virtual dataset; rows that are adjacent in a shard are mapped together."""
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
            return h5py.VirtualSource(self._name(path), self._what, found.shape, found.dtype)

    @staticmethod
    def _name(path: Path) -> str:
        """Return the name of a source file with % escaped, as HDF5 reads such names as printf patterns."""
        return str(path.absolute()).replace("%", "%%")


def _packed_alike(source: Any, target: Any) -> bool:
    """Return whether both datasets have the same chunks, dtype and filters, so that raw chunks can be copied."""
    made = [dataset.id.get_create_plist() for dataset in (source, target)]
    pipelines = [[plist.get_filter(i)[:3] for i in range(plist.get_nfilters())] for plist in made]
    return source.chunks == target.chunks and source.dtype == target.dtype and pipelines[0] == pipelines[1]


def _copy_chunks(source: Any, positions: np.ndarray, target: Any, at: np.ndarray) -> None:
    zeros = (0,) * (source.ndim - 1)
    for position, place in zip(positions.tolist(), at.tolist(), strict=True):
        mask, chunk = source.id.read_direct_chunk((position, *zeros))
        target.id.write_direct_chunk((place, *zeros), chunk, mask)


def _checksums(rows: np.ndarray) -> list[int]:
    return [zlib.crc32(row) for row in np.ascontiguousarray(rows)]


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Yield the file to write, locked by this process and empty; the remains of a killed export are overwritten.

    Raises BlockingIOError if another process is writing it.
    """
    files.about_to("create", path)
    with files.open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW) as raw:
        hold_alone(raw, path)
        raw.truncate(0)
        yield raw


@contextmanager
def _written(raw: BinaryIO, path: Path) -> Iterator[tuple[h5py.File, _Sink]]:
    """Yield a new HDF5 file written to `raw`, with its sink; on leaving, raise the first error of a write.

    The error is kept from HDF5: after a failed write, as on a full disk, HDF5 would crash the process at its end.
    """
    sink = _Sink(raw.fileno(), lambda: files.about_to("write", path))
    with h5_in(sink) as file:
        yield file, sink
    if sink.error is not None:
        raise sink.error


class _Sink(io.RawIOBase):
    """File object that never fails to write. After the first failed write, it keeps further blocks in memory.

    `error` is that first error, or None. The blocks are kept because HDF5 reads back its own blocks, and crashes
    if one is missing.
    """

    def __init__(self, handle: int, before_write: Callable[[], None]) -> None:
        self._handle = handle
        self._before_write = before_write
        self._at = 0
        self._size = 0
        self._kept: list[tuple[int, bytes]] = []  # (offset, block); a later block replaces an earlier one
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
