"""How small, and how fast to write and to read, are the same rows under other filters, levels and chunk shapes?

    python benchmarks/encodings.py --data DIR --rows 1024 --runs 5

The rows must be in the cache of `--data`. Each encoding is written to memory, and read back by one thread, in turn, so
often; then the cache's own way is read by two threads and by two processes. Two that no filter can make are done by
hand: the channels first, and a bitmap of what is not 0 with its values. Prints one JSON object: KiB an image, and
images/s, medians with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from bare import spread

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.cache.shard import row_filters  # noqa: E402

ROW = (8, 8, 2048)


def blosc2(name: Any, level: int, filters: int) -> dict[str, Any]:
    return dict(hdf5plugin.Blosc2(cname=name, clevel=level, filters=filters))


def encodings(rows: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the keywords of `create_dataset` of each way."""
    plain, shuffle, bits = hdf5plugin.Blosc2.NOFILTER, hdf5plugin.Blosc2.SHUFFLE, hdf5plugin.Blosc2.BITSHUFFLE
    row = {"chunks": (1, *ROW)}
    ways: dict[str, dict[str, Any]] = {
        "the cache's: Zstd 1, Fletcher32": row_filters("features", rows.shape, rows.dtype),
        "the same without Fletcher32": row | dict(hdf5plugin.Zstd(clevel=1)),
        "none": row,
        "gzip 4, shuffle": row | {"compression": "gzip", "compression_opts": 4, "shuffle": True},
        "lzf, shuffle": row | {"compression": "lzf", "shuffle": True},
        "Bitshuffle lz4": row | dict(hdf5plugin.Bitshuffle(cname="lz4")),
        "Blosc2 zstd 1": row | blosc2("zstd", 1, plain),
        "Zstd 2": row | dict(hdf5plugin.Zstd(clevel=2)),
        "Zstd 3": row | dict(hdf5plugin.Zstd(clevel=3)),
        "Zstd 3, shuffle": row | {"shuffle": True} | dict(hdf5plugin.Zstd(clevel=3)),
        "Blosc2 lz4": row | blosc2("lz4", 1, plain),
        "Blosc2 zstd 1, shuffle": row | blosc2("zstd", 1, shuffle),
        "Blosc2 zstd 1, bitshuffle": row | blosc2("zstd", 1, bits),
    }
    for level in (3, 5):
        ways[f"Blosc2 zstd {level}"] = row | blosc2("zstd", level, plain)
    for chunk in ((1, 8, 8, 256), (1, 1, 1, 2048), (4, 8, 8, 2048), (16, 8, 8, 64)):
        ways[f"Blosc2 zstd 1, chunks of {' x '.join(map(str, chunk))}"] = {"chunks": chunk} | blosc2("zstd", 1, plain)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--space", help="by default one of features in bfloat16")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    space = given.data / "cache" / given.space if given.space else in_bfloat16(given.data / "cache")
    paths = sorted((space / "shards").glob("*.h5"))
    rows, pooled = stored(paths, given.rows)
    result: dict[str, Any] = {"rows": len(rows), "zeros": round(float((rows == 0).mean()), 3), "encodings": {}}
    measured: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(given.runs):
        for name, options in encodings(rows).items():
            measured.setdefault(name, []).append(through_hdf5(rows, options))
            print(f"{name}: {measured[name][-1]}", file=sys.stderr, flush=True)
        measured.setdefault("channels first, Blosc2 zstd 1", []).append(channels_first(rows))
        measured.setdefault("bitmap and values, zstd 1", []).append(bitmap(rows))
        options = row_filters("pooled", pooled.shape, pooled.dtype)
        measured.setdefault("the cache's pooled rows", []).append(through_hdf5(pooled, options))
    for name, runs in measured.items():
        kib, writing, reading = (spread(each) for each in zip(*runs, strict=True))
        result["encodings"][name] = {"KiB": kib["median"], "write": writing, "read": reading}
    result["read_from_disk"] = parallel(paths, given.runs)
    print(json.dumps(result, indent=1))


def in_bfloat16(cache: Path) -> Path:
    """Return a feature space on disk that was computed in bfloat16."""
    for path in sorted(cache.glob("*/space.json")):
        if json.loads(path.read_text())["spec"]["precision"] == "bfloat16":
            return path.parent
    sys.exit(f"error: no features in bfloat16 in {cache}; compute some by `features --precision bfloat16`")


