"""Images of three classes and rows from which the class can be learned, for tests of what is trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import conftest
import cv2
import h5py
import numpy as np

from pipeline.backbone.table import BACKBONES
from pipeline.cache import shard
from pipeline.cache.space import FeatureSpace
from pipeline.cache.workspace import Workspace
from pipeline.core.hashing import image_key
from pipeline.core.spec import PLAIN_VIEW, FeatureSpec, Views
from pipeline.dataset import Dataset, open_dataset
from pipeline.extraction.extract import Extraction

SPEC = replace(conftest.SPEC, weights="sha256:" + "0" * 64)
CLASSES = ("ant", "bee", "cow")


def spec_of(name: str) -> FeatureSpec:
    """The space of a backbone of the table, as `SPEC` is that of InceptionV3."""
    row = BACKBONES[name]
    more = {"layer": row.default_layer, "input_size": row.input_size, "scaling": row.scaling}
    return replace(SPEC, backbone=name, **more)


Rewrite = Callable[[int, np.ndarray], np.ndarray]


def write_images(root: Path, count: int, classes: tuple[str, ...] = CLASSES) -> None:
    """`count` files a class, no two alike: a picture of one pixel, and behind it what tells them apart."""
    pixel = cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes()
    for label in classes:
        (root / label).mkdir(parents=True)
        for i in range(count):
            (root / label / f"{i:03}.png").write_bytes(pixel + os.fsencode(f"{root.name} {label} {i}"))


def listed(root: Path) -> Dataset:
    return open_dataset(str(root), downloads=root)


def row_of(key: bytes, label: int) -> np.ndarray:
    """A tensor (2, 2, 8) drawn from the image's key, with the class in the channel of its number."""
    made = np.random.default_rng(list(key)).random((2, 2, 8), np.float32)
    made[..., label] += 2
    return made


def fill(
    workspace: Workspace,
    dataset: Dataset,
    *,
    leave_out: frozenset[int] | set[int] = frozenset(),
    rewrite: Rewrite = lambda _, row: row,
    spec: FeatureSpec = SPEC,
    views: Views = PLAIN_VIEW,
) -> FeatureSpace:
    """Write the rows of every image but some, in three shards and an order unrelated to the dataset's.

    The last channel of an augmented view says which one it is: 1 for the first.
    """
    space = workspace.cache.create(spec, {"weights": "a test's"})
    first: dict[bytes, int] = {}
    for i in range(len(dataset)):
        if i not in leave_out:
            first.setdefault(image_key(dataset.read(i)), i)
    keys = list(first)
    order = np.random.default_rng(1).permutation(len(keys)).tolist()
    for start in range(3):
        some = [keys[i] for i in order[start::3]]
        exact = np.stack([rewrite(first[key], row_of(key, dataset.labels[first[key]])) for key in some])
        raw = np.frombuffer(b"".join(some), np.uint8).reshape(-1, 32)
        for index, number in enumerate(views.numbers):
            if views.count > 1:
                exact[..., -1] = index
            numbers = np.full(len(some), number, np.int64)
            made = shard.Rows(exact.astype(np.float16), exact.mean(axis=(1, 2)), raw, numbers, views.recipes)
            space.register(space.write(made))
    return space


def counts(done: Extraction) -> tuple[int, int, int, int]:
    assert done.rows + len(done.quarantined) == done.images
    return done.computed, done.reused, done.duplicates, len(done.quarantined)


def stored(data: Path) -> dict[bytes, tuple[np.ndarray, np.ndarray]]:
    """Read every shard with plain h5py: key → (features, pooled)."""
    rows = {}
    for path in data.glob("cache/*/shards/[!.]*.h5"):
        with h5py.File(path) as file:
            content = {name: np.asarray(file[name]) for name in ("key", "features", "pooled")}
        for key, features, pooled in zip(content["key"], content["features"], content["pooled"], strict=True):
            rows[key.tobytes()] = (features, pooled)
    return rows
