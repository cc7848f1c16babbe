"""The cache on disk: shards as documented, damage noticed, an index that can be lost, one writer at a time."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import warm
from conftest import ROOT
from made import SPEC, add, chunk_places, key, made, shard_file

import pipeline.cache.index
from pipeline.cache.index import FileStamp, Index, Quarantine
from pipeline.cache.keys import Keys
from pipeline.cache.shard import ShardInfo, read_info, read_rows, row_layout, write_shard
from pipeline.cache.space import Cache, FeatureSpace
from pipeline.core import files
from pipeline.core.errors import CacheError, IndexDamagedError, MissingRowsError, ShardDamagedError, SpecError
from pipeline.core.spec import FeatureRequest, FeatureSpec, canonical_json

REQUEST = FeatureRequest("inception_v3", "mixed10", "squash", "decode-1", "resize-1", 299, "x/127.5-1", "folded")
Opener = Callable[[], Cache]


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def bits(rows: np.ndarray) -> bytes:
    return rows.tobytes()


@pytest.fixture
def opener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Opens the cache of this test, as another command would."""
    monkeypatch.delenv("ICEBOX_INDEX", raising=False)
    opened: list[Cache] = []

    def open_cache() -> Cache:
        opened.append(Cache(tmp_path / "cache"))
        assert opened[-1].index is not None  # opened, which it is when it is first needed
        return opened[-1]

    yield open_cache
    for cache in opened:
        cache.close()


@pytest.fixture
def cache(opener: Opener) -> Cache:
    return opener()


@pytest.fixture
def space(cache: Cache) -> FeatureSpace:
    return cache.create(SPEC, {"weights": "untrained"})


# One shard


@pytest.mark.parametrize("store", ["float16", "float32"])
def test_a_shard_is_laid_out_as_documented(tmp_path: Path, store: str) -> None:
    spec = dataclasses.replace(SPEC, storage=store)
    rows = made(list(range(5)), spec, (8, 8, 2048))
    info = write_shard(tmp_path, rows, spec)
    with h5py.File(tmp_path / f"{info.name}.h5", "r") as file:
        found: Any = {name: file[name] for name in file}
        assert {name: (each.shape, each.dtype.name) for name, each in found.items()} == {
            "features": ((5, 8, 8, 2048), store),
            "pooled": ((5, 2048), "float32"),
            "key": ((5, 32), "uint8"),
            "view": ((5,), "int64"),
        }
        assert found["features"].chunks == (1, 8, 8, 2048)
        for name in ("features", "pooled"):
            assert str(hdf5plugin.Zstd.filter_id) in found[name]._filters
        assert all(each.fletcher32 for each in found.values())
        attributes: Any = dict(file.attrs)
        assert set(attributes) == {"format", "version", "spec", "views"}
        assert (attributes["format"], attributes["version"]) == (b"icebox-shard", 1)
        assert attributes["spec"].decode() == canonical_json(spec.to_dict())
        assert json.loads(attributes["views"]) == {"0": "plain"}
        for name, expected in (
            ("features", rows.features),
            ("pooled", rows.pooled),
            ("key", rows.keys),
            ("view", rows.views),
        ):
            assert bits(found[name][:]) == bits(expected)


def test_a_shard_is_named_by_the_hash_of_its_bytes(tmp_path: Path) -> None:
    info = write_shard(tmp_path, made([1, 2, 3]), SPEC)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    assert path.name == f"{hashlib.sha256(content).hexdigest()}.h5" == f"{info.name}.h5"
    assert info.bytes == len(content)


def test_equal_rows_give_the_same_shard_at_another_time(tmp_path: Path) -> None:
    first = write_shard(tmp_path, made([1, 2, 3]), SPEC)
    time.sleep(1.1)  # the time stamps of HDF5 are whole seconds
    assert write_shard(tmp_path, made([1, 2, 3]), SPEC).name == first.name
    assert len(files_in(tmp_path)) == 1


def test_the_size_of_a_shard_is_known_before_it_is_written(tmp_path: Path) -> None:
    told = list[int]()

    def refuse(size: int) -> None:
        told.append(size)
        raise CacheError("too much")

    with pytest.raises(CacheError, match="too much"):
        write_shard(tmp_path, made(list(range(7))), SPEC, refuse)
    assert not list(tmp_path.iterdir())
    assert write_shard(tmp_path, made(list(range(7))), SPEC).bytes == told[0]


def test_sparse_features_take_less_room_than_they_have_bytes(tmp_path: Path) -> None:
    rows = made([1, 2], shape=(8, 8, 2048))
    rows.features[rows.features < 1] = 0  # 84% zeros, as trained weights give
    assert write_shard(tmp_path, rows, SPEC).bytes < rows.features.nbytes / 2


def test_the_keys_and_views_of_a_shard_come_back(tmp_path: Path) -> None:
    rows = made([4, 2, 9])
    rows = dataclasses.replace(rows, views=np.array([0, 7, 2**62]), recipes={0: "plain", 7: "one", 2**62: "another"})
    written = write_shard(tmp_path, rows, SPEC)
    info = read_info(tmp_path / f"{written.name}.h5", SPEC)
    assert (info.name, info.bytes) == (written.name, written.bytes)
    assert bits(info.keys) == bits(rows.keys)
    assert info.views.tolist() == [0, 7, 2**62]


@pytest.mark.parametrize("store", ["float16", "float32"])
@pytest.mark.parametrize("dataset", ["features", "pooled"])
@pytest.mark.parametrize(
    "positions",
    [[0, 1, 2, 3, 4, 5], [3], [0, 5], [1, 2, 4], [2, 2], [0, 0, 1, 3, 3, 5], [0, 1, 2, 3, 4, 5, 5]],
)
def test_rows_of_a_shard_come_back_bit_for_bit(tmp_path: Path, store: str, dataset: str, positions: list[int]) -> None:
    spec = dataclasses.replace(SPEC, storage=store)
    rows = made(list(range(6)), spec)
    path = tmp_path / f"{write_shard(tmp_path, rows, spec).name}.h5"
    shape, dtype = row_layout(path, dataset)
    out = np.full((len(positions) + 1, *shape), 77, dtype)
    at = np.random.default_rng(0).permutation(len(positions))
    read_rows(path, dataset, np.array(positions), rows.keys[positions], rows.views[positions], out, at)
    expected = getattr(rows, dataset)
    assert all(bits(out[target]) == bits(expected[position]) for position, target in zip(positions, at, strict=True))
    assert (out[-1] == 77).all()


def test_a_shard_of_one_row_can_be_read(tmp_path: Path) -> None:
    rows = made([1])
    path = tmp_path / f"{write_shard(tmp_path, rows, SPEC).name}.h5"
    for dataset in ("features", "pooled"):
        shape, dtype = row_layout(path, dataset)
        out = np.empty((1, *shape), dtype)
        read_rows(path, dataset, np.array([0]), rows.keys[[0]], rows.views[[0]], out, np.array([0]))
        assert bits(out) == bits(getattr(rows, dataset))


