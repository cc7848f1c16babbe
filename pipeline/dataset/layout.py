"""Decide whether the folders in the root of a dataset are splits or classes; refuse a mixture of both."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.core.errors import DatasetError
from pipeline.dataset.base import SPLIT_NAMES

_NAMED = 5  # most folders listed in a message
_MANIFEST = "name the class and the split of each image in a manifest (a CSV file with the columns path,label,split)"


@dataclass(frozen=True)
class _Tree:
    """A folder, and the relative paths of the folders in it that directly contain images; "" is the folder itself."""

    path: str
    filled: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def side(self) -> str | None:
        """The split that the name of the folder means, or None."""
        return SPLIT_NAMES.get(self.name.lower())

    @property
    def direct(self) -> bool:
        """Whether images are directly in the folder."""
        return "" in self.filled

    @cached_property
    def folders(self) -> tuple[_Tree, ...]:
        """The folders directly in this folder that have images at any depth, sorted."""
        below: dict[str, list[str]] = {}
        for folder in filter(None, self.filled):
            first, _, rest = folder.partition("/")
            below.setdefault(first, []).append(rest)
        start = f"{self.path}/" if self.path else ""
        return tuple(_Tree(f"{start}{name}", tuple(rests)) for name, rests in sorted(below.items()))


def class_depth(root: Path, folders: Collection[str]) -> int:
    """Return the index of the class in the parts of an image's path: 0, or 1 if the first part is a split.

    Folders with split names are splits if all folders beside them have such names too. Otherwise such a folder is a
    class if all its images are directly in it, and an error if not. Folders without images do not count.

    Parameters
    ----------
    root
        The root folder of the dataset, for messages.
    folders
        The folders that directly contain images, relative to `root`, with "/".

    Raises
    ------
    DatasetError
        If the folders are neither all splits nor all classes, or splits are found where classes are expected.
    """
    tops = _Tree("", tuple(folders)).folders
    if all(top.side for top in tops):
        _check_splits(root, tops)
        return 1
    _check_classes(root, tops)
    return 0


def _check_splits(root: Path, tops: Sequence[_Tree]) -> None:
    """Raise DatasetError if two folders are the same split, or a split contains splits."""
    for side in sorted({top.side or "" for top in tops}):
        if len(same := [top for top in tops if top.side == side]) > 1:
            raise DatasetError(
                f"{root}: expected one folder for the split {side}, found {_listed(same)}; put their images "
                f"into one, or {_MANIFEST}"
            )
    for top in tops:
        nested = [each for each in top.folders if each.side and each.folders]
        if not nested and len(top.folders) == 1 and top.folders[0].side == top.side:
            nested = [*top.folders]
        if nested:
            raise DatasetError(f"{root}: expected classes below {top.path}/, found {_listed(nested)}; {_MANIFEST}")


def _check_classes(root: Path, tops: Sequence[_Tree]) -> None:
    """Raise DatasetError if there are splits beside the classes, below them, or under names such as "test_set"."""
    splits = [top for top in tops if top.side and top.folders]
    if splits:
        others = [top for top in tops if top not in splits]
        raise DatasetError(
            f"{root}: expected splits or classes, found both: {_listed(splits)} with class folders, beside "
            f"{_listed(others)} with images; move one kind away, or {_MANIFEST}"
        )
    if likely := _likely_splits(tops):
        raise DatasetError(
            f"{root}: expected classes, found {_listed(likely)}; if these are splits, call them train, val and test "
            f"and move other images away, or {_MANIFEST}"
        )
    for top in tops:
        _check_below(root, top, alone=len(tops) == 1)


def _check_below(root: Path, top: _Tree, *, alone: bool) -> None:
    """Raise DatasetError if a class folder has splits in it; `alone` if it is the only class folder."""
    while alone and not top.direct and len(top.folders) == 1 and not top.folders[0].side:
        top = top.folders[0]
    splits = [each for each in top.folders if each.side]
    all_are = not top.direct and len(splits) == len(top.folders)
    if not _sets_apart(each.side for each in splits) and not (all_are and any(each.folders for each in splits)):
        return
    way_out = f"give {root / top.path}" if alone and all_are else f"put splits above classes, or {_MANIFEST}"
    raise DatasetError(f"{root}: expected splits right below it, found {_listed(splits)}; {way_out}")


def _likely_splits(tops: Sequence[_Tree]) -> list[_Tree]:
    """Return the folders whose names contain the names of splits, as "test_set" does; [] if they are likely classes.

    They count as splits if all folders are such, or if they have class folders in common. So "test tube" and "train
    station" are classes if there are other classes.
    """
    likely = {top.path: top for top in tops if _words(top.name) & SPLIT_NAMES.keys()}
    if not _sets_apart(SPLIT_NAMES.get(word) for top in likely.values() for word in _words(top.name)):
        return []
    inside = [{each.name for each in top.folders} for top in likely.values()]
    return list(likely.values()) if len(likely) == len(tops) or set.intersection(*inside) else []


def _sets_apart(sides: Iterable[str | None]) -> bool:
    """Return whether `sides` contain "train" and another split."""
    found = set(sides) - {None}
    return "train" in found and len(found) > 1


def _words(name: str) -> set[str]:
    """Return the words in a name: "train" and "images" for "train2017-Images", "test" for "testset"."""
    return {word.removesuffix("set").removesuffix("data") for word in re.findall("[a-z]+", name.lower())}


def _listed(folders: Sequence[_Tree]) -> str:
    named = ", ".join(f"{folder.path}/" for folder in folders[:_NAMED])
    return f"{named} and {len(folders) - _NAMED:,} more" if len(folders) > _NAMED else named
