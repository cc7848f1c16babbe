"""A folder of class folders, with or without split folders above them."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.base import SPLIT_NAMES, Dataset, FileSource, brought, index_labels
from pipeline.errors import DatasetError

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"})

_LAYOUT = "expected <class>/<image>, or train/<class>/<image> with test/ and perhaps val/ beside it"
_LOOP = "(link loop)"
_LISTED_AT_ONCE = 16  # folders: a file system far away answers many at once, each slowly


def open_folder(root: Path) -> Dataset:
    """List the images under `root`, sorted by name; the folders below it are the classes.

    If all of them are called train, val (valid, validation) or test, and train or test is there, they are the
    splits and the folders below those are the classes. A class is a folder with images, at any depth. Links
    are followed; hidden files, hidden folders and other files are counted in `ignored`.

    Raises
    ------
    DatasetError
        If there are no images, an image lies outside a class folder, or a folder cannot be listed.
    """
    root = root.absolute()  # a worker elsewhere may run in another folder
    ignored: Counter[str] = Counter()
    names = sorted(images_below(root, ignored))
    depth = 1 if _has_splits(root) else 0  # which part of a name is the class
    if not names:
        passed = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in ignored.items())
        raise DatasetError(f"{root}: {_LAYOUT}, found no images (passed over: {passed or 'nothing'})")
    if stray := [name for name in names if name.count("/") <= depth]:
        raise DatasetError(f"{root}: {_LAYOUT}, found {len(stray)} outside a class folder, as {stray[0]!r}")
    classes, labels = index_labels(name.split("/", depth + 1)[depth] for name in names)
    return Dataset(
        name=root.resolve().name or str(root),
        classes=classes,
        names=names,
        labels=labels,
        splits=brought([SPLIT_NAMES[name.split("/", 1)[0].lower()] for name in names]) if depth else None,
        groups=None,
        source=FileSource(root, names),
        ignored=dict(ignored),
    )


def _has_splits(root: Path) -> bool:
    names = [entry.name.lower() for entry in _entries(root) if entry.name[0] != "." and _is_folder(entry)]
    return all(name in SPLIT_NAMES for name in names) and ("train" in names or "test" in names)


@dataclass(frozen=True)
class _Folder:
    """A folder to be listed: `prefix` is what its images' names begin with, `above` are the folders it lies in."""

    path: Path
    prefix: str = ""
    above: frozenset[tuple[int, int]] = frozenset()


def images_below(root: Path, ignored: Counter[str]) -> Iterator[str]:
    """Yield the images below `root` as relative paths with "/", in no order; count the rest in `ignored`."""
    pool = ThreadPoolExecutor(_LISTED_AT_ONCE)
    try:
        waiting = deque([pool.submit(_listed, _Folder(root))])
        while waiting:
            names, folders, passed = waiting.popleft().result()
            ignored.update(passed)
            waiting.extend(pool.submit(_listed, folder) for folder in folders)
            yield from names
    finally:
        pool.shutdown(cancel_futures=True)


def _listed(folder: _Folder) -> tuple[list[str], list[_Folder], Counter[str]]:
    """Return the names of the images in a folder, the folders in it, and how many of what else."""
    names, folders, ignored = list[str](), list[_Folder](), Counter[str]()
    here, entries = _identity(folder.path), _entries(folder.path)
    if here in folder.above:  # a link back to a folder we are in: it would never end
        return [], [], Counter({_LOOP: 1})
    for entry in entries:
        ending = _ending(entry.name)
        if _is_folder(entry):
            if entry.name[0] == ".":
                ignored[f"{ending}/"] += 1
            else:
                folders.append(_Folder(Path(entry.path), f"{folder.prefix}{entry.name}/", folder.above | {here}))
        elif entry.name[0] != "." and ending in IMAGE_ENDINGS:  # a pipe too: its reading fails, and is listed
            names.append(folder.prefix + entry.name)
        else:
            ignored[ending] += 1
    return names, folders, ignored


def _identity(folder: Path) -> tuple[int, int]:
    try:
        stat = folder.stat()
    except OSError as error:
        raise DatasetError(f"cannot look at the folder {folder}: {error.strerror}") from error
    return stat.st_dev, stat.st_ino


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DatasetError(f"cannot list the folder {folder}: {error.strerror}") from error


def _ending(name: str) -> str:
    """Return the ending in lower case: ".jpg" of "a.JPG", ".ds_store" of ".DS_Store", "" of "README"."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot >= 0 else ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