def damaged(path: Path, offset: int, bit: int = 0) -> Path:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    copy = path.with_name("damaged.h5")
    copy.unlink(missing_ok=True)
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize("dataset", ["features", "pooled"])
def test_a_flipped_bit_in_the_data_is_noticed_by_an_ordinary_read(tmp_path: Path, dataset: str) -> None:
    n = 6
    rows = made(list(range(n)))
    path = tmp_path / f"{write_shard(tmp_path, rows, SPEC).name}.h5"
    shape, dtype = row_layout(path, dataset)
    for offset, size in chunk_places(path, dataset):
        for place in {0, size // 3, size // 2, size - 5, size - 1}:
            copy = damaged(path, offset + place, place % 8)
            with pytest.raises(CacheError, match=r"damaged.h5"):
                read_rows(
                    copy, dataset, np.arange(n), rows.keys, rows.views, np.empty((n, *shape), dtype), np.arange(n)
                )


def test_only_the_row_with_the_flipped_bit_is_lost(tmp_path: Path) -> None:
    rows = made([0, 1, 2])
    path = tmp_path / f"{write_shard(tmp_path, rows, SPEC).name}.h5"
    offset, size = chunk_places(path, "features")[1]
    copy = damaged(path, offset + size // 2)
    out = np.empty((2, *rows.features.shape[1:]), np.float16)
    read_rows(copy, "features", np.array([0, 2]), rows.keys[[0, 2]], rows.views[[0, 2]], out, np.array([0, 1]))
    assert bits(out) == bits(rows.features[[0, 2]])
    with pytest.raises(CacheError):
        read_rows(copy, "features", np.array([1]), rows.keys[[1]], rows.views[[1]], out, np.array([0]))


def test_a_flipped_bit_anywhere_never_gives_other_rows(tmp_path: Path) -> None:
    rows = made([0, 1, 2, 3])
    path = tmp_path / f"{write_shard(tmp_path, rows, SPEC).name}.h5"
    noticed = 0
    offsets = range(0, path.stat().st_size, 13)
    for offset in offsets:
        copy = damaged(path, offset, offset % 8)
        features, pooled = np.full_like(rows.features, 77), np.full_like(rows.pooled, 77)
        try:
            info = read_info(copy, SPEC)
            read_rows(copy, "features", np.arange(4), rows.keys, rows.views, features, np.arange(4))
            read_rows(copy, "pooled", np.arange(4), rows.keys, rows.views, pooled, np.arange(4))
        except CacheError:
            noticed += 1
            continue
        found = (features, pooled, info.keys, info.views)
        expected = (rows.features, rows.pooled, rows.keys, rows.views)
        assert [bits(each) for each in found] == [bits(each) for each in expected], f"byte {offset}"
    assert noticed > 0.9 * len(offsets)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_shard_is_refused_by_name(tmp_path: Path, kept: float) -> None:
    content = (tmp_path / f"{write_shard(tmp_path, made([1, 2]), SPEC).name}.h5").read_bytes()
    path = tmp_path / "torn.h5"
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CacheError, match=r"torn.h5"):
        read_info(path, SPEC)


def test_a_shard_that_is_gone_is_a_cache_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"gone.h5"):
        row_layout(tmp_path / "gone.h5", "features")


@pytest.mark.parametrize("name", [name for name in SPEC.to_dict() if name not in ("weights", "storage")])
def test_a_shard_of_another_spec_is_refused(tmp_path: Path, name: str) -> None:
    other = {**SPEC.to_dict(), name: 224 if name == "input_size" else "bfloat16" if name == "precision" else "other"}
    info = write_shard(tmp_path, made([1]), SPEC)
    with pytest.raises(CacheError, match="another feature space"):
        read_info(tmp_path / f"{info.name}.h5", FeatureSpec.from_dict(other))


def handmade(path: Path, *leave_out: str) -> h5py.File:
    """A legal shard of 3 rows written by plain h5py, without some of its datasets; the caller adds its own."""
    rows = made([1, 2, 3])
    file = h5py.File(path, "w")
    file.attrs["format"] = np.bytes_(b"icebox-shard")
    file.attrs["version"] = 1
    file.attrs["spec"] = np.bytes_(canonical_json(SPEC.to_dict()).encode())
    file.attrs["views"] = np.bytes_(b"{}")
    for name, data in (
        ("features", rows.features),
        ("pooled", rows.pooled),
        ("key", rows.keys),
        ("view", rows.views),
    ):
        if name not in leave_out:
            file.create_dataset(name, data=data, chunks=(1, *data.shape[1:]), fletcher32=True)
    return file


def test_a_legal_shard_made_by_hand_is_accepted(tmp_path: Path) -> None:
    handmade(tmp_path / "x.h5").close()
    assert bits(read_info(tmp_path / "x.h5", SPEC).keys) == bits(made([1, 2, 3]).keys)


def absent(file: h5py.File, name: str) -> None:
    pass


def external_link(file: h5py.File, name: str) -> None:
    with handmade(Path(file.filename).with_name("target.h5")):
        pass
    file[name] = h5py.ExternalLink("target.h5", name)


def soft_link(file: h5py.File, name: str) -> None:
    with handmade(Path(file.filename).with_name("target.h5")) as target:
        target.copy(name, file, "elsewhere")
    file[name] = h5py.SoftLink("/elsewhere")


def a_group(file: h5py.File, name: str) -> None:
    file.create_group(name)


def virtual(file: h5py.File, name: str) -> None:
    with handmade(Path(file.filename).with_name("target.h5")) as target:
        data: Any = target[name]
        layout = h5py.VirtualLayout(data.shape, data.dtype)
        layout[:] = h5py.VirtualSource(data)
    file.create_virtual_dataset(name, layout)


