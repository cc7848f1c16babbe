"""Cached rows as training data: the same numbers from memory and from disk, and no more memory than needed."""

from __future__ import annotations

import hashlib
import logging
import tracemalloc
from dataclasses import replace
from typing import Any

import conftest
import numpy as np
import pytest

from pipeline.cache import shard
from pipeline.cache.space import Cache, FeatureSpace
from pipeline.core.errors import CacheError, UsageError
from pipeline.core.spec import HeadSpec
from pipeline.training.heads import Data, TrainingContext, fit
from pipeline.training.rows import RowSelection, StoredRows, blocks, open_rows

SPEC = replace(conftest.SPEC, weights="sha256:" + "0" * 64)
N = 120


def key(i: int) -> bytes:
    return hashlib.sha256(f"image {i}".encode()).digest()


def features(n: int, shape: tuple[int, int, int] = (2, 2, 8)) -> np.ndarray:
    """Rows whose every number says which image it is of, and class i % 3 in channel i % 3."""
    made = np.random.default_rng(0).random((n, *shape), np.float32)
    made[np.arange(n), ..., np.arange(n) % 3] += 2
    return made.astype(np.float16)


def store(space: FeatureSpace, tensors: np.ndarray, shards: int) -> None:
    """Write the rows into several shards, in an order unrelated to the images'."""
    order = np.random.default_rng(1).permutation(len(tensors))
    for some in np.array_split(order, shards):
        keys = np.frombuffer(b"".join(key(i) for i in some.tolist()), np.uint8).reshape(-1, 32)
        pooled = tensors[some].astype(np.float32).mean(axis=(1, 2))
        space.register(space.write(shard.Rows(tensors[some], pooled, keys, np.zeros(len(some), np.int64))))


@pytest.fixture
def space(cache: Cache) -> FeatureSpace:
    return cache.create(SPEC, {"weights": "a test's"})


@pytest.fixture
def filled(space: FeatureSpace) -> FeatureSpace:
    store(space, features(N), shards=4)
    return space


KEYS = [key(i) for i in range(N)]
AT = [np.arange(0, 80), np.arange(80, 100), np.arange(100, N)]
SPLITS = [RowSelection(at) for at in AT]


LITTLE = 4_000  # bytes: 120 rows of 64 do not fit


def on_disk(space: FeatureSpace, dataset: str) -> list[Any]:
    """The rows as they are when memory is short."""
    return open_rows(space, KEYS, dataset, SPLITS, memory=LITTLE)


def test_rows_come_in_the_order_of_the_keys_whatever_that_of_the_shards(filled: FeatureSpace) -> None:
    tensors = features(N)
    means = tensors.astype(np.float32).mean(axis=(1, 2))
    for at, some, pooled in zip(
        AT, open_rows(filled, KEYS, "features", SPLITS), open_rows(filled, KEYS, "pooled", SPLITS), strict=True
    ):
        assert np.array_equal(np.asarray(some), tensors[at])
        assert np.array_equal(np.asarray(pooled), means[at])


def test_a_split_may_be_any_selection_of_keys(filled: FeatureSpace) -> None:
    at = np.array([7, 3, 119, 3, 0])
    assert np.array_equal(np.asarray(open_rows(filled, KEYS, "features", [RowSelection(at)])[0]), features(N)[at])


INDICES = {
    "forwards": np.arange(80),
    "backwards": np.arange(80)[::-1],
    "shuffled": np.random.default_rng(2).permutation(80),
    "a few": np.array([41, 3, 60]),
    "one": np.array([17]),
    "repeated": np.array([5, 5, 9, 5]),
}


@pytest.mark.parametrize("order", INDICES)
def test_rows_on_disk_equal_rows_in_memory(filled: FeatureSpace, order: str) -> None:
    there = on_disk(filled, "features")[0]
    here = open_rows(filled, KEYS, "features", SPLITS)[0]
    assert isinstance(here, np.ndarray)
    assert isinstance(there, StoredRows)
    assert there.shape == here.shape == (80, 2, 2, 8)
    assert len(there) == len(here)
    read = there[INDICES[order]]
    assert read.dtype == here.dtype == np.float16
    assert np.array_equal(read, here[INDICES[order]])