def stored(paths: list[Path], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features and pooled rows of shards."""
    features, pooled = [], []
    for path in paths:
        with h5py.File(path) as file:
            features.append(np.asarray(file["features"]))
            pooled.append(np.asarray(file["pooled"]))
        if sum(map(len, features)) >= count:
            break
    return np.concatenate(features)[:count], np.concatenate(pooled)[:count]


def through_hdf5(rows: np.ndarray, options: dict[str, Any]) -> tuple[float, float, float]:
    """Return KiB an image, and images/s written and read by one thread, in memory."""
    buffer = io.BytesIO()
    start = time.perf_counter()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("rows", data=rows, **options)
    writing = time.perf_counter() - start
    back = np.empty_like(rows)
    back[:] = 1  # memory that the system has given already
    with h5py.File(buffer, "r") as file:
        start = time.perf_counter()
        file["rows"].read_direct(back)  # type: ignore[union-attr]
        reading = time.perf_counter() - start
    assert np.array_equal(back, rows)
    return len(buffer.getbuffer()) / 1024 / len(rows), len(rows) / writing, len(rows) / reading


def channels_first(rows: np.ndarray) -> tuple[float, float, float]:
    """As `through_hdf5`, the axes exchanged on the way."""
    start = time.perf_counter()
    turned = np.ascontiguousarray(np.moveaxis(rows, -1, 1))
    there = time.perf_counter() - start
    options = {"chunks": (1, *turned.shape[1:])} | blosc2("zstd", 1, hdf5plugin.Blosc2.NOFILTER)
    kib, writing, reading = through_hdf5(turned, options)
    start = time.perf_counter()
    np.ascontiguousarray(np.moveaxis(turned, 1, -1))
    back = time.perf_counter() - start
    return kib, len(rows) / (len(rows) / writing + there), len(rows) / (len(rows) / reading + back)


def bitmap(rows: np.ndarray) -> tuple[float, float, float]:
    """As `through_hdf5`, of what is written as packed bits and the values that are not 0, one image after the other."""
    options = {"chunks": True} | blosc2("zstd", 1, hdf5plugin.Blosc2.NOFILTER)
    buffer = io.BytesIO()
    start = time.perf_counter()
    with h5py.File(buffer, "w") as file:
        for i, row in enumerate(rows):
            flat = row.reshape(-1)
            where = flat != 0
            for name, part in (("bits", np.packbits(where)), ("values", flat[where].view(np.uint8))):
                file.create_dataset(f"{name}{i}", data=part, **options)
    writing = time.perf_counter() - start
    size = 0
    with h5py.File(buffer, "r") as file:
        back = np.zeros_like(rows).reshape(len(rows), -1)
        start = time.perf_counter()
        for i in range(len(rows)):
            bits: Any = file[f"bits{i}"]
            values: Any = file[f"values{i}"]
            size += bits.id.get_storage_size() + values.id.get_storage_size()
            back[i, np.unpackbits(bits[:]).view(bool)] = values[:].view(rows.dtype)
        reading = time.perf_counter() - start
    assert np.array_equal(back.reshape(rows.shape), rows)
    return size / 1024 / len(rows), len(rows) / writing, len(rows) / reading


def parallel(paths: list[Path], runs: int) -> dict[str, Any]:
    """Return images/s of the features read from shards, by one thread, two threads, and two processes."""
    ways: dict[str, Callable[[], Executor]] = {
        "one thread": lambda: ThreadPoolExecutor(1),
        "two threads": lambda: ThreadPoolExecutor(2),
        "two processes": lambda: ProcessPoolExecutor(2),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for name, make in ways.items():
        with make() as pool:
            list(pool.map(_read, paths))
            for _ in range(runs):
                start = time.perf_counter()
                count = sum(pool.map(_read, paths))
                rates[name].append(count / (time.perf_counter() - start))
    return {name: spread(values) for name, values in rates.items()}


_into: dict[int, np.ndarray] = {}


def _read(path: Path) -> int:
    import threading

    with h5py.File(path, "r", locking=False) as file:
        dataset: Any = file["features"]
        count = len(dataset)
        room = _into.setdefault(threading.get_ident(), np.ones((512, *dataset.shape[1:]), dataset.dtype))
        dataset.read_direct(room, np.s_[:], np.s_[:count])
        return count


if __name__ == "__main__":
    main()
