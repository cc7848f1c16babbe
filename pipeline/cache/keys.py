"""The keys (sha256) of many images as NumPy arrays: 33 bytes per image, sorted and compared without Python objects.

`Keys` is a sequence of keys, some unknown; `Grouped` lists images with equal keys together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

import numpy as np

KEY_BYTES = 32
_BLOCK = 1 << 16  # keys that are converted to objects, or compared by all bytes, at a time


@dataclass(frozen=True, eq=False)
class Grouped:
    """Images that have a key, with images of equal keys next to each other.

    `images` (m,) int64 are image indices, sorted by key, then by index. `leads` (m,) bool marks the first of each key.
    """

    images: np.ndarray
    leads: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """The first image of each of the k distinct keys, in the order of the keys: (k,) int64."""
        return self.images[self.leads]

    def members(self, groups: np.ndarray) -> list[list[int]]:
        """Return the list of images of each group; `groups` are indices into `first`."""
        if not len(groups):
            return []
        bounds = np.append(np.flatnonzero(self.leads), len(self.images))
        return [self.images[bounds[group] : bounds[group + 1]].tolist() for group in groups]


class Keys(Sequence[bytes | None]):
    """Sequence of the keys of n images, None where a key is not known. Single keys can be set.

    `digests` is (n, 32) uint8, zeros where the key is not known; `known` is (n,) bool.
    """

    def __init__(self, digests: np.ndarray, known: np.ndarray) -> None:
        self.digests = digests
        self.known = known

    @classmethod
    def unknown(cls, count: int) -> Self:
        """Return `count` unknown keys."""
        return cls(np.zeros((count, KEY_BYTES), np.uint8), np.zeros(count, bool))

    @classmethod
    def of(cls, values: Sequence[bytes | None]) -> Self:
        """Return `values` as `Keys`."""
        keys = cls.unknown(len(values))
        for i, value in enumerate(values):
            keys[i] = value
        return keys

    def __len__(self) -> int:
        return len(self.known)

    @overload
    def __getitem__(self, index: int) -> bytes | None: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> bytes | Self | None:
        if isinstance(index, slice):
            return type(self)(self.digests[index], self.known[index])
        return self.digests[index].tobytes() if self.known[index] else None

    def __setitem__(self, index: int, key: bytes | None) -> None:
        self.digests[index] = np.frombuffer(key or bytes(KEY_BYTES), np.uint8)
        self.known[index] = key is not None

    def __iter__(self) -> Iterator[bytes | None]:
        for start in range(0, len(self), _BLOCK):
            digests = split(self.digests[start : start + _BLOCK])
            known = self.known[start : start + _BLOCK].tolist()
            yield from (key if there else None for key, there in zip(digests, known, strict=True))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Keys):
            return np.array_equal(self.known, other.known) and np.array_equal(self.digests, other.digests)
        return list(self) == other if isinstance(other, list) else NotImplemented

    def __repr__(self) -> str:
        return f"Keys({len(self):,} images, {int(self.known.sum()):,} known)"

    def grouped(self, but: Sequence[int] | np.ndarray = ()) -> Grouped:
        """Return the images that have a key, sorted by key; the image indices in `but` are left out."""
        known = self.known.copy()
        known[np.asarray(but, np.int64)] = False
        if known.all():  # the usual case, handled without a copy of all keys
            images = in_order(self.digests)
        else:
            images = np.flatnonzero(known)
            images = images[in_order(self.digests[images])]
        return Grouped(images, _differ(self.digests, images))


def raw(keys: Sequence[bytes]) -> np.ndarray:
    """Return keys as (n, 32) uint8."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def split(digests: np.ndarray) -> list[bytes]:
    """Return (n, 32) uint8 digests as a list of n keys."""
    joined = digests.tobytes()
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


def comparable(digests: np.ndarray | bytes) -> np.ndarray:
    """Return (n, 32) uint8 digests, or n concatenated keys, as (n,) byte strings that NumPy compares and sorts."""
    joined: Any = digests if isinstance(digests, bytes) else np.ascontiguousarray(digests)
    # NumPy ignores zero bytes at the end of a string; as all keys have the same length, comparisons stay right.
    return np.frombuffer(joined, f"S{KEY_BYTES}")


def in_order(digests: np.ndarray) -> np.ndarray:
    """Return the indices that sort (n, 32) uint8 digests, by a stable sort: (n,) int64."""
    begins = digests[:, :8].copy().view(">u8").ravel().astype(np.uint64)
    order = np.argsort(begins, kind="stable")
    begins = begins[order]
    alike = begins[1:] == begins[:-1]
    if not alike.any() or not _differ(digests, order)[1:][alike].any():
        return order
    # Different keys with the same first 8 bytes (only if made on purpose) are sorted by all of their bytes.
    doubtful = np.append(alike, False) | np.insert(alike, 0, False)
    some = np.sort(order[doubtful])
    order[doubtful] = some[np.argsort(comparable(digests[some]), kind="stable")]
    return order


def _differ(digests: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return for each position in `order` whether its key differs from the one before, (m,) bool."""
    differ = np.ones(len(order), bool)
    for start in range(1, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        here = comparable(digests[order[start - 1 : stop]])
        differ[start:stop] = here[1:] != here[:-1]
    return differ
