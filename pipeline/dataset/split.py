"""Which images train, validate and test: by what the dataset brings, else by content, never by a seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.dataset.base import Dataset, hash_numbers

_TEST_BELOW = 0.1
_VAL_BELOW = 0.2
_DRAWN = "80/10/10 by content hash"


SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """The side of each image, and what is to be said about it.

    Parameters
    ----------
    sides
        (n,) `<U5`: "train", "val" or "test".
    origin
        How it came about, for people.
    crossing
        How many images have an identical copy on another side; 0 unless the dataset brought its splits.
    crossing_groups
        How many groups lie on more than one side; 0 likewise.
    conflicting
        How many images have an identical copy under another label.
    """

    sides: np.ndarray
    origin: str
    crossing: int
    crossing_groups: int
    conflicting: int

    @property
    def drawn(self) -> bool:
        """Whether no image has a side that somebody gave it."""
        return self.origin == _DRAWN


def assign(dataset: Dataset, keys: Sequence[bytes | None]) -> Split:
    """Return the side of each image; what the dataset brings is kept, and its leaks are counted.

    Without splits, 80/10/10 is drawn from the content: all copies of an image and all members of a group
    share a side, and it stays theirs when images are added (unless one joins two groups). Brought splits
    without val get a tenth of train lent by the same draw; if they lack test, what they call val is the test.

    Parameters
    ----------
    dataset
        Of n images.
    keys
        (n,) the sha256 of each image's bytes; None for one that could not be read: its name stands in.

    Raises
    ------
    ValueError
        If there is not one key for each image.
    """
    image_key, distinct = _distinct(dataset, keys)
    drawn = hash_numbers(b"icebox split" + root for root in _roots(dataset.groups, image_key, distinct))
    share = (drawn / 2.0**64)[image_key]  # (n,) in [0, 1)
    if dataset.splits is None:
        sides, origin = _sides(share), _DRAWN
    else:
        sides, origin = _keep(np.array(dataset.splits, "<U5"), share)
    codes = np.unique(sides, return_inverse=True)[1]
    return Split(
        sides=sides,
        origin=origin,
        crossing=int(_is_mixed(image_key, codes)[image_key].sum()),
        crossing_groups=_crossing_groups(dataset.groups, codes),
        conflicting=int(_is_mixed(image_key, dataset.labels)[image_key].sum()),
    )


def groups(dataset: Dataset, keys: Sequence[bytes | None]) -> np.ndarray:
    """Return a number for each image, (n,) int64, alike for those that must stay together.

    These are copies of one image, the members of a group, and of groups that share an image.
    """
    image_key, distinct = _distinct(dataset, keys)
    return _number(_roots(dataset.groups, image_key, distinct))[0][image_key]


def few_groups(dataset: Dataset) -> str | None:
    """Return in words how many groups a draw has to share out: the likely cause where a side is left without an image.

    None if nothing is drawn, or no group has several images.
    """
    sizes = Counter(group for group in dataset.groups or () if group)
    brought = set(dataset.splits or ("train",))
    if "train" not in brought or {"val", "test"} <= brought or max(sizes.values(), default=0) < 2:
        return None
    return (
        f"{sizes.total():,} of {len(dataset):,} images belong to {len(sizes):,} group{'s' * (len(sizes) > 1)}, each of "
        "which stays on one side: name smaller groups, or the split of each image in a column `split`"
    )


def _distinct(dataset: Dataset, keys: Sequence[bytes | None]) -> tuple[np.ndarray, list[bytes]]:
    """Return for each image the number of its key, (n,) int64, and the k distinct keys."""
    return _number([_sha256(n) if key is None else key for n, key in zip(dataset.names, keys, strict=True)])


def _sides(share: np.ndarray) -> np.ndarray:
    return np.select([share < _TEST_BELOW, share < _VAL_BELOW], ["test", "val"], "train").astype("<U5")


def _keep(sides: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the brought sides with a val, lent from train if need be, and how that came about."""
    present = set(sides.tolist())
    if "train" not in present or {"val", "test"} <= present:
        return sides, "brought by the dataset"
    origin = "brought; val lent from train"
    if "val" in present:
        sides = np.where(sides == "val", "test", sides)
        origin = "brought; val serves as test, val lent from train"
    lent = (sides == "train") & (_sides(share) == "val")
    return np.where(lent, "val", sides), origin


def _roots(groups: Sequence[str] | None, image_key: np.ndarray, distinct: list[bytes]) -> list[bytes]:
    """Return for each distinct key what its side is drawn from: itself, or the group it belongs to.

    Groups that share an image are one, known by the smallest of their names: a union-find over groups in the
    order of their names, where the smaller always becomes the parent.
    """
    if groups is None:
        return distinct
    names = sorted(set(groups) - {""})
    number = {name: i for i, name in enumerate(names)}
    parent = list(range(len(names)))
    owner = [-1] * len(distinct)  # a group of each key
    for key, group in zip(image_key.tolist(), groups, strict=True):
        if group:
            mine = number[group]
            owner[key] = mine if owner[key] < 0 else _join(parent, owner[key], mine)
    return [key if mine < 0 else _sha256(names[_find(parent, mine)]) for key, mine in zip(distinct, owner, strict=True)]


def _find(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = i = parent[parent[i]]
    return i


def _join(parent: list[int], a: int, b: int) -> int:
    low, high = sorted((_find(parent, a), _find(parent, b)))
    parent[high] = low
    return low


def _crossing_groups(groups: Sequence[str] | None, codes: np.ndarray) -> int:
    if groups is None:
        return 0
    named = np.fromiter((group != "" for group in groups), bool, len(groups))
    ids, _ = _number([group for group in groups if group])
    return int(_is_mixed(ids, codes[named]).sum())


def _number(values: Sequence[Hashable]) -> tuple[np.ndarray, list]:
    """Return for each value the number of its first appearance, (n,) int64, and the distinct values."""
    seen: dict[Hashable, int] = {}
    ids = np.fromiter((seen.setdefault(value, len(seen)) for value in values), np.int64, len(values))
    return ids, list(seen)


def _is_mixed(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each id, 0 to k - 1, whether its values differ: (k,) bool."""
    first = np.empty(ids.max(initial=-1) + 1, values.dtype)
    first[ids] = values
    mixed = np.zeros(len(first), bool)
    mixed[ids[values != first[ids]]] = True
    return mixed


def _sha256(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
