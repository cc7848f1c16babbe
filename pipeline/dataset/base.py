"""The `Dataset`: a list of images and where to read each, with the pixels left where they are."""

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

# What people call the three sides, in lower case, and what we call them.
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
    """Gives image i when asked; picklable, so that another process can read too."""

    def read(self, i: int) -> bytes | np.ndarray:
        """Return the encoded bytes of image i, or its pixels: uint8, (h, w) grey or (h, w, 3) RGB."""
        ...

    def path(self, i: int) -> Path | None:
        """Return the file of image i, or None if it has none on this machine."""
        ...

    def url(self, i: int) -> str | None:
        """Return the resolved address of image i, or None if it has none."""
        ...

    def take(self, rows: np.ndarray) -> Source:
        """Return the source of the images at `rows`, (m,) int64, which holds no other pixels."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Images that are files: `names` are paths relative to `root`, or absolute, or addresses (see `remote`)."""

    root: Path
    names: Sequence[str]

    def read(self, i: int) -> bytes:
        """Return the bytes of file i. Raises OSError if it cannot be read, or is no regular file."""
        path = self.path(i)
        if path is None:
            return remote.fetch(self._resolved(i)).data
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("not a regular file")  # a pipe would be waited for, a device read for ever
        return path.read_bytes()

    def path(self, i: int) -> Path | None:
        """Return the path of file i; None if it is behind an address."""
        return None if remote.is_url(self.names[i]) else self.root / self.names[i]

    def url(self, i: int) -> str | None:
        """Return the resolved address of file i, or None if it is on this machine."""
        return self._resolved(i) if remote.is_url(self.names[i]) else None

    def _resolved(self, i: int) -> str:
        return remote.resolve(self.names[i], os.path.normpath(self.root))

    def take(self, rows: np.ndarray) -> FileSource:
        """Return the files at `rows`, (m,) int64."""
        return FileSource(self.root, _pick(self.names, rows))


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images that come as one array: `pixels`, uint8, (n, h, w) grey or (n, h, w, 3) RGB."""

    pixels: np.ndarray

    def __post_init__(self) -> None:
        self.pixels.setflags(write=False)  # rows are handed out as views: nobody may alter the dataset

    def read(self, i: int) -> np.ndarray:
        """Return the pixels of image i, a read-only view."""
        return self.pixels[i]

    def path(self, i: int) -> None:
        """Return None: these images are no files."""
        return

    def url(self, i: int) -> None:
        """Return None: these images are no files."""
        return

    def take(self, rows: np.ndarray) -> ArraySource:
        """Return the images at `rows`, (m,) int64, as a copy: a pickled part carries its own pixels only."""
        return ArraySource(self.pixels[rows])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A list of n images: what each is called, its label, and on demand its bytes.

    Parameters
    ----------
    name
        "digits", "cifar10", or the name of the folder or manifest.
    classes
        The class names in Unicode form NFC, sorted.
    names
        (n,) what a person calls image i: a path with "/", or such as "digits/17". May repeat in a manifest.
    labels
        (n,) int32, indices into `classes`.
    splits
        (n,) "train", "val" or "test", or None if the dataset brings no splits.
    groups
        (n,) images of one group belong on one side; "" is a group of its own. None if there are no groups.
    source
        Reads image i.
    ignored
        How many files were passed over, by ending (lower case, "" for none), or as "hidden"; folders of other programs
        and hidden ones by name, which ends in "/".
    without_images
        The folders of splits and classes that hold no image, as "dogs" or "test/dogs".
    embedded
        Whether it comes with an installed library and never needs a network.
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
        """Return the absolute path of image i, or None if it is no file on this machine."""
        return self.source.path(i)

    def url(self, i: int) -> str | None:
        """Return the resolved address of image i, or None if it has none."""
        return self.source.url(i)

    def urls(self) -> Iterator[str]:
        """Yield the resolved addresses of the images that have one."""
        return (url for i in range(len(self)) if (url := self.source.url(i)) is not None)

    def take(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """Return the images at `indices`, in that order, or those where a boolean array is true.

        The classes stay as they are, so that labels mean the same. Raises IndexError if one is out of range.
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
    """Return images of no known class, from files at absolute paths or resolved addresses.

    They are called `names`, by default as those.
    """
    texts, labels = [str(file) for file in files], np.zeros(len(files), np.int32)
    source = FileSource(Path("/"), texts)
    return Dataset(name, ("unknown",), names or texts, labels, None, None, source, ignored or {})


def _pick(values: Sequence[Any], rows: np.ndarray) -> list[Any]:
    return [values[i] for i in rows.tolist()]


def index_labels(texts: Iterable[str], order: Callable[[str], Any] | None = None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the sorted distinct `texts` in Unicode form NFC, and for each text its index among them, (n,) int32.

    They are sorted as text, or by what `order` returns for them.
    """
    seen: dict[str, int] = {}
    codes = np.fromiter((seen.setdefault(text, len(seen)) for text in texts), dtype=np.int32)
    names = [unicodedata.normalize("NFC", text) for text in seen]
    classes = tuple(sorted(set(names), key=order))
    place = {name: i for i, name in enumerate(classes)}
    return classes, np.array([place[name] for name in names], np.int32)[codes]


def identical_images(classes: Sequence[str]) -> list[list[str]]:
    """Return groups of class names that look alike: they differ in case, in blanks or in Unicode's compatible forms."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
        groups.setdefault(" ".join(visible.casefold().split()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def remap(order: Sequence[int], codes: np.ndarray) -> np.ndarray:
    """Return for each code its place in `order`, a permutation of all codes, as (n,) int32."""
    place = np.empty(len(order), np.int32)
    place[list(order)] = np.arange(len(order), dtype=np.int32)
    return place[codes]


def brought_splits(splits: list[str]) -> list[str] | None:
    """Return `splits`, or None if they set nothing apart: a lone "train" holds no image back."""
    return None if set(splits) <= {"train"} else splits


def limit(dataset: Dataset, count: int) -> Dataset:
    """Return the first `count` images of a fixed, class-balanced order; the dataset itself if it has no more.

    The order takes one image of each class in turn while the class has any, within a class by the sha256 of
    the image's name. It depends on no seed, and a smaller limit is always the beginning of a larger one.

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
    turn = np.arange(len(dataset)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # place within the class
    return dataset.take(by_class[np.argsort(turn, kind="stable")][:count])


def hash_numbers(values: Iterable[bytes]) -> np.ndarray:
    """Return the first 8 bytes of each value's sha256, big-endian, as (n,) uint64."""
    digests = b"".join(hashlib.sha256(value).digest()[:8] for value in values)
    return np.frombuffer(digests, ">u8").astype(np.uint64)
