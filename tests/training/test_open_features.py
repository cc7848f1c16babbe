"""`from pipeline import open_features`: the rows of a dataset, by label and split, in whatever form a program wants."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from cached import CLASSES, fill, listed, row_of, write_images
from conftest import ROOT

from pipeline import Features, open_features
from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core.errors import DatasetError, MissingRowsError, UsageError
from pipeline.core.hashing import image_key
from pipeline.core.spec import Views
from pipeline.training.rows import StoredRows

LITTLE = 48 * 64  # bytes: 48 rows, less than a split has


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("ICEBOX_INDEX", raising=False)
    monkeypatch.setenv("ICEBOX_DATA", str(tmp_path / "data"))
    write_images(tmp_path / "photos", 40)
    with closing(Cache(tmp_path / "data" / "cache")) as cache:
        fill(Workspace(tmp_path / "data", cache), listed(tmp_path / "photos"), views=Views(2))
    return tmp_path / "photos"


@pytest.fixture(params=[None, LITTLE], ids=["held", "streamed"])
def features(request: pytest.FixtureRequest, photos: Path) -> Iterator[Features]:
    with open_features(photos, memory=request.param) as found:
        yield found


def expected(photos: Path) -> dict[str, tuple[np.ndarray, int]]:
    """name → row without its marker of views, and label."""
    dataset = listed(photos)
    found = {}
    for i, name in enumerate(dataset.names):
        row = row_of(image_key(dataset.read(i)), int(dataset.labels[i])).astype(np.float16)
        found[name] = (row[..., :-1], int(dataset.labels[i]))
    return found


def test_arrays_are_the_rows_of_their_names(features: Features, photos: Path) -> None:
    known, seen = expected(photos), list[str]()
    for split in ("train", "val", "test"):
        rows, labels = features.arrays(split)
        names = features.names(split)
        assert rows.dtype == np.float16
        assert labels.dtype == np.int32
        for name, row, label in zip(names, rows, labels, strict=True):
            assert np.array_equal(row[..., :-1], known[name][0])
            assert label == known[name][1]
        seen += names
    assert sorted(seen) == sorted(known), "each image is in one split"
    assert features.classes == CLASSES
    assert features.space.startswith("inception_v3-mixed10-")


def test_batches_have_each_row_once_in_an_order_of_seed_and_epoch(features: Features) -> None:
    rows, labels = features.arrays("train")
    batches = list(features.batches("train", 16))
    assert {len(some) for some, _ in batches[:-1]} == {16}
    together = np.concatenate([some for some, _ in batches])
    assert sorted(map(bytes, together)) == sorted(map(bytes, rows))
    by_row = {bytes(row): label for row, label in zip(rows, labels, strict=True)}
    assert [by_row[bytes(row)] for row in together] == np.concatenate([some for _, some in batches]).tolist()
    again, other = (np.concatenate([some for some, _ in features.batches("train", 16, epoch=n)]) for n in (1, 2))
    assert np.array_equal(again, together)
    assert not np.array_equal(other, together)


def test_a_tf_dataset_goes_through_all_rows_anew_each_time(features: Features) -> None:
    made = features.tf_dataset("train", 16)
    rows, _ = features.arrays("train")
    first, second = (np.concatenate([some.numpy() for some, _ in made]) for _ in range(2))
    assert sorted(map(bytes, first)) == sorted(map(bytes, second)) == sorted(map(bytes, rows))
    assert not np.array_equal(first, second)
    assert len(made) == -(-len(rows) // 16)
    assert made.element_spec[0].shape.as_list() == [None, 2, 2, 8]


def test_items_are_pairs_by_index_in_any_process(features: Features) -> None:
    rows, labels = features.arrays("val")
    items = pickle.loads(pickle.dumps(features.items("val")))
    assert len(items) == len(labels)
    assert [label for _, label in items] == labels.tolist()
    assert np.array_equal(items[-1][0], rows[-1])
    both = items.__getitems__([3, 0])
    assert np.array_equal(both[0][0], rows[3])
    assert np.array_equal(both[1][0], rows[0])
    with pytest.raises(IndexError, match=r"\d+ is not one of \d+ rows"):
        items[len(items)]


def test_a_dataloader_takes_the_items(features: Features) -> None:
    """PyTorch's own; `.ci/run` installs it."""
    data = pytest.importorskip("torch.utils.data", reason="PyTorch is not installed: make setup EXTRAS=torch")
    loader = data.DataLoader(features.items("train"), batch_size=16, shuffle=True, num_workers=2)
    batches = [(rows.numpy(), labels.numpy()) for rows, labels in loader]
    rows, labels = features.arrays("train")
    assert sorted(map(bytes, np.concatenate([some for some, _ in batches]))) == sorted(map(bytes, rows))
    assert sorted(np.concatenate([some for _, some in batches])) == sorted(labels)


def test_pooled_rows_and_views(photos: Path) -> None:
    with open_features(photos, what="pooled", views=2) as features:
        rows, labels = features.arrays("train")
        names = features.names("train")
        n = len(names) // 2
        assert rows.shape == (2 * n, 8)
        assert names[:n] == names[n:]
        assert np.array_equal(labels[:n], labels[n:])
        assert (rows[:n, -1] == 0).all()
        assert (rows[n:, -1] == 1).all()
        assert (features.arrays("test")[0][:, -1] == 0).all(), "others come plain"


def test_memory_is_for_all_splits_together(photos: Path) -> None:
    for memory, kind in ((120 * 64, np.ndarray), (119 * 64, StoredRows)):
        with open_features(photos, memory=memory) as features:
            assert all(isinstance(features.items(side)._rows, kind) for side in ("train", "val", "test"))


def test_wrong_use_is_told(photos: Path, tmp_path: Path) -> None:
    with open_features(photos) as features:
        with pytest.raises(UsageError, match="split must be one of train, val, test, found 'all'"):
            features.arrays("all")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="must be at least 1, found 0"):
            features.batches("train", 0)
    with pytest.raises(UsageError, match='"features" or "pooled", found'):
        open_features(photos, what="raw")  # type: ignore[arg-type]
    with pytest.raises(MissingRowsError, match=r"in 3 views; compute them by Icebox.features\(.* views=3"):
        open_features(photos, views=3)
    with pytest.raises(DatasetError, match="no dataset"):
        open_features(tmp_path / "nowhere")


def test_gc_waits_until_it_is_closed(photos: Path, tmp_path: Path) -> None:
    features = open_features(photos)
    lock = next((tmp_path / "data").glob("cache/*/.reading"))
    probe = f"import fcntl; fcntl.flock(open({str(lock)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 1
    features.close()
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import pipeline, sys; print({'numpy', 'tensorflow', 'cv2', 'dask'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
