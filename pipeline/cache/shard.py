"""Write, read and check shards: HDF5 files of up to a few hundred rows, written once and named by their sha256.

Layout (version 1); row i belongs to one view of one image:

    features (n, h, w, c)  float16 or float32, one row per chunk, Zstandard and Fletcher32
    pooled   (n, c)        float32 spatial means, computed before rounding to the storage type; Zstandard, Fletcher32
                           and byte shuffle
    key      (n, 32)       uint8, sha256 of the image's encoded bytes (or raw pixels)
    view     (n,)          int64, 0 for the plain image

The attributes are version (an integer) and, as ASCII bytes, format, spec (canonical JSON) and views (JSON: view
number → recipe, for the views in the shard).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from pipeline.core import files
from pipeline.core.errors import CacheError, ShardDamagedError, ShardUnreadableError
from pipeline.core.spec import FeatureSpec, canonical_json

FORMAT = "icebox-shard"
VERSION = 1
PLAIN: Mapping[int, Any] = {0: "plain"}  # the recipes of rows that have no augmented view
SHARD_BYTES = 2**28  # largest size of a shard's features in memory, if the number of rows is not given
MAX_ROWS = 65_536  # far above what Icebox writes: a file with more rows is not a shard
MAX_ROW_BYTES = 2**27  # of a row as float32; the largest known, EfficientNetB7 cut at its first blocks, has 66 MiB
_CHUNK_BYTES = 2**20
_NOT_THE_SHARDS = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
# HDF5's oldest format has no checksums in its metadata: one flipped bit there can return another row, or zeros,
# without an error. The format of HDF5 1.10 has checksums, and is smaller.
_LIBVER = h5py.h5f.LIBVER_V110


@dataclass(frozen=True)
class Rows:
    """Rows in memory: features (n, h, w, c), pooled (n, c) float32, keys (n, 32) uint8, views (n,) int64.

    `recipes` maps at least each view in `views` to its recipe, JSON values that describe the view.
    """

    features: np.ndarray
    pooled: np.ndarray
    keys: np.ndarray
    views: np.ndarray
    recipes: Mapping[int, Any] = field(default_factory=lambda: PLAIN)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, at: slice | np.ndarray) -> Rows:
        """Return the rows at the indices, slice or mask `at`."""
        return Rows(self.features[at], self.pooled[at], self.keys[at], self.views[at], self.recipes)

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts, in their order."""
        columns = [(part.features, part.pooled, part.keys, part.views) for part in parts]
        recipes = {number: recipe for part in parts for number, recipe in part.recipes.items()}
        return Rows(*(np.concatenate(column) for column in zip(*columns, strict=True)), recipes=recipes)


class RowBuffer:
    """Buffer that collects up to `most` rows from several calls of `add`; each row is copied once."""

    def __init__(self, most: int, recipes: Mapping[int, Any]) -> None:
        self._most = most
        self._recipes = recipes
        self._columns: tuple[np.ndarray, ...] = ()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, rows: Rows) -> None:
        """Copy `rows` to the end of the buffer."""
        some = rows.features, rows.pooled, rows.keys, rows.views
        if not self._columns:
            self._columns = tuple(np.empty((self._most, *each.shape[1:]), each.dtype) for each in some)
        end = self._count + len(rows)
        for column, values in zip(self._columns, some, strict=True):
            column[self._count : end] = values
        self._count = end

    def rows(self) -> Rows:
        """Return the collected rows, at least one, without a copy."""
        return Rows(*(column[: self._count] for column in self._columns), recipes=self._recipes)


@dataclass(frozen=True)
class ShardInfo:
    """The parts of a published shard that the index records: keys (n, 32) uint8 and views (n,) int64 among them."""

    name: str
    bytes: int
    keys: np.ndarray
    views: np.ndarray
    row_shape: tuple[int, ...] = ()  # of one row's features


def write_shard(
    directory: Path, rows: Rows, spec: FeatureSpec, check: Callable[[int], None] = lambda size: None
) -> ShardInfo:
    """Write `rows` as a new shard in `directory`, named by its sha256; `check` gets its size in bytes before writing.

    Raises
    ------
    CacheError
        If the disk is full or cannot be written. No file is left then.
    """
    partial = files.partial_name(directory, ".h5")
    try:
        image = shard_image(rows, spec)
        check(len(image))
        name = hashlib.sha256(image).hexdigest()
        files.write_file(partial, image)
        files.publish(partial, directory / f"{name}.h5")
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(f"cannot write a shard in {directory}: {error}; make room and run again") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # after a successful write the file has its final name
    return ShardInfo(name, len(image), rows.keys, rows.views, rows.features.shape[1:])


def shard_image(rows: Rows, spec: FeatureSpec) -> memoryview:
    """Return the bytes of the shard of `rows`; equal rows give equal bytes.

    HDF5 writes to memory only: after a failed write to a full disk, it would crash the process at its end.
    """
    buffer = io.BytesIO()
    with h5_in(buffer) as file:
        _fill(file, rows, spec)
    return buffer.getbuffer()