def test_how_much_is_read_into_memory_is_said_first(filled: FeatureSpace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.training.rows"):
        open_rows(filled, KEYS, "features", SPLITS)
        on_disk(filled, "features")
    first, second = caplog.messages
    assert "120 rows, 7.68 kB, are read into memory" in first
    assert "streamed from disk" in second


def test_too_little_memory_for_a_few_rows_is_refused(filled: FeatureSpace) -> None:
    with pytest.raises(UsageError, match=r"--memory must hold 48 rows of 64 bytes, 3,072 in all; found 3,071"):
        open_rows(filled, KEYS, "features", SPLITS, memory=48 * 64 - 1)


def test_a_vanished_shard_is_named_when_its_row_is_needed(filled: FeatureSpace) -> None:
    there = on_disk(filled, "features")[0]
    for path in (filled.path / "shards").glob("*.h5"):
        path.unlink()
    with pytest.raises(CacheError, match="shard"):
        there[np.array([0])]


@pytest.mark.parametrize("n", [1, 1024, 1025, 3000])
def test_blocks_cover_all_rows_once_in_order(n: int) -> None:
    rows = np.arange(n, dtype=np.float32)[:, None]
    found = list(blocks(rows))
    assert np.concatenate([at for at, _ in found]).tolist() == list(range(n))
    assert all(np.array_equal(some[:, 0], at) for at, some in found)
    assert max(len(at) for at, _ in found) <= 1024


def test_rows_on_disk_are_gone_through_in_order_too(filled: FeatureSpace) -> None:
    read = np.concatenate([some for _, some in blocks(on_disk(filled, "features")[0])])
    assert np.array_equal(read, features(N)[:80])


# Training


def train(some: list[Any]) -> tuple[list[dict[str, float]], np.ndarray]:
    labels = [at % 3 for at in AT]
    spec = HeadSpec.make("flatten", epochs=3, hidden=16, batch_size=16)
    done = fit(spec, Data(some[0], labels[0], some[1], labels[1], 3), TrainingContext())
    return done.history, done.head.predict(some[2])


def test_flatten_trained_from_disk_learns_what_it_learns_from_memory(filled: FeatureSpace) -> None:
    """The order of the rows differs, so the numbers do a little."""
    there = on_disk(filled, "features")
    assert all(isinstance(some, StoredRows) for some in there)
    (streamed, said), (held, expected) = train(there), train(open_rows(filled, KEYS, "features", SPLITS))
    assert streamed[-1]["val_loss"] == pytest.approx(held[-1]["val_loss"], abs=0.1)
    assert (said.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert held[0]["loss"] > held[-1]["loss"]


def train_dense(some: Any, val: Any = None) -> None:
    """Train one epoch, validated on the first 64 rows."""
    data = Data(some, np.arange(len(some)) % 3, some if val is None else val, np.arange(64) % 3, 3)
    fit(HeadSpec.make("flatten", epochs=1, hidden=4), data, TrainingContext())


def peak_of_training(space: FeatureSpace, n: int) -> int:
    """Bytes that opening, statistics and an epoch of training allocate at most, with rows left on disk."""
    tracemalloc.start()
    try:
        train, val = open_rows(
            space,
            [key(i) for i in range(n)],
            "features",
            [RowSelection(np.arange(n)), RowSelection(np.arange(64))],
            memory=2 * 10**6,
        )
        train_dense(train, val)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows_when_they_are_left_on_disk(space: FeatureSpace) -> None:
    many, few = 1024, 256
    train_dense(np.zeros((64, 2, 2, 8), np.float16))  # imports and Keras' own caches are not what is measured
    tensors = features(many, (4, 4, 256))
    store(space, tensors, shards=4)
    before, after = (peak_of_training(space, n) for n in (few, many))
    grown = tensors[few:].nbytes
    assert grown > 6e6
    assert after - before < grown / 5
