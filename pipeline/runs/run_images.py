"""Store which images a run was trained, selected and tested on, by their content: `images.npz` in the run's folder.

The file has four arrays. `key` (n, 32) uint8 is the sha256 of each image's encoded bytes, or of its raw pixels for
datasets that come as arrays. `split` (n,) uint8 is an index into `splits`, ("train", "val", "test", "initial"). An
image with copies in two splits is listed in both. "initial" are the images that the initial model was trained or
selected on. `complete` is False if these are not known. Read the file by `numpy.load(allow_pickle=False)`.
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
SEEN = ("train", "val", "initial")  # splits whose images a model was trained or selected on


@dataclass(frozen=True, eq=False)
class RunImages:
    """The images that a run was trained on ("train"), selected on ("val") or tested on ("test").

    "initial" are the images that the run's initial model was trained or selected on. `digests` (n, 32) uint8 are the
    images' keys, `splits` (n,) uint8 indices into `SPLITS`; each pair is listed once. `complete` is False if it is not
    known what the initial model was trained on.
    """

    digests: np.ndarray
    splits: np.ndarray
    complete: bool = True

    @classmethod
    def of(cls, keys: Mapping[str, Sequence[bytes]], initial: Self | None = None) -> Self:
        """Return the images with these keys, given by split; `initial` are the images of the initial model."""
        parts = [_distinct(raw(keys.get(split, ()))) for split in _OWN]
        parts.append(_distinct(initial.among(*SEEN) if initial else raw(())))
        numbers = np.repeat(np.arange(len(parts), dtype=np.uint8), [len(part) for part in parts])
        return cls(np.concatenate(parts), numbers, initial is None or initial.complete)

    @classmethod
    def unknown(cls) -> Self:
        """Return an empty, incomplete set: the images of a model whose training images are not known."""
        return cls(raw(()), np.zeros(0, np.uint8), complete=False)

    def among(self, *splits: str) -> np.ndarray:
        """Return the keys of the images in any of these splits, (m, 32) uint8; a key may occur more than once."""
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
        doubtful = (begins[at] == starts) & ~found  # keys with equal first 8 bytes: made on purpose
        found[doubtful] = np.isin(comparable(wanted[doubtful]), comparable(known)) if doubtful.any() else False
        return found

    def shares_most(self, other: Self) -> bool:
        """Return whether both are images of the same dataset: more than half of the smaller set is in the other."""
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
        """Return the images of the run in a folder; None for an early run, which did not store them.

        Raises
        ------
        RunError
            If the file cannot be read, or was changed after publishing.
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
        except RunError:  # its message is complete
            raise
        except (OSError, ValueError, LookupError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it, or train anew") from error
        return found

    def _check(self, names: Sequence[str]) -> None:
        """Raise ValueError unless the arrays have the required shapes, dtypes and values."""
        whole = self.digests.shape == (len(self.splits), KEY_BYTES) and self.splits.shape == (len(self.splits),)
        types = self.digests.dtype == np.uint8 and self.splits.dtype == np.uint8
        if tuple(names) != SPLITS or not (whole and types) or (self.splits >= len(SPLITS)).any():
            raise ValueError("not the keys of images and their splits")


def _check_size(file: BinaryIO) -> None:
    """Raise ValueError if the file would unpack to more bytes than it has: `write` compresses nothing."""
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