def external_storage(file: h5py.File, name: str) -> None:
    secret = Path(file.filename).with_name("secret.txt")
    secret.write_bytes(b"s" * 4096)
    with handmade(Path(file.filename).with_name("target.h5")) as target:
        data: Any = target[name]
        shape, dtype = data.shape, data.dtype
    file.create_dataset(name, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def not_chunked(file: h5py.File, name: str) -> None:
    data = {"key": made([1, 2, 3]).keys, "view": made([1, 2, 3]).views}
    file.create_dataset(name, data=data.get(name, getattr(made([1, 2, 3]), name, None)))


def no_checksum(file: h5py.File, name: str) -> None:
    rows = made([1, 2, 3])
    data = {"features": rows.features, "pooled": rows.pooled, "key": rows.keys, "view": rows.views}[name]
    file.create_dataset(name, data=data, chunks=(1, *data.shape[1:]))


@pytest.mark.parametrize("name", ["features", "pooled", "key", "view"])
@pytest.mark.parametrize(
    "fault", [absent, external_link, soft_link, a_group, virtual, external_storage, not_chunked, no_checksum]
)
def test_a_hostile_dataset_is_refused_before_it_is_read(
    tmp_path: Path, name: str, fault: Callable[[h5py.File, str], None]
) -> None:
    path = tmp_path / "hostile.h5"
    with handmade(path, name) as file:
        fault(file, name)
    with pytest.raises(CacheError, match=f"hostile.h5 has no plain dataset '{name}'"):
        read_info(path, SPEC)
    with pytest.raises(CacheError, match=r"hostile.h5"):
        row_layout(path, "features")


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "chunks"),
    [
        ("features", (3, 2, 3, 8), "float64", (1, 2, 3, 8)),
        ("features", (3, 2, 3, 8), "float32", (1, 2, 3, 8)),  # the spec says float16
        ("features", (3, 2, 3, 8), ">f2", (1, 2, 3, 8)),
        ("features", (3, 2, 3, 8), "int16", (1, 2, 3, 8)),
        ("features", (3, 2, 3, 8), "S4", (1, 2, 3, 8)),
        ("features", (3, 2, 3, 9), "float16", (1, 2, 3, 9)),  # not the channels of pooled
        ("features", (3, 2, 3, 8), "float16", (3, 2, 3, 8)),
        ("features", (4, 2, 3, 8), "float16", (1, 2, 3, 8)),  # one row more than keys
        ("features", (3, 48), "float16", (1, 48)),
        ("features", (3, 100_000, 100_000, 8), "float16", (1, 1, 1, 8)),
        ("features", (3, 4_000, 4_000, 8), "float16", (1, 4_000, 4_000, 8)),
        ("pooled", (3, 8), "float64", (3, 8)),
        ("pooled", (3, 8), "float16", (3, 8)),
        ("pooled", (2, 8), "float32", (2, 8)),
        ("pooled", (3, 8, 1), "float32", (3, 8, 1)),
        ("key", (3, 32), "int8", (3, 32)),
        ("key", (3, 31), "uint8", (3, 31)),
        ("key", (2**40, 32), "uint8", (1024, 32)),
        ("view", (3,), "int32", (3,)),
        ("view", (3,), "float64", (3,)),
        ("view", (2,), "int64", (2,)),
    ],
)
def test_a_wrong_shape_or_type_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...]
) -> None:
    path = tmp_path / "hostile.h5"
    with handmade(path, name) as file:
        file.create_dataset(name, shape, dtype, chunks=chunks, fletcher32=True)
    with pytest.raises(CacheError, match=r"hostile.h5"):
        read_info(path, SPEC)


@pytest.mark.parametrize("rows", [0, 65_537, 2**40])
def test_an_absurd_number_of_rows_is_refused(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "hostile.h5"
    with handmade(path, "features", "pooled", "key", "view") as file:
        for name, tail, dtype in (
            ("features", (2, 3, 8), "float16"),
            ("pooled", (8,), "float32"),
            ("key", (32,), "uint8"),
            ("view", (), "int64"),
        ):
            maxshape = (None, *tail)
            file.create_dataset(name, (rows, *tail), dtype, chunks=(1, *tail), fletcher32=True, maxshape=maxshape)
    assert path.stat().st_size < 50_000
    with pytest.raises(CacheError, match="datasets disagree"):
        read_info(path, SPEC)


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", b"another"), ("version", 2), ("format", [b"icebox-shard", b"x"]), ("version", "1"), ("spec", b"{}")],
)
def test_a_wrong_attribute_is_refused(tmp_path: Path, name: str, value: object) -> None:
    with handmade(tmp_path / "x.h5") as file:
        file.attrs[name] = value
    with pytest.raises(CacheError, match=r"x.h5"):
        read_info(tmp_path / "x.h5", SPEC)


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all", b"\x89HDF\r\n\x1a\n" + b"\0" * 500])
def test_a_file_that_is_not_hdf5_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.h5").write_bytes(content)
    with pytest.raises(CacheError, match=r"x.h5"):
        read_info(tmp_path / "x.h5", SPEC)


def test_rows_are_not_written_into_another_shape(tmp_path: Path) -> None:
    rows = made([1, 2])
    path = tmp_path / f"{write_shard(tmp_path, rows, SPEC).name}.h5"
    with pytest.raises(CacheError):
        read_rows(
            path,
            "features",
            np.array([1]),
            rows.keys[[1]],
            rows.views[[1]],
            np.empty((1, 9, 9, 9), np.float16),
            np.array([0]),
        )


def test_rows_of_other_images_than_the_index_says_are_refused(tmp_path: Path) -> None:
    rows = made([1, 2])
    path = tmp_path / f"{write_shard(tmp_path, rows, SPEC).name}.h5"
    out = np.full((1, *rows.features.shape[1:]), 77, np.float16)
    for position, keys in ((0, rows.keys[[1]]), (2, rows.keys[[1]])):
        with pytest.raises(ShardDamagedError, match="holds other rows than the index says"):
            read_rows(path, "features", np.array([position]), keys, np.zeros(1, np.int64), out, np.array([0]))
    assert (out == 77).all()


def test_a_folder_that_is_not_there_is_a_cache_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot write a shard"):
        write_shard(tmp_path / "gone", made([1]), SPEC)


def test_a_file_in_the_folder_s_place_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("in the way")
    with pytest.raises(CacheError, match="cannot write a shard"):
        write_shard(tmp_path / "shards", made([1]), SPEC)
    assert files_in(tmp_path) == ["shards"]


def python(code: str, *arguments: str | Path) -> list[str]:
    helpers = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    return [sys.executable, "-c", helpers + code, *map(str, arguments)]


