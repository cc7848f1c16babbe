"""Which images a run was trained, selected and tested on, by their content: `images.npz` in its folder.

`key` (n, 32) uint8 is the sha256 of each image's encoded bytes (of the raw pixels, for datasets that come as arrays),
`split` (n,) uint8 a place in `splits`, ("train", "val", "test", "initial"). An image with copies in two splits stands
there twice. "initial" are the images that the model this run began with was trained or selected on, and `complete` is
False if that is not known. It is read by `numpy.load(allow_pickle=False)`.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from pipeline.cache.keys import KEY_BYTES, Keys, comparable, in_order, raw
from pipeline.core import files
from pipeline.core.errors import RunError
from pipeline.runs.checksums import not_published, read_checksums

FILE = "images.npz"
SPLITS = ("train", "val", "test", "initial")
_OWN = ("train", "val", "test")
SEEN = ("train", "val", "initial")  # in these a model was trained or selected on images


@dataclass(frozen=True, eq=False)
class RunImages:
    """Which images a run was trained on, "train", selected on, "val", tested on, "test", or began with, "initial".

    `digests` (n, 32) uint8 are their keys, `splits` (n,) uint8 places in `SPLITS`; each pair stands there once. Without
    `complete` nobody knows what the model that the run began with was trained on.
    """

    digests: np.ndarray
    splits: np.ndarray
    complete: bool = True

    @classmethod
    def of(cls, keys: Mapping[str, Sequence[bytes]], initial: Self | None = None) -> Self:
        """Return the images with these keys, by the split; `initial` is what the run began with."""
        parts = [_distinct(raw(keys.get(split, ()))) for split in _OWN]
        parts.append(_distinct(initial.among(*SEEN) if initial else raw(())))
        numbers = np.repeat(np.arange(len(parts), dtype=np.uint8), [len(part) for part in parts])
        return cls(np.concatenate(parts), numbers, initial is None or initial.complete)

    @classmethod
    def unknown(cls) -> Self:
        """Return what is known of a model of which it is not known what it was trained on."""
        return cls(raw(()), np.zeros(0, np.uint8), complete=False)

    def among(self, *splits: str) -> np.ndarray:
        """Return the keys of the images in any of these splits, (m, 32) uint8; some may stand there twice."""
        return self.digests[np.isin(self.splits, [SPLITS.index(split) for split in splits])]

    def contains(self, keys: Sequence[bytes], *splits: str) -> np.ndarray:
        """Return which of the images with these keys are in any of these splits, (n,) bool."""
        known, wanted = self.among(*splits), raw(keys)
        if not len(known):
            return np.zeros(len(wanted), bool)
        order = in_order(known)
        begins, starts = _beginnings(known)[order], _beginnings(wanted)
        at = np.minimum(np.searchsorted(begins, starts), len(order) - 1)
        found = (known[order[at]] == wanted).all(axis=1)
        doubtful = (begins[at] == starts) & ~found  # somebody made keys that begin alike
        found[doubtful] = np.isin(comparable(wanted[doubtful]), comparable(known)) if doubtful.any() else False
        return found

    def shares_most(self, other: Self) -> bool:
        """Return whether these are images of the same dataset: most of those of the smaller one are in the other."""
        mine, theirs = sorted((_distinct(each.among(*_OWN)) for each in (self, other)), key=len)
        begins, starts = _beginnings(theirs), _beginnings(mine)
        found = begins[np.minimum(np.searchsorted(begins, starts), len(begins) - 1)] == starts if len(mine) else starts
        return 2 * int(found.sum()) > len(mine)

    def write(self, folder: Path) -> None:
        """Write the file into a run's folder."""
        with files.new_file(folder / FILE) as file:
            np.savez(file, key=self.digests, split=self.splits, splits=np.array(SPLITS), complete=self.complete)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the images of the run in a folder; None of one that was made before runs kept them.

        Raises
        ------
        RunError
            If the file cannot be read, or is not the one that was published.
        """
        path, known = folder / FILE, read_checksums(folder)
        if FILE not in known and not path.exists():
            return None
        try:
            with files.open_regular(path, 0) as file:
                if known and hashlib.file_digest(file, "sha256").hexdigest() != known.get(FILE):  # pyright: ignore[reportArgumentType]
                    raise not_published(path)
                _check_size(file)
                with np.load(file, allow_pickle=False) as stored:
                    found = cls(stored["key"], stored["split"], bool(stored["complete"]))
                    names = stored["splits"].tolist()
            found._check(names)
        except RunError:  # which says all of it
            raise
        except (OSError, ValueError, LookupError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it, or train anew") from error
        return found

    def _check(self, names: Sequence[str]) -> None:
        """Raise ValueError unless the arrays are of the shapes and values they must be."""
        whole = self.digests.shape == (len(self.splits), KEY_BYTES) and self.splits.shape == (len(self.splits),)
        types = self.digests.dtype == np.uint8 and self.splits.dtype == np.uint8
        if tuple(names) != SPLITS or not (whole and types) or (self.splits >= len(SPLITS)).any():
            raise ValueError("not the keys of images and their splits")


def _check_size(file: BinaryIO) -> None:
    """Raise ValueError if the file would unpack to more than it has bytes: nothing in ours is packed."""
    with zipfile.ZipFile(file) as stored:
        unpacked = sum(part.file_size for part in stored.infolist())
    if unpacked > file.seek(0, os.SEEK_END):
        raise ValueError(f"it would unpack to {unpacked:,} bytes")
    file.seek(0)


def _distinct(digests: np.ndarray) -> np.ndarray:
    return digests[Keys(digests, np.ones(len(digests), bool)).grouped().first]


def _beginnings(digests: np.ndarray) -> np.ndarray:
    """Return the first eight bytes of each key as a number, (n,) uint64, in the order of the keys."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8").ravel().astype(np.uint64)
