"""Rows made up for tests of the cache: what an image is decides its row, and no two rows are alike."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest
import h5py
import numpy as np

from pipeline.cache.shard import Rows, ShardInfo
from pipeline.cache.space import FeatureSpace
from pipeline.core.spec import FeatureSpec
from pipeline.dataset import of_files
from pipeline.images.loader import Loaded, Loader

SPEC = replace(conftest.SPEC, weights="untrained:glorot:0", decode="decode-1", resize="resize-1")


def key(number: int) -> bytes:
    return hashlib.sha256(f"image {number}".encode()).digest()


def made(numbers: list[int], spec: FeatureSpec = SPEC, shape: tuple[int, ...] = (2, 3, 8)) -> Rows:
    values = [np.random.default_rng(n).normal(size=shape).astype(np.float32) for n in numbers]
    exact = np.maximum(np.stack(values), 0)
    keys = np.stack([np.frombuffer(key(n), np.uint8) for n in numbers])
    views = np.zeros(len(numbers), np.int64)
    return Rows(exact.astype(spec.storage), exact.mean((1, 2), dtype=np.float32), keys, views)


def add(space: FeatureSpace, numbers: list[int]) -> ShardInfo:
    info = space.write(made(numbers, space.spec))
    space.register(info)
    return info


def shard_file(space: FeatureSpace, info: ShardInfo) -> Path:
    return space.path / "shards" / f"{info.name}.h5"


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def chunk_places(path: Path, dataset: str) -> list[tuple[int, int]]:
    with h5py.File(path, "r") as file:
        handle: Any = file[dataset]
        chunks = (handle.id.get_chunk_info(i) for i in range(handle.id.get_num_chunks()))
        return [(chunk.byte_offset, chunk.size) for chunk in chunks]


def spoil(path: Path) -> None:
    """Flip a bit of the first row's features, which only a reading of the data can notice."""
    flip(path, chunk_places(path, "features")[0][0] + 5)


def load(paths: list[Path], **options: int) -> list[Loaded]:
    with Loader(of_files("some", paths), 299, "squash", options.get("max_pixels", 10**6)) as loader:
        return [loader(i) for i in range(len(paths))]