def h5_in(file: Any) -> h5py.File:
    """Return a new HDF5 file inside a Python file object; equal content gives equal bytes."""
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, file)
    access.set_libver_bounds(_LIBVER, _LIBVER)
    return h5py.File(h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, creation, access))


def _fill(file: h5py.File, rows: Rows, spec: FeatureSpec) -> None:
    file.attrs["version"] = VERSION
    views = {str(number): rows.recipes[number] for number in np.unique(rows.views).tolist()}
    texts = {"format": FORMAT, "spec": canonical_json(spec.to_dict()), "views": json.dumps(views)}
    for name, text in texts.items():
        # Fixed-length bytes: HDF5 stores other strings without a checksum, and crashes if they are damaged.
        file.attrs[name] = np.bytes_(text.encode("ascii"))
    for name, values in (("features", rows.features), ("pooled", rows.pooled)):
        file.create_dataset(name, data=values, **row_filters(name, values.shape, values.dtype))
    file.create_dataset("key", data=rows.keys, chunks=rows.keys.shape, fletcher32=True)
    file.create_dataset("view", data=rows.views, chunks=rows.views.shape, fletcher32=True)


def row_filters(dataset: str, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """Return chunks, compression and checksum of "features" or "pooled", as keywords of h5py's `create_dataset`."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    whole_row = dataset == "features"
    rows = 1 if whole_row else max(1, min(shape[0], _CHUNK_BYTES // row_bytes))
    # Features are not shuffled: most are 0, and shuffling makes them a tenth larger and slower to decompress.
    # Blosc2 is no smaller, and slower to write and to read (benchmarks/encodings.py).
    zstd = hdf5plugin.Zstd(clevel=1)
    return {"chunks": (rows, *shape[1:]), "fletcher32": True, "shuffle": not whole_row, **zstd}


def read_info(path: Path, spec: FeatureSpec) -> ShardInfo:
    """Return the keys and views of a shard after checking its layout; features are not read.

    Raises
    ------
    ShardDamagedError
        If the file is not a shard of this space.
    """
    with damage_named(path), opened(path) as file:
        if file.attrs.get("spec") != canonical_json(spec.to_dict()).encode():
            raise ShardDamagedError(path, "belongs to another feature space")
        features: Any = file["features"]
        if features.dtype != np.dtype(spec.storage):
            raise ShardDamagedError(path, f"is damaged: its features are {features.dtype}")
        keys, views = _all(file, "key"), _all(file, "view")
        _recipes(file, views, path)
        return ShardInfo(path.stem, files.size(path), keys, views, features.shape[1:])


def check_bytes(path: Path) -> None:
    """Compare the sha256 of a shard's bytes with its name.

    Raises
    ------
    ShardDamagedError
        If they differ.
    ShardUnreadableError
        If the file cannot be read.
    """
    try:
        found = files.sha256_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != path.stem:
        raise ShardDamagedError(path, "is damaged: its bytes are not those it is named by")


def read_spec(path: Path) -> FeatureSpec:
    """Return the spec of a feature space that is stored in a shard. Raises CacheError or SpecError."""
    with damage_named(path), opened(path) as file:
        text: Any = file.attrs["spec"]
        return FeatureSpec.from_dict(json.loads(text))


def row_layout(path: Path, dataset: str) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of one row of `dataset` in a shard."""
    with damage_named(path), opened(path) as file:
        found: Any = file[dataset]
        return found.shape[1:], found.dtype


def read_rows(
    path: Path,
    dataset: str,
    positions: np.ndarray,
    keys: np.ndarray,
    views: np.ndarray,
    out: np.ndarray,
    at: np.ndarray,
) -> None:
    """Read rows `positions` (ascending) of `dataset` from a shard into `out[at]`.

    `keys` (n, 32) and `views` (n,) are compared with those stored in the shard, as the index may be wrong.

    Raises
    ------
    ShardDamagedError
        If the shard is gone or damaged (Fletcher32 detects changed bytes), or has other rows at `positions`.
    """
    with damage_named(path), opened(path) as file:
        stored, seen = _all(file, "key"), _all(file, "view")
        there = positions[-1] < len(stored) and np.array_equal(stored[positions], keys)
        if not there or not np.array_equal(seen[positions], views):
            raise ShardDamagedError(path, "holds other rows than the index says")
        _read(file[dataset], positions, out, at)


def read_whole(path: Path, positions: np.ndarray) -> Rows:
    """Return the rows `positions` (ascending) of a shard, with all their columns. Raises ShardDamagedError."""
    with damage_named(path), opened(path) as file:
        columns = []
        for name in ("features", "pooled", "key", "view"):
            stored: Any = file[name]
            columns.append(np.empty((len(positions), *stored.shape[1:]), stored.dtype))
            _read(stored, positions, columns[-1], np.arange(len(positions)))
        return Rows(*columns, recipes=_recipes(file, columns[-1], path))


def _unreadable(path: Path, error: OSError) -> ShardUnreadableError:
    """Return the error for a shard that may be whole: missing permission must not cause rows to be computed again."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ShardUnreadableError(path, reason, from_disk=error.errno == errno.EIO)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the many errors that h5py raises for a damaged file into ShardDamagedError, which names the remedy."""
    try:
        yield
    except CacheError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise ShardDamagedError(path, f"cannot be read ({error})") from error


def read_recipes(path: Path) -> dict[int, Any]:
    """Return view number → recipe, as stored in a shard. Raises ShardDamagedError."""
    with damage_named(path), opened(path) as file:
        return _recipes(file, _all(file, "view"), path)


def _recipes(file: h5py.File, views: np.ndarray, path: Path) -> dict[int, Any]:
    text: Any = file.attrs["views"]
    found = {int(number): recipe for number, recipe in dict(json.loads(text)).items()} | dict(PLAIN)
    if missing := set(np.unique(views).tolist()) - found.keys():
        raise ShardDamagedError(path, f"is damaged: it does not say what its view {min(missing)} is")
    return found


def _all(file: h5py.File, name: str) -> np.ndarray:
    dataset: Any = file[name]
    return dataset[:]


def _read(dataset: Any, positions: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
    if dataset.chunks[0] > 1:
        # One call reads all rows, as they share chunks.
        first, last = int(positions.min()), int(positions.max())
        out[at] = dataset[first : last + 1][positions - first]
        return
    # One call reads a run of adjacent rows: a call per row takes as long as decompressing the row.
    for run in np.split(np.arange(len(positions)), np.flatnonzero(np.diff(positions) != 1) + 1):
        here, there = np.s_[int(positions[run[0]]) : int(positions[run[-1]]) + 1], at[run]
        if (np.diff(there) == 1).all():
            dataset.read_direct(out, here, np.s_[int(there[0]) : int(there[-1]) + 1])
        else:
            out[there] = dataset[here]


def opened(path: Path) -> h5py.File:
    """Open a shard for reading. Raises ShardDamagedError if its layout is not that of a shard."""
    files.about_to("open shard", path)
    try:
        # Shards never change, so no lock is needed; HDF5's locks fail on NFS and Lustre.
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        if error.errno in _NOT_THE_SHARDS:
            raise _unreadable(path, error) from error
        raise ShardDamagedError(path, f"cannot be opened ({error})") from error
    try:
        _check_layout(file, path)
    except BaseException:
        file.close()
        raise
    return file


def _check_layout(file: h5py.File, path: Path) -> None:
    """Check links, shapes and dtypes before any data is read, as a foreign file may have false ones."""
    if file.attrs.get("format") != FORMAT.encode() or file.attrs.get("version") != VERSION:
        raise ShardDamagedError(path, f"is not an {FORMAT} of version {VERSION}")
    dims = {"features": 4, "pooled": 2, "key": 2, "view": 1}
    shapes = {name: _plain_shape(file, name, ndim, path) for name, ndim in dims.items()}
    n = shapes["key"][0]
    agree = (
        0 < n <= MAX_ROWS
        and all(shape[0] == n for shape in shapes.values())
        and shapes["key"][1] == 32
        and shapes["features"][-1] == shapes["pooled"][-1]
        and file["features"].dtype in (np.float16, np.float32)  # type: ignore[union-attr]
        and file["features"].chunks == (1, *shapes["features"][1:])  # type: ignore[union-attr]
        and 0 < math.prod(shapes["features"][1:]) * 4 <= MAX_ROW_BYTES
        and file["features"].id.get_num_chunks() == n  # type: ignore[union-attr]  # absent chunks read as 0
        and file["pooled"].dtype == np.float32  # type: ignore[union-attr]
        and file["key"].dtype == np.uint8  # type: ignore[union-attr]
        and file["view"].dtype == np.int64  # type: ignore[union-attr]
    )
    if not agree:
        raise ShardDamagedError(path, f"is damaged: its datasets disagree ({shapes})")


def _plain_shape(file: h5py.File, name: str, ndim: int, path: Path) -> tuple[int, ...]:
    link = file.get(name, getlink=True)
    dataset = file.get(name) if isinstance(link, h5py.HardLink) else None
    plain = isinstance(dataset, h5py.Dataset) and not dataset.external and not dataset.is_virtual
    plain = plain and dataset.chunks is not None and dataset.fletcher32  # type: ignore[union-attr]
    # HDF5 decompresses whole chunks: a chunk far larger than the dataset could take gigabytes of memory.
    plain = plain and math.prod(dataset.chunks) * dataset.dtype.itemsize <= MAX_ROW_BYTES  # type: ignore
    if not plain or dataset.ndim != ndim:  # type: ignore[union-attr]
        raise ShardDamagedError(path, f"has no plain dataset {name!r}")
    return dataset.shape  # type: ignore[union-attr]
