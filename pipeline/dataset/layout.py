"""Whether the folders below a dataset's root are splits or classes; a mixture of both is refused, never guessed at."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.core.errors import DatasetError
from pipeline.dataset.base import SPLIT_NAMES

_NAMED = 5  # folders that a message names
_MANIFEST = "name the class and the split of each image in a manifest (a CSV file with the columns path,label,split)"


@dataclass(frozen=True)
class _Tree:
    """A folder, and the paths from there of the folders that images lie in; "" is the folder itself."""

    path: str
    filled: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def side(self) -> str | None:
        """The split that its name means, or None."""
        return SPLIT_NAMES.get(self.name.lower())

    @property
    def direct(self) -> bool:
        """Whether images lie directly in it."""
        return "" in self.filled

    @cached_property
    def folders(self) -> tuple[_Tree, ...]:
        """The folders right below it that hold images, at any depth; sorted."""
        below: dict[str, list[str]] = {}
        for folder in filter(None, self.filled):
            first, _, rest = folder.partition("/")
            below.setdefault(first, []).append(rest)
        start = f"{self.path}/" if self.path else ""
        return tuple(_Tree(f"{start}{name}", tuple(rests)) for name, rests in sorted(below.items()))


def class_depth(root: Path, folders: Collection[str]) -> int:
    """Return which part of an image's path is its class: 0 the first, 1 the second, below the splits.

    A folder with a split's name is a split if all its neighbours are, and a class if it holds images directly and some
    neighbour is no split. Folders without images do not count.

    Parameters
    ----------
    root
        Only named in messages.
    folders
        The folders that images lie directly in, relative to `root`, with "/".

    Raises
    ------
    DatasetError
        If the folders are neither all splits nor all classes, or splits lie where classes are expected.
    """
    tops = _Tree("", tuple(folders)).folders
    if all(top.side for top in tops):
        _check_splits(root, tops)
        return 1
    _check_classes(root, tops)
    return 0


def _check_splits(root: Path, tops: Sequence[_Tree]) -> None:
    """Refuse two folders that are one split, and a split below a split."""
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
    """Refuse splits beside classes, under other names, or below them."""
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
    """Refuse a class folder that has splits in it; `alone` if it is the only one."""
    while alone and not top.direct and len(top.folders) == 1 and not top.folders[0].side:
        top = top.folders[0]
    splits = [each for each in top.folders if each.side]
    all_are = not top.direct and len(splits) == len(top.folders)
    if not _sets_apart(each.side for each in splits) and not (all_are and any(each.folders for each in splits)):
        return
    way_out = f"give {root / top.path}" if alone and all_are else f"put splits above classes, or {_MANIFEST}"
    raise DatasetError(f"{root}: expected splits right below it, found {_listed(splits)}; {way_out}")


def _likely_splits(tops: Sequence[_Tree]) -> list[_Tree]:
    """Return the folders whose names contain those of different splits, as "test_set": all, or with classes in common.

    So "test tube" and "train station" are classes beside others.
    """
    likely = {top.path: top for top in tops if _words(top.name) & SPLIT_NAMES.keys()}
    if not _sets_apart(SPLIT_NAMES.get(word) for top in likely.values() for word in _words(top.name)):
        return []
    inside = [{each.name for each in top.folders} for top in likely.values()]
    return list(likely.values()) if len(likely) == len(tops) or set.intersection(*inside) else []


def _sets_apart(sides: Iterable[str | None]) -> bool:
    """Return whether there are images to train on among these, and others."""
    found = set(sides) - {None}
    return "train" in found and len(found) > 1


def _words(name: str) -> set[str]:
    """Return the words of a name: "train" and "images" of "train2017-Images", "test" of "testset"."""
    return {word.removesuffix("set").removesuffix("data") for word in re.findall("[a-z]+", name.lower())}


def _listed(folders: Sequence[_Tree]) -> str:
    named = ", ".join(f"{folder.path}/" for folder in folders[:_NAMED])
    return f"{named} and {len(folders) - _NAMED:,} more" if len(folders) > _NAMED else named