_FULL_DISK = """
import resource, signal
from pathlib import Path
from made import SPEC, made
from pipeline.cache.shard import write_shard
from pipeline.core.errors import CacheError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    write_shard(Path(sys.argv[1]), made(list(range(20)), shape=(8, 8, 64)), SPEC)
except CacheError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.parametrize("room", [0, 3_000, 100_000])
def test_a_disk_that_fills_up_leaves_nothing_and_crashes_nobody(tmp_path: Path, room: int) -> None:
    done = subprocess.run(python(_FULL_DISK, tmp_path, str(room)), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "")
    assert "make room" in done.stdout
    assert files_in(tmp_path) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_whole(path, b"old")
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert files_in(tmp_path) == ["a.json"]
    (tmp_path / "b.json").mkdir()
    with pytest.raises(OSError):
        files.write_whole(tmp_path / "b.json", b"new")
    assert files_in(tmp_path) == ["a.json", "b.json"]


def test_free_bytes_of_a_folder_still_to_be_made(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "a" / "b") > 0
    assert files.sha256_file(Path(__file__)) == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


# A space and its index


def test_published_rows_are_found_and_read(space: FeatureSpace) -> None:
    add(space, [1, 2, 3])
    add(space, [4, 5])
    expected = made([5, 2, 4, 1])
    keys = [key(n) for n in (5, 2, 4, 1)]
    assert space.locate([*keys, key(99)]).found.tolist() == [True] * 4 + [False]
    assert bits(space.read(keys, "features")) == bits(expected.features)
    assert bits(space.read(keys, "pooled")) == bits(expected.pooled)


def test_pooled_rows_are_float32_whatever_the_storage(space: FeatureSpace) -> None:
    add(space, [1])
    assert space.read([key(1)], "features").dtype == np.float16
    assert space.read([key(1)], "pooled").dtype == np.float32


@pytest.mark.parametrize("dataset", ["features", "pooled"])
def test_any_request_over_many_shards_is_answered_in_its_order(space: FeatureSpace, dataset: str) -> None:
    for start in range(0, 12, 3):
        add(space, list(range(start, start + 3)))
    random = np.random.default_rng(0)
    for _ in range(30):
        wanted = random.integers(0, 12, random.integers(1, 25)).tolist()  # in any order, with repetitions
        found = space.read([key(n) for n in wanted], dataset)
        assert bits(found) == bits(getattr(made(wanted), dataset))


def test_one_row_asked_for_as_often_as_its_shard_has_rows(space: FeatureSpace) -> None:
    add(space, [1, 2, 3])
    for dataset in ("features", "pooled"):
        assert bits(space.read([key(3)] * 3, dataset)) == bits(getattr(made([3, 3, 3]), dataset))


def test_unknown_keys_are_counted_in_the_error(space: FeatureSpace) -> None:
    add(space, [1])
    with pytest.raises(MissingRowsError, match="2 of 3 rows"):
        space.read([key(1), key(2), key(3)], "features")


def test_no_keys_at_all_is_a_missing_rows_error(space: FeatureSpace) -> None:
    add(space, [1])
    with pytest.raises(MissingRowsError):
        space.read([], "features")


def test_totals_count_shards_rows_and_bytes(space: FeatureSpace) -> None:
    infos = [add(space, [1, 2]), add(space, [3])]
    totals = space.totals()
    assert (totals.shards, totals.rows, totals.bytes) == (2, 3, sum(info.bytes for info in infos))
    assert totals.bytes == sum(shard_file(space, info).stat().st_size for info in infos)


def test_registering_a_shard_twice_changes_nothing(space: FeatureSpace) -> None:
    info = add(space, [1, 2])
    space.register(info)
    assert space.totals().rows == 2


def test_other_views_are_not_taken_for_the_plain_one(space: FeatureSpace) -> None:
    rows = dataclasses.replace(made([1, 2]), views=np.array([0, 5]), recipes={0: "plain", 5: "another"})
    space.register(space.write(rows))
    assert space.locate([key(1), key(2)]).found.tolist() == [True, False]


def test_another_space_does_not_answer(cache: Cache, space: FeatureSpace) -> None:
    add(space, [1])
    other = cache.create(dataclasses.replace(SPEC, layer="mixed8"), {})
    assert not other.locate([key(1)]).found.any()


def test_a_second_opener_without_the_index_adopts_the_shards(opener: Opener, space: FeatureSpace) -> None:
    add(space, [1, 2, 3])
    totals = space.totals()
    (space.path.parent / "cache.db").unlink()
    again = opener().open(space.name)
    assert again.totals() == totals
    assert bits(again.read([key(3), key(1)], "features")) == bits(made([3, 1]).features)


def test_icebox_index_puts_the_index_elsewhere(
    opener: Opener, space: FeatureSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(space, [1])
    elsewhere = tmp_path / "other" / "place.db"
    monkeypatch.setenv("ICEBOX_INDEX", str(elsewhere))
    cache = opener()
    assert cache.index.path == elsewhere
    assert elsewhere.is_file()
    assert cache.open(space.name).locate([key(1)]).found.all()


def test_two_caches_do_not_share_an_index(
    opener: Opener, space: FeatureSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(space, [1])
    monkeypatch.setenv("ICEBOX_INDEX", str(tmp_path / "named.db"))
    opener().close()
    opener().close()
    with pytest.raises(CacheError, match=r"named\.db, the index of another cache than .*other"):
        _ = Cache(tmp_path / "other").index
    assert opener().open(space.name).locate([key(1)]).found.all(), "whose it is it stays"


def test_an_open_space_learns_of_shards_only_by_sync(opener: Opener, space: FeatureSpace, tmp_path: Path) -> None:
    with_own_index = Cache(tmp_path / "cache")
    with_own_index.index = Index(tmp_path / "own.db")
    other = with_own_index.open(space.name)
    add(space, [1])
    assert not other.locate([key(1)]).found.any()
    other.sync()
    assert other.locate([key(1)]).found.all()
    with_own_index.close()


def test_a_shard_deleted_by_hand_is_known_as_gone_and_its_rows_are_missing(opener: Opener, space: FeatureSpace) -> None:
    gone, kept = add(space, [1, 2]), add(space, [3])
    shard_file(space, gone).unlink()
    again = opener().open(space.name)
    assert again.locate([key(1), key(2), key(3)]).found.tolist() == [False, False, True]
    assert (again.totals().shards, again.totals().bytes) == (1, kept.bytes)
    lost = again.index.lost(space.name, [key(1), key(2), key(3)])
    assert lost == {key(n): f"{gone.name[:12]}…: is gone from the disk" for n in (1, 2)}
    add(again, [2, 5])  # what is computed anew is no longer lost
    assert again.index.lost(space.name, [key(1), key(2)]).keys() == {key(1)}
    add(again, [1])
    assert again.index.shards(space.name).keys() == {path.stem for path in (space.path / "shards").iterdir()}


def test_a_shard_that_vanishes_while_open_is_a_cache_error(space: FeatureSpace) -> None:
    info = add(space, [1])
    shard_file(space, info).unlink()
    with pytest.raises(CacheError, match=info.name):
        space.read([key(1)], "features")


def test_a_damaged_shard_is_named_by_an_ordinary_read(space: FeatureSpace) -> None:
    info = add(space, [1, 2])
    path = shard_file(space, info)
    offset, size = chunk_places(path, "features")[1]
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CacheError, match=info.name):
        space.read([key(2)], "features")


def test_a_row_in_two_shards_is_legal_and_survives_one_of_them(opener: Opener, space: FeatureSpace) -> None:
    first, second = add(space, [1, 2]), add(space, [2, 3])
    keys = [key(n) for n in (1, 2, 3)]
    assert bits(space.read(keys, "features")) == bits(made([1, 2, 3]).features)
    for gone, left in ((first, [False, True, True]), (second, [True, True, False])):
        content = shard_file(space, gone).read_bytes()
        shard_file(space, gone).unlink()
        again = opener().open(space.name)
        assert again.locate(keys).found.tolist() == left
        assert bits(again.read([key(2)], "features")) == bits(made([2]).features)
        shard_file(space, gone).write_bytes(content)
        assert opener().open(space.name).locate(keys).found.all()


def test_a_shard_of_another_space_is_not_adopted(opener: Opener, cache: Cache, space: FeatureSpace) -> None:
    info = add(space, [1])
    other = cache.create(dataclasses.replace(SPEC, layer="mixed8"), {})
    (other.path / "shards" / f"{info.name}.h5").write_bytes(shard_file(space, info).read_bytes())
    again = opener().open(other.name)
    assert again.totals().shards == 0
    record = again.index.shards(other.name)[info.name]
    assert (record.state, record.problem) == ("bad", "belongs to another feature space")


def test_hidden_and_other_files_among_the_shards_are_passed_over(opener: Opener, space: FeatureSpace) -> None:
    add(space, [1])
    (space.path / "shards" / ".partial-1-abc.h5").write_bytes(b"half")
    (space.path / "shards" / "notes.txt").write_text("mine")
    assert opener().open(space.name).totals().shards == 1


# Making, opening and choosing spaces


def test_a_space_says_what_it_is(space: FeatureSpace) -> None:
    stored = json.loads((space.path / "space.json").read_text())
    assert FeatureSpec.from_dict(stored["spec"]) == SPEC
    assert stored["made_by"] == {"weights": "untrained"} == space.provenance
    assert space.name == SPEC.directory
    assert files_in(space.path) == [".lock", ".reading", "shards", "space.json"]


def test_making_a_space_twice_gives_the_same_with_its_rows(cache: Cache, space: FeatureSpace) -> None:
    add(space, [1])
    again = cache.create(SPEC, {"weights": "something else"})
    assert again.path == space.path
    assert again.provenance == {"weights": "untrained"}
    assert again.locate([key(1)]).found.all()
    assert cache.names() == [space.name]


def test_a_folder_that_holds_another_spec_is_refused(cache: Cache, space: FeatureSpace) -> None:
    other = dataclasses.replace(SPEC, fit="crop")
    text = json.dumps({"spec": other.to_dict(), "made_by": {}})
    (space.path / "space.json").write_text(text)
    with pytest.raises(SpecError, match="another feature space"):
        cache.create(SPEC, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"spec": null}',
        '{"spec": []}',
        '{"spec": {"backbone": "x"}}',
        json.dumps({"spec": {**SPEC.to_dict(), "weights": 5}}),
        json.dumps({"spec": {**SPEC.to_dict(), "precision": []}}),
    ],
)
def test_a_description_that_cannot_be_read_is_a_spec_error(cache: Cache, space: FeatureSpace, text: str) -> None:
    (space.path / "space.json").write_text(text)
    with pytest.raises(SpecError, match=r"space.json"):
        cache.open(space.name)


@pytest.mark.parametrize("name", ["", ".", "..", "nothing", "../cache"])
def test_a_space_that_is_not_there_is_refused_and_the_others_listed(
    cache: Cache, space: FeatureSpace, name: str
) -> None:
    with pytest.raises(SpecError, match=space.name):
        cache.open(name)


def test_an_empty_cache_has_no_spaces(cache: Cache) -> None:
    assert cache.names() == []
    assert cache.choose(REQUEST, Keys.of([key(1)])) is None


def filled(cache: Cache, numbers: list[int], **fields: str) -> FeatureSpace:
    space = cache.create(dataclasses.replace(SPEC, **fields), {})
    if numbers:
        add(space, numbers)
    return space


def chosen(cache: Cache, numbers: list[int], **stated: str) -> FeatureSpec | None:
    space = cache.choose(dataclasses.replace(REQUEST, **stated), Keys.of([key(n) for n in numbers]))
    return space.spec if space else None


TRAINED = "sha256:" + "ab" * 32


def test_the_space_with_most_of_the_rows_is_chosen(cache: Cache) -> None:
    filled(cache, [1, 7, 8, 9, 10], precision="bfloat16")
    most = filled(cache, [1, 2], precision="float16")
    filled(cache, [3])
    assert chosen(cache, [1, 2, 3]) == most.spec


def test_most_rows_come_before_trained_weights(cache: Cache) -> None:
    filled(cache, [1], weights=TRAINED)
    most = filled(cache, [1, 2])
    assert chosen(cache, [1, 2]) == most.spec


@pytest.mark.parametrize("seed", range(4))
def test_among_equals_trained_weights_win(cache: Cache, seed: int) -> None:
    trained = filled(cache, [1, 2], weights=f"sha256:{seed:064x}")
    for other in range(4):
        filled(cache, [1, 2], weights=f"untrained:glorot:{other}")
    assert chosen(cache, [1, 2]) == trained.spec


def test_among_equals_the_choice_does_not_depend_on_order(cache: Cache) -> None:
    spaces = [filled(cache, [1], precision=each) for each in ("float32", "bfloat16", "float16")]
    first = min(spaces, key=lambda space: space.name)
    assert chosen(cache, [1]) == first.spec


@pytest.mark.parametrize(
    ("name", "value"), [("weights", TRAINED), ("precision", "bfloat16"), ("storage", "float32"), ("layer", "mixed8")]
)
def test_a_stated_field_is_never_passed_over(cache: Cache, name: str, value: str) -> None:
    filled(cache, [1, 2, 3])
    assert chosen(cache, [1, 2, 3], **{name: value}) is None
    stated = filled(cache, [3], **{name: value})
    assert chosen(cache, [1, 2, 3], **{name: value}) == stated.spec


def test_a_space_without_any_of_the_rows_is_not_chosen(cache: Cache) -> None:
    filled(cache, [])
    filled(cache, [8, 9], weights=TRAINED)
    assert chosen(cache, [1, 2]) is None
    assert chosen(cache, []) is None


# One writer at a time


def test_what_killed_writers_left_is_removed_under_the_lock_only(opener: Opener, space: FeatureSpace) -> None:
    add(space, [1])
    partial = files.partial_name(space.path / "shards", ".h5")
    partial.write_bytes(b"half a shard")
    again = opener().open(space.name)
    again.sync()
    assert partial.exists()
    with again.lock(lambda holder: None):
        again.remove_leftovers()
        assert not partial.exists()
    assert again.totals().shards == 1


def test_the_lock_brings_what_others_wrote(space: FeatureSpace) -> None:
    info = space.write(made([1]))  # published, but the index was never told
    assert not space.locate([key(1)]).found.any()
    with space.lock(lambda holder: None):
        assert space.locate([key(1)]).found.all()
    assert space.totals().bytes == info.bytes


def test_the_lock_can_be_taken_again_and_after_an_error(space: FeatureSpace) -> None:
    waited: list[str] = []
    with pytest.raises(RuntimeError), space.lock(waited.append):
        raise RuntimeError("the writer failed")
    with space.lock(waited.append):
        pass
    assert waited == []


def test_the_lock_names_its_last_holder_only(space: FeatureSpace) -> None:
    (space.path / ".lock").write_text("process 12345678901234567890 on a machine with a rather long name")
    with space.lock(lambda holder: None):
        assert (space.path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_lock_file_that_cannot_be_made_is_a_cache_error(space: FeatureSpace) -> None:
    (space.path / ".lock").unlink()
    (space.path / ".lock").mkdir()
    with pytest.raises(CacheError, match="cannot be written"), space.lock(lambda holder: None):
        pass


_HOLDER = """
import time
from pathlib import Path
from pipeline.cache.space import Cache
space = Cache(Path(sys.argv[1])).open(sys.argv[2])
with space.lock(lambda holder: None):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(space: FeatureSpace) -> Iterator[warm.ColdProcess]:
    """Another process that holds the lock of `space` until it reads a line or ends."""
    command = python(_HOLDER, space.path.parent, space.name)
    with warm.ColdProcess(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def release(holder: warm.ColdProcess) -> None:
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()


def kill(holder: warm.ColdProcess) -> None:
    os.kill(holder.pid, signal.SIGKILL)


@pytest.mark.parametrize("end", [release, kill])
def test_a_second_writer_waits_for_the_first_and_says_for_whom(
    space: FeatureSpace, holder: warm.ColdProcess, end: Callable[[warm.ColdProcess], None]
) -> None:
    waited: list[str] = []
    ended_at: list[float] = []

    def end_it() -> None:
        ended_at.append(time.monotonic())
        end(holder)

    def wait(told: str) -> None:
        waited.append(told)
        threading.Timer(0.2, end_it).start()

    with space.lock(wait):
        entered_at = time.monotonic()
    assert entered_at >= ended_at[0]
    assert len(waited) == 1
    assert f"process {holder.pid} on " in waited[0]


def test_a_partial_file_is_safe_while_its_writer_holds_the_lock(space: FeatureSpace, holder: warm.ColdProcess) -> None:
    partial = files.partial_name(space.path / "shards", ".h5")
    partial.write_bytes(b"in the making")

    def look(_: str) -> None:
        assert partial.exists()
        release(holder)

    with space.lock(look):
        space.remove_leftovers()
        assert not partial.exists()


def test_readers_do_not_wait_for_a_writer(opener: Opener, space: FeatureSpace, holder: warm.ColdProcess) -> None:
    add(space, [1])
    assert bits(opener().open(space.name).read([key(1)], "features")) == bits(made([1]).features)
    assert holder.poll() is None


# The index itself


def no_rows(name: str, count: int, start: int = 0) -> ShardInfo:
    keys = np.frombuffer(b"".join(key(n) for n in range(start, start + count)), np.uint8).reshape(-1, 32)
    return ShardInfo(name, 1, keys, np.zeros(count, np.int64))


def test_fifty_thousand_keys_are_located_in_few_steps(tmp_path: Path) -> None:
    index = Index(tmp_path / "cache.db")
    for space in ("a", "b"):
        for start in range(0, 50_000, 5_000):
            index.add_shard(space, no_rows(f"{start}", 5_000, start))
    keys = [key(n) for n in range(10_000, 60_000)][::-1]
    steps = [0]  # of SQLite's, in hundreds

    def count() -> None:
        steps[-1] += 1

    index._db.set_progress_handler(count, 100)
    located = index.locate("b", keys)
    assert located.found.tolist() == [False] * 10_000 + [True] * 40_000
    names = {record.id: name for name, record in index.shards("b").items()}
    for ordinal in (10_000, 23_456, 49_999):
        number = 59_999 - ordinal
        assert int(names[int(located.shards[ordinal])]) + located.positions[ordinal] == number
    assert steps[0] < 30_000  # some 8,000; a scan for every key would take millions
    steps.append(0)
    assert all(index.locate("b", [each]).found.all() for each in keys[-50:])
    assert steps[1] < steps[0] / 10  # a few keys do not cost a look at every row
    index.close()


@pytest.mark.parametrize(
    "damage", ["key = CAST(key || x'00' AS BLOB)", "key = CAST(position AS BLOB)", "position = 'no number'"]
)
def test_what_a_row_cannot_be_is_noticed_where_all_are_read(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(tmp_path / "cache.db")
    index.add_shard("a", no_rows("x", 300))
    with sqlite3.connect(tmp_path / "cache.db") as db:
        db.execute(f"UPDATE rows SET {damage} WHERE position = 7")
    monkeypatch.setattr(pipeline.cache.index, "_LOOK_UP", 100)
    # The ends of all keys, so that every row lies between them.
    keys = [bytes(32), *(key(n) for n in range(300)), b"\xff" * 32]
    with pytest.raises(IndexDamagedError, match="it holds what it cannot"):
        index.locate("a", keys)
    index.close()


def test_lost_rows_are_counted_once_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(tmp_path / "cache.db")
    keys = Keys.of([key(n) for n in range(10)])
    first = keys.grouped().first
    for name, start in (("x", 0), ("y", 2), ("z", 8)):
        index.add_shard("a", no_rows(name, 4, start))
    assert index.count_lost("a", keys.digests, first, 0) == 0
    for name in ("x", "y"):
        index.mark_shard("a", name, 1, "bad", "is damaged")
    monkeypatch.setattr(pipeline.cache.index, "_LOOK_UP", 3)
    assert index.count_lost("a", keys.digests, first, 0) == 6
    assert index.count_lost("a", keys.digests, first, 1) == index.count_lost("b", keys.digests, first, 0) == 0
    index.close()


def test_many_digests_are_looked_up_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.cache.index, "_LOOK_UP", 3)
    index = Index(tmp_path / "cache.db")
    known = {tmp_path / str(n): (FileStamp(n, 2, 3, 4), key(n)) for n in range(10)}
    index.remember_digests(known)
    paths = [tmp_path / str(n) for n in (9, 3, 11, 3, 0, 5, 12)]
    assert index.file_digests(paths) == [known.get(path) for path in paths]
    assert index.file_digests([]) == []
    index.close()


def test_the_same_key_many_times_is_found_each_time(tmp_path: Path) -> None:
    index = Index(tmp_path / "cache.db")
    index.add_shard("a", no_rows("x", 3))
    located = index.locate("a", [key(2), key(9), key(2), key(0)])
    assert located.positions[located.found].tolist() == [2, 2, 0]
    assert located.found.tolist() == [True, False, True, True]
    assert index.locate("a", []).found.tolist() == []
    index.close()


@pytest.mark.parametrize(
    "name", [b"plain.png", b"caf\xc3\xa9.png", b"\xff\xfe.png", b"a\\xff.png", b"new\nline.png", "日本.png".encode()]
)
def test_a_digest_is_remembered_under_any_name_a_file_can_have(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(b"x")
    stamp, digest = FileStamp(1, 2, 2**62, 2**62), b"\x01" * 32
    index = Index(tmp_path / "cache.db")
    index.remember_digests({path: (stamp, digest)})
    index.close()
    index = Index(tmp_path / "cache.db")
    assert index.file_digests([path, tmp_path / "other"]) == [(stamp, digest), None]
    assert index.files_with_digest(digest) == [path]
    assert index.files_with_digest(digest)[0].read_bytes() == b"x"
    index.close()


def test_names_that_differ_in_odd_bytes_only_are_two_files(tmp_path: Path) -> None:
    odd, spelt = Path(os.fsdecode(b"\xff.png")), Path("\\xff.png")
    stamp = FileStamp(1, 2, 3, 4)
    index = Index(tmp_path / "cache.db")
    index.remember_digests({odd: (stamp, b"1" * 32), spelt: (stamp, b"2" * 32)})
    assert index.file_digests([odd, spelt]) == [(stamp, b"1" * 32), (stamp, b"2" * 32)]
    index.close()


def test_a_new_digest_takes_the_place_of_the_old(tmp_path: Path) -> None:
    index = Index(tmp_path / "cache.db")
    path, stamp = tmp_path / "a.png", FileStamp(1, 2, 3, 4)
    for digest in (b"1" * 32, b"2" * 32):
        index.remember_digests({path: (stamp, digest)})
    assert index.file_digests([path]) == [(stamp, b"2" * 32)]
    assert index.files_with_digest(b"1" * 32) == []
    index.close()


def test_the_quarantine_goes_by_content_decoder_and_limit(tmp_path: Path) -> None:
    index = Index(tmp_path / "cache.db")
    began = datetime.now(UTC).replace(microsecond=0)
    index.remember_quarantined({key(1): "half a JPEG", key(2): "text"}, "opencv 5", 1_000)
    keys = [key(n) for n in range(4)]

    def reasons(keys: list[bytes], decoder: str, max_pixels: int) -> dict[bytes, str]:
        return {known: found.reason for known, found in index.quarantined(keys, decoder, max_pixels).items()}

    assert reasons(keys, "opencv 5", 1_000) == {key(1): "half a JPEG", key(2): "text"}
    assert reasons([key(2)], "opencv 5", 1_000) == {key(2): "text"}
    assert reasons(keys, "opencv 6", 1_000) == {}
    assert reasons(keys, "opencv 5", 2_000) == {}
    assert {found.key for found in index.all_quarantined()} == {key(1), key(2)}
    since = index.all_quarantined()[0].since
    assert since
    assert began <= datetime.fromisoformat(since) <= datetime.now(UTC)
    index.forget_quarantined([key(1)])
    assert reasons(keys, "opencv 5", 1_000) == {key(2): "text"}
    index.close()


def test_what_was_remembered_is_there_for_the_next_process(tmp_path: Path) -> None:
    index = Index(tmp_path / "cache.db")
    index.add_shard("a", no_rows("x", 2))
    index.remember_quarantined({key(1): "text"}, "d", 1)
    code = """
from pathlib import Path
from made import key
from pipeline.cache.index import Index
index = Index(Path(sys.argv[1]))
print(index.totals("a"), index.quarantined([key(1)], "d", 1)[key(1)].reason)
"""
    done = subprocess.run(python(code, tmp_path / "cache.db"), capture_output=True, text=True, timeout=300)
    assert done.stdout == "(1, 2, 1) text\n", done.stderr
    index.close()


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE shards (id)")
        db.execute("CREATE TRIGGER t AFTER INSERT ON shards BEGIN DELETE FROM shards; END")
        db.execute("PRAGMA user_version = 2")


def of_unknown_format(path: Path) -> None:
    """One byte of the header flipped: the number of the schema's format."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE shards (id)")
        db.commit()
    content = bytearray(path.read_bytes())
    content[47] = 5
    path.write_bytes(content)


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("this is no database, but text " * 100), foreign, of_unknown_format]
)
def test_an_index_that_is_not_ours_is_set_aside_and_derived_again(
    tmp_path: Path, opener: Opener, space: FeatureSpace, make: Callable[[Path], object], caplog: Any
) -> None:
    add(space, [1, 2])
    path = tmp_path / "cache" / "cache.db"
    path.unlink()
    make(path)
    found = path.read_bytes()
    (path.parent / "cache.db-journal").write_bytes(b"whose?")
    again = opener().open(space.name)
    assert again.locate([key(1), key(2)]).found.all()
    (aside,) = path.parent.glob("cache.db.damaged-*[0-9]")
    assert aside.read_bytes() == found
    assert not (path.parent / "cache.db-journal").exists()
    assert "derived again from the shards" in caplog.text


def test_a_page_torn_out_of_the_index_is_noticed(tmp_path: Path, opener: Opener, space: FeatureSpace) -> None:
    for start in range(0, 600, 50):
        add(space, list(range(start, start + 50)))
    path = tmp_path / "cache" / "cache.db"
    content = bytearray(path.read_bytes())
    content[4096 * 3 : -4096] = bytes(len(content) - 4096 * 4)
    path.write_bytes(content)
    index = Index(path)
    with pytest.raises(IndexDamagedError) as damage:
        index.check()
    with pytest.raises(IndexDamagedError):
        index.locate(space.name, [key(n) for n in range(600)])
    index.renew(damage.value)
    index.check()
    index.close()
    assert opener().open(space.name).locate([key(n) for n in range(600)]).found.all()


def test_an_index_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    with sqlite3.connect(path) as db:
        db.executescript("""
            CREATE TABLE shards (id INTEGER PRIMARY KEY, space TEXT NOT NULL, name TEXT NOT NULL,
                bytes INTEGER NOT NULL, rows INTEGER NOT NULL, UNIQUE (space, name));
            CREATE TABLE rows (shard INTEGER NOT NULL REFERENCES shards (id) ON DELETE CASCADE,
                position INTEGER NOT NULL, key BLOB NOT NULL, view INTEGER NOT NULL,
                PRIMARY KEY (shard, position)) WITHOUT ROWID;
            CREATE INDEX rows_by_key ON rows (key, view);
            CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
                ctime INTEGER NOT NULL, inode INTEGER NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID;
            CREATE TABLE quarantine (key BLOB NOT NULL, decoder TEXT NOT NULL, max_pixels INTEGER NOT NULL,
                reason TEXT NOT NULL, PRIMARY KEY (key, decoder, max_pixels)) WITHOUT ROWID;
            INSERT INTO shards VALUES (1, 'a', 'x', 10, 1);
            PRAGMA user_version = 1;
        """)
        db.execute("INSERT INTO rows VALUES (1, 0, ?, 0)", (key(1),))
        db.execute("INSERT INTO quarantine VALUES (?, 'd', 1, 'text')", (key(2),))
    index = Index(path)
    assert index.locate("a", [key(1)]).found.all()
    assert index.shards("a")["x"].state == "good"
    assert index.all_quarantined() == [Quarantine(key(2), "d", 1, "text", None)]
    index.close()


def test_an_index_of_version_2_learns_of_addresses(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    Index(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.executescript("DROP TABLE urls; PRAGMA user_version = 2; INSERT INTO shards VALUES "
                         "(1, 'a', 'x', 10, 1, 'good', NULL)")  # fmt: skip
    index = Index(path)
    index.remember_urls({"s3://b/a": ("v", key(1)), "s3://b/b": (None, key(2))})
    assert index.url_digests(["s3://b/b", "s3://b/c", "s3://b/a"]) == [(None, key(2)), None, ("v", key(1))]
    index.forget_urls(["s3://b/a"])
    assert index.url_digests(["s3://b/a"]) == [None]
    assert index.shards("a")["x"].rows == 1
    index.close()


def test_an_index_of_another_version_is_refused_once(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "cache.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(CacheError, match=r"^the index .* is of version 99, this program reads 3; delete it"):
        Index(tmp_path / "cache.db")


def test_an_index_that_cannot_be_made_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match=r"a file stands where the folder .*file should be; move it away"):
        Index(tmp_path / "file" / "cache.db")
    (tmp_path / "cache.db").mkdir()
    with pytest.raises(CacheError, match="ICEBOX_INDEX=FILE puts it elsewhere"):
        Index(tmp_path / "cache.db")


def test_the_cache_and_the_weights_do_not_load_tensorflow() -> None:
    code = """
import pipeline.cache.space, pipeline.cache.digests, pipeline.backbone.weights
print(sorted({"tensorflow", "keras", "torch", "jax"} & {name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(python(code), capture_output=True, text=True, timeout=300)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("number", "why"), [(errno.ENOLCK, "its server's lock service"), (524, "mounted without locks")]
)
def test_a_file_system_without_locks_is_explained(
    space: FeatureSpace, monkeypatch: pytest.MonkeyPatch, number: int, why: str
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CacheError, match=f"cannot be locked .*{why}.*ICEBOX_LOCKS=off"), space.lock(print):
        pass
    with pytest.raises(CacheError, match="cannot be locked"), space.reading():
        pass


def test_where_locks_are_done_without_rows_are_added_but_nothing_is_removed(
    space: FeatureSpace, holder: warm.ColdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICEBOX_LOCKS", "off")
    partial = files.partial_name(space.shards, ".h5")
    partial.write_bytes(b"in the making elsewhere")
    with space.lock(print):  # though another process holds it
        space.remove_leftovers()
        add(space, [1])
    with space.reading():
        assert bits(space.read([key(1)], "features")) == bits(made([1]).features)
    assert partial.exists()
    with pytest.raises(CacheError, match="needs locks; unset ICEBOX_LOCKS"), space.removing(print):
        pass


# Folders that a group shares


@contextmanager
def as_member(group: int) -> Iterator[None]:
    """Be another user of a group for a while, who may do no more than permissions say."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user: NOT TESTED that a second member of a group can add rows")
    groups = os.getgroups()
    os.setgroups([group])
    os.setegid(group)
    os.seteuid(54321)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


_GROUP = 54322


@pytest.fixture
def shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of a cache that its owner keeps for a group, with umask 002, with some rows in it."""
    monkeypatch.delenv("ICEBOX_INDEX", raising=False)
    for folder in (tmp_path, *tmp_path.parents[:-2]):  # pytest's own are closed to others
        folder.chmod(folder.stat().st_mode | 0o011)
    root = tmp_path / "cache"
    root.mkdir()
    if os.geteuid() == 0:
        os.chown(root, 0, _GROUP)
    root.chmod(0o2775)
    before = os.umask(0o002)
    try:
        with closing(Cache(root)) as cache, (space := cache.create(SPEC, {})).lock(print):
            add(space, [1, 2])
        yield root
    finally:
        os.umask(before)


def test_files_get_the_permissions_that_the_umask_leaves(shared_cache: Path) -> None:
    with closing(Cache(shared_cache)) as cache:
        with cache.open(SPEC.directory).reading():
            pass
        with cache.index._changing() as db:
            db.execute("DELETE FROM files")
            journals = [path for path in shared_cache.iterdir() if path.name != "cache.db" and path.is_file()]
    found = {path: path.stat().st_mode & 0o777 for path in (*journals, *shared_cache.rglob("*")) if path.exists()}
    assert {mode for path, mode in found.items() if path.is_file()} == {0o664}, found
    assert {mode for path, mode in found.items() if path.is_dir()} == {0o775}, found
    assert {".lock", ".reading", "space.json", "cache.db"} <= {path.name for path in found}


def test_the_second_member_of_a_group_adds_rows(shared_cache: Path) -> None:
    with as_member(_GROUP), closing(Cache(shared_cache)) as cache:
        space = cache.open(SPEC.directory)
        with space.lock(print):
            add(space, [3])
        other = cache.create(replace(SPEC, layer="mixed8"), {})
        add(other, [4])
    with closing(Cache(shared_cache)) as cache:
        assert cache.open(SPEC.directory).totals().rows == 3
        assert cache.open(other.name).totals().rows == 1


@pytest.mark.parametrize(
    ("closed", "told"),
    [
        ("cache.db", r"the index .*cache.db cannot be written .*so nothing is computed; .* chmod g\+w"),
        ("", r"the index .*cache.db cannot be written .*so nothing is computed; .* chmod g\+w"),
        (
            f"{SPEC.directory}/shards",
            r"nothing can be written to .*shards \(Permission denied\), so nothing is computed",
        ),
        (f"{SPEC.directory}/.lock", r"\.lock cannot be written \(Permission denied\), so nothing is added"),
    ],
)
def test_what_a_member_cannot_write_is_told_before_anything_is_computed(
    shared_cache: Path, closed: str, told: str
) -> None:
    (shared_cache / closed).chmod(0o755 if (shared_cache / closed).is_dir() else 0o644)
    with as_member(_GROUP), closing(Cache(shared_cache)) as cache:
        space = cache.open(SPEC.directory)
        assert bits(space.read([key(1)], "features")) == bits(made([1]).features), "what is there can be read"
        cache.index.remember_digests({Path("/a.png"): (FileStamp(1, 2, 3, 4), key(1))})  # if it can, else it is told
        with pytest.raises(CacheError, match=told), space.lock(print):
            space.require_writable()
    assert not list(shared_cache.rglob(".partial-*"))
