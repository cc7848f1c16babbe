"""Assign each image to train, val or test: by the splits of the dataset, else by image content, never by a seed."""

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
    """The side (train, val or test) of each image, and counts of problems with these sides.

    Parameters
    ----------
    sides
        (n,) `<U5`: "train", "val" or "test".
    origin
        How the sides were decided, as text for the user.
    crossing
        How many images have an identical copy on another side; 0 unless the dataset has its own splits.
    crossing_groups
        How many groups have images on more than one side; 0 unless the dataset has its own splits.
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
        """Whether Icebox drew all sides, because the dataset has no splits."""
        return self.origin == _DRAWN


def assign(dataset: Dataset, keys: Sequence[bytes | None]) -> Split:
    """Return the side of each image; splits of the dataset are kept, and images that leak between them are counted.

    Without splits, images are divided 80/10/10 by a hash of their content. All copies of an image and all members of
    a group share a side. They keep it when images are added, unless a new image joins two groups. If the dataset has
    splits but no val, the same hash takes a tenth of train as val. If it has no test, its val serves as test.

    Parameters
    ----------
    dataset
        The n images.
    keys
        (n,) the sha256 of each image's bytes; None for an unreadable image, whose name is hashed instead.

    Raises
    ------
    ValueError
        If the number of keys is not the number of images.
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
    """Return a number for each image, (n,) int64, equal for images that must stay on one side.

    These are copies of one image, members of a group, and members of groups that share an image.
    """
    image_key, distinct = _distinct(dataset, keys)
    return _number(_roots(dataset.groups, image_key, distinct))[0][image_key]


def few_groups(dataset: Dataset) -> str | None:
    """Return a message on how many groups the draw has to divide, for when a side has no image.

    Too few groups are then the likely cause. None if nothing is drawn, or no group has several images.
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
    """Return for each image the index of its key among the distinct keys, (n,) int64, and those k keys."""
    return _number([_sha256(n) if key is None else key for n, key in zip(dataset.names, keys, strict=True)])


def _sides(share: np.ndarray) -> np.ndarray:
    return np.select([share < _TEST_BELOW, share < _VAL_BELOW], ["test", "val"], "train").astype("<U5")


def _keep(sides: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the sides of the dataset, with a val taken from train if it lacks one, and the text for `origin`."""
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
    """Return for each distinct key the bytes that decide its side: the key itself, or the hash of its group's name.

    Groups that share an image are merged, and have the smallest of their names. The method is a union-find over the
    sorted names, in which the smaller name always becomes the parent.
    """
    if groups is None:
        return distinct
    names = sorted(set(groups) - {""})
    number = {name: i for i, name in enumerate(names)}
    parent = list(range(len(names)))
    owner = [-1] * len(distinct)  # the index of one group of each key, or -1
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
    """Return for each value its index among the distinct values, (n,) int64, and these, in order of appearance."""
    seen: dict[Hashable, int] = {}
    ids = np.fromiter((seen.setdefault(value, len(seen)) for value in values), np.int64, len(values))
    return ids, list(seen)


def _is_mixed(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each id from 0 to k - 1 whether it has different `values`: (k,) bool."""
    first = np.empty(ids.max(initial=-1) + 1, values.dtype)
    first[ids] = values
    mixed = np.zeros(len(first), bool)
    mixed[ids[values != first[ids]]] = True
    return mixed


def _sha256(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
