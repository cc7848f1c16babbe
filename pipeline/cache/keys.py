"""The keys of many images as arrays: 33 bytes an image, sorted and told apart without an object for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

import numpy as np

KEY_BYTES = 32
_BLOCK = 1 << 16  # keys made into objects, or compared whole, at a time


@dataclass(frozen=True, eq=False)
class Grouped:
    """Images that have a key, those of one key together.

    `images` (m,) int64 are sorted by key, then by themselves; `leads` (m,) bool marks the first of each key.
    """

    images: np.ndarray
    leads: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """The image that stands for each of the k distinct keys, in the order of the keys: (k,) int64."""
        return self.images[self.leads]

    def members(self, groups: np.ndarray) -> list[list[int]]:
        """Return all images of each of these groups, which are indices into `first`."""
        if not len(groups):
            return []
        bounds = np.append(np.flatnonzero(self.leads), len(self.images))
        return [self.images[bounds[group] : bounds[group + 1]].tolist() for group in groups]


class Keys(Sequence[bytes | None]):
    """The key of each of n images, or None where it is not known; one can be set at a time.

    `digests` is (n, 32) uint8, zeros where there is none, and `known` (n,) bool.
    """

    def __init__(self, digests: np.ndarray, known: np.ndarray) -> None:
        self.digests = digests
        self.known = known

    @classmethod
    def unknown(cls, count: int) -> Self:
        """Return `count` times None."""
        return cls(np.zeros((count, KEY_BYTES), np.uint8), np.zeros(count, bool))

    @classmethod
    def of(cls, values: Sequence[bytes | None]) -> Self:
        """Return these."""
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
        """Return the images that have a key, sorted by it, without those in `but`."""
        known = self.known.copy()
        known[np.asarray(but, np.int64)] = False
        if known.all():  # as a rule: no copy of so much is made
            images = in_order(self.digests)
        else:
            images = np.flatnonzero(known)
            images = images[in_order(self.digests[images])]
        return Grouped(images, _differ(self.digests, images))


def raw(keys: Sequence[bytes]) -> np.ndarray:
    """Return keys as (n, 32) uint8."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def split(digests: np.ndarray) -> list[bytes]:
    """Return (n, 32) uint8 as n keys."""
    joined = digests.tobytes()
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


def comparable(digests: np.ndarray | bytes) -> np.ndarray:
    """Return (n, 32) uint8, or keys that were joined, as n values that NumPy compares as wholes."""
    joined: Any = digests if isinstance(digests, bytes) else np.ascontiguousarray(digests)
    return np.frombuffer(joined, f"S{KEY_BYTES}")  # all are of this length, so that zeros at the end mislead nobody


def in_order(digests: np.ndarray) -> np.ndarray:
    """Return the order that sorts (n, 32) uint8, equal ones staying in theirs: (n,) int64."""
    begins = digests[:, :8].copy().view(">u8").ravel().astype(np.uint64)
    order = np.argsort(begins, kind="stable")
    begins = begins[order]
    alike = begins[1:] == begins[:-1]
    if not alike.any() or not _differ(digests, order)[1:][alike].any():
        return order
    # Somebody made keys that begin alike but are not: those are sorted by all of their bytes.
    doubtful = np.append(alike, False) | np.insert(alike, 0, False)
    some = np.sort(order[doubtful])
    order[doubtful] = some[np.argsort(comparable(digests[some]), kind="stable")]
    return order


def _differ(digests: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return for each place in `order` whether its key is another than the one before, (m,) bool."""
    differ = np.ones(len(order), bool)
    for start in range(1, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        here = comparable(digests[order[start - 1 : stop]])
        differ[start:stop] = here[1:] != here[:-1]
    return differ
