"""Define `Dataset`: a list of images with labels, and a `Source` that reads each image on demand."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.core.errors import DatasetError, UsageError
from pipeline.dataset import remote

# Common names of the three splits, in lower case, and the name that Icebox uses for each.
SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "eval": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


class Source(Protocol):
    """Reads image i of a dataset on demand; picklable, so that other processes can read images too."""

    def read(self, i: int) -> bytes | np.ndarray:
        """Return the encoded bytes of image i, or its pixels: uint8, (h, w) grey or (h, w, 3) RGB."""
        ...

    def path(self, i: int) -> Path | None:
        """Return the file of image i, or None if it has none on this machine."""
        ...

    def url(self, i: int) -> str | None:
        """Return the resolved URL of image i, or None if it is not a remote image."""
        ...

    def take(self, rows: np.ndarray) -> Source:
        """Return a source of the images at `rows`, (m,) int64, that holds the pixels of no other image."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Images in files: `names` are paths relative to `root`, absolute paths, or URLs (see `remote`)."""

    root: Path
    names: Sequence[str]

    def read(self, i: int) -> bytes:
        """Return the bytes of file i. Raises OSError if it cannot be read or is not a regular file."""
        path = self.path(i)
        if path is None:
            return remote.fetch(self._resolved(i)).data
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("not a regular file")  # reading a pipe may block, reading a device may never end
        return path.read_bytes()

    def path(self, i: int) -> Path | None:
        """Return the path of file i; None if it is a remote image."""
        return None if remote.is_url(self.names[i]) else self.root / self.names[i]

    def url(self, i: int) -> str | None:
        """Return the resolved URL of file i, or None if it is on this machine."""
        return self._resolved(i) if remote.is_url(self.names[i]) else None

    def _resolved(self, i: int) -> str:
        return remote.resolve(self.names[i], os.path.normpath(self.root))

    def take(self, rows: np.ndarray) -> FileSource:
        """Return the files at `rows`, (m,) int64."""
        return FileSource(self.root, _pick(self.names, rows))


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in one array: `pixels`, uint8, (n, h, w) grey or (n, h, w, 3) RGB."""

    pixels: np.ndarray

    def __post_init__(self) -> None:
        self.pixels.setflags(write=False)  # `read` returns views, which must not change the dataset

    def read(self, i: int) -> np.ndarray:
        """Return the pixels of image i, a read-only view."""
        return self.pixels[i]

    def path(self, i: int) -> None:
        """Return None: images in an array have no files."""
        return

    def url(self, i: int) -> None:
        """Return None: images in an array have no URLs."""
        return

    def take(self, rows: np.ndarray) -> ArraySource:
        """Return the images at `rows`, (m,) int64, as a copy, so that it can be pickled without the other pixels."""
        return ArraySource(self.pixels[rows])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A list of n images: the name and label of each, and on demand its bytes or pixels.

    Parameters
    ----------
    name
        "digits", "cifar10", or the name of the folder or manifest.
    classes
        The class names in Unicode form NFC, sorted.
    names
        (n,) the name of each image: a path with "/", a URL, or a name like "digits/17". A manifest may repeat names.
    labels
        (n,) int32, indices into `classes`.
    splits
        (n,) "train", "val" or "test", or None if the dataset has no splits.
    groups
        (n,) the group of each image; all images of a group belong on one side (train, val or test). An image with ""
        is in no group. None if there are no groups.
    source
        Reads image i.
    ignored
        How many files were ignored, by ending (lower case, "" for none) or as "hidden". Ignored folders, hidden or of
        other programs, are counted by name, with "/" at the end.
    without_images
        The folders of splits and classes that hold no image, such as "dogs" or "test/dogs".
    embedded
        Whether the dataset comes with an installed library and never needs a network.
    """

    name: str
    classes: tuple[str, ...]
    names: Sequence[str]
    labels: np.ndarray
    splits: Sequence[str] | None
    groups: Sequence[str] | None
    source: Source
    ignored: Mapping[str, int] = field(default_factory=dict)
    without_images: Sequence[str] = ()
    embedded: bool = False

    def __post_init__(self) -> None:
        for column in ("labels", "splits", "groups"):
            values = getattr(self, column)
            if values is not None and len(values) != len(self.names):
                raise DatasetError(f"{self.name}: expected {len(self.names)} {column}, found {len(values)}")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes | np.ndarray:
        """Return image i: encoded bytes, or uint8 pixels, (h, w) grey or (h, w, 3) RGB.

        Raises
        ------
        OSError
            If its file cannot be read.
        """
        return self.source.read(i)

    def path(self, i: int) -> Path | None:
        """Return the absolute path of image i, or None if it is not a file on this machine."""
        return self.source.path(i)

    def url(self, i: int) -> str | None:
        """Return the resolved URL of image i, or None if it is not a remote image."""
        return self.source.url(i)

    def urls(self) -> Iterator[str]:
        """Yield the resolved URLs of the remote images."""
        return (url for i in range(len(self)) if (url := self.source.url(i)) is not None)

    def take(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """Return a dataset of the images at `indices`, in that order, or of those where a boolean array is true.

        All classes are kept, so that labels keep their meaning. Raises IndexError if an index is out of range.
        """
        rows = np.asarray(indices)
        rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows.astype(np.int64)
        return replace(
            self,
            names=_pick(self.names, rows),
            labels=self.labels[rows],
            splits=None if self.splits is None else _pick(self.splits, rows),
            groups=None if self.groups is None else _pick(self.groups, rows),
            source=self.source.take(rows),
        )


def of_files(
    name: str, files: Sequence[Path | str], names: Sequence[str] | None = None, ignored: Mapping[str, int] | None = None
) -> Dataset:
    """Return a dataset of images without a known class, from files at absolute paths or resolved URLs.

    All have the class "unknown". `names` are their names, by default the paths and URLs.
    """
    texts, labels = [str(file) for file in files], np.zeros(len(files), np.int32)
    source = FileSource(Path("/"), texts)
    return Dataset(name, ("unknown",), names or texts, labels, None, None, source, ignored or {})


def _pick(values: Sequence[Any], rows: np.ndarray) -> list[Any]:
    return [values[i] for i in rows.tolist()]


def index_labels(texts: Iterable[str], order: Callable[[str], Any] | None = None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the sorted distinct `texts` in Unicode form NFC, and for each text its index among them, (n,) int32.

    The sort key is `order`; by default they are sorted as text.
    """
    seen: dict[str, int] = {}
    codes = np.fromiter((seen.setdefault(text, len(seen)) for text in texts), dtype=np.int32)
    names = [unicodedata.normalize("NFC", text) for text in seen]
    classes = tuple(sorted(set(names), key=order))
    place = {name: i for i, name in enumerate(classes)}
    return classes, np.array([place[name] for name in names], np.int32)[codes]


def identical_images(classes: Sequence[str]) -> list[list[str]]:
    """Return groups of class names that look alike: they differ in case, spaces or compatible Unicode forms only."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
        groups.setdefault(" ".join(visible.casefold().split()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def remap(order: Sequence[int], codes: np.ndarray) -> np.ndarray:
    """Return for each code its position in `order`, a permutation of all codes, as (n,) int32."""
    place = np.empty(len(order), np.int32)
    place[list(order)] = np.arange(len(order), dtype=np.int32)
    return place[codes]


def brought_splits(splits: list[str]) -> list[str] | None:
    """Return `splits`, or None if all are "train", which leaves no image for validation or test."""
    return None if set(splits) <= {"train"} else splits


def limit(dataset: Dataset, count: int) -> Dataset:
    """Return the first `count` images of a fixed, class-balanced order; `dataset` itself if it has no more images.

    The order takes one image of each class in turn, as long as the class has any left. Within a class, images are
    sorted by the sha256 of their names. No seed is used, and a smaller limit is always the start of a larger one.

    Raises
    ------
    UsageError
        If `count` is below 1.
    """
    if count < 1:
        raise UsageError(f"--limit must be at least 1, found {count}")
    if count >= len(dataset):
        return dataset
    drawn = hash_numbers(name.encode("utf-8", "surrogatepass") for name in dataset.names)
    by_class = np.lexsort((drawn, dataset.labels))
    sizes = np.bincount(dataset.labels, minlength=len(dataset.classes))
    turn = np.arange(len(dataset)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # position within the class
    return dataset.take(by_class[np.argsort(turn, kind="stable")][:count])


def hash_numbers(values: Iterable[bytes]) -> np.ndarray:
    """Return the first 8 bytes of each value's sha256, big-endian, as (n,) uint64."""
    digests = b"".join(hashlib.sha256(value).digest()[:8] for value in values)
    return np.frombuffer(digests, ">u8").astype(np.uint64)
